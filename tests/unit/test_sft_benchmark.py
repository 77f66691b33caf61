"""The arithmetic and the table of the benchmark of training."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM

from sft_dist.data.collate import Collator
from sft_dist.hardware import peak_flops
from sft_dist.metrics import flops_per_token
from tests.benchmarks import gpu_sft
from tests.benchmarks.sft_cells import Counts, Way, case_of, counts_of, figures, mfu, seen_length, table
from tests.benchmarks.sft_measure import SHAPES, Counting

H100 = 989e12


def test_mfu_of_opt_1_3b_by_hand() -> None:
    """6 N + 12 L H T with N = 1,315,758,080 (the head is the tied embedding), L = 24, H = 2048, T = 2048."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(SHAPES["opt-1.3b"]())
    layer = 4 * (2048 * 2048 + 2048) + 2 * 2048 * 8192 + 8192 + 2048 + 4 * 2048
    weights = 50272 * 2048 + 2050 * 2048 + 24 * layer + 2 * 2048
    assert weights == 1_315_758_080
    flops = flops_per_token(model, model.config, 2048)
    assert flops == 6 * weights + 12 * 24 * 2048 * 2048 == 9_102_508_032
    assert peak_flops("NVIDIA H100 80GB HBM3") == H100
    # 9.1025 GFLOP a token: half of an H100's 989 TFLOP/s are 54,325.7 tokens/s.
    assert mfu(54_325.69, flops, H100) == pytest.approx(0.5, abs=1e-6)


def test_llama_7b_has_the_published_number_of_weights() -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(SHAPES["llama-7b"]())
    assert sum(parameter.numel() for parameter in model.parameters()) == 6_738_415_616


def test_a_token_sees_the_document_that_it_lies_in() -> None:
    documents = [{"input_ids": [1] * n, "labels": [-100] + [1] * (n - 1)} for n in (10, 30)]
    counts = counts_of(documents, positions=60)
    assert counts == Counts(real=40, trained=38, positions=60, squares=1000)
    # 10 tokens of a document of 10, 30 of one of 30: as many FLOPs as if each saw 25.
    assert seen_length(counts) == 25
    assert counts + counts == Counts(80, 76, 120, 2000)


def test_figures_are_of_real_tokens() -> None:
    found = figures(Counts(1000, 400, 2000, 1), seconds=2, cpu_seconds=4, flops=1e9, peak=1e12, memory=3 * 10**9)
    assert (found["tokens_per_second"], found["trained_tokens_per_second"]) == (500, 200)
    assert (found["fill"], found["mfu"], found["peak_memory_gb"]) == (0.5, 0.5, 3)
    assert figures(Counts(1000, 400, 2000, 1), 2, 4, 1e9, None, 1)["mfu"] is None


def test_rows_of_both_trainers_count_alike() -> None:
    one = {"input_ids": [5, 6, 7], "labels": [-100, 6, 7]}
    two = {"input_ids": [8, 9], "labels": [8, 9]}
    ours = Counting(Collator(pad_token_id=0, packed=True, length=8))
    assert ours([[one, two]])["input_ids"].shape == (1, 8)
    padded = Counting(Collator(pad_token_id=0))
    padded([one, two])
    whole = {"input_ids": [5, 6, 7, 8, 9], "labels": [-100, 6, 7, 8, 9], "seq_lengths": [3, 2]}
    packed = Counting(lambda rows: {"input_ids": torch.tensor([row["input_ids"] for row in rows])})
    packed([whole])
    assert ours.counts == [Counts(5, 3, 8, 13)]
    assert padded.counts == [Counts(5, 3, 6, 13)]
    assert packed.counts == [Counts(5, 3, 5, 13)]


def test_a_table_tells_of_a_cell_that_ran_out_of_memory() -> None:
    fine = figures(Counts(1000, 400, 2000, 1), 2, 4, 1e9, 1e12, 3 * 10**9)
    fast = figures(Counts(3000, 1200, 3000, 1), 2, 6, 1e9, None, 4 * 10**9)
    cells = [
        {"model": "opt-1.3b", "way": Way.TRL_PADDED.value, "attention": "sdpa", "figures": fine},
        {"model": "opt-1.3b", "way": Way.TRL_PACKED.value, "attention": "sdpa", "fault": "out of memory"},
        {"model": "opt-1.3b", "way": Way.PACKED.value, "attention": "flex_attention", "figures": fast},
        {"model": "llama-7b", "way": Way.PACKED.value, "attention": "sdpa", "figures": fast},
    ]
    head, rule, *lines = table(cells, cuda=True).splitlines()
    assert lines == [
        "| opt-1.3b | TRL, padded | sdpa | 50.0% | 500 | 1.00 | 200 | 50.0% | 3.0 |",
        "| opt-1.3b | TRL, packed | sdpa | out of memory | | | | | |",
        "| opt-1.3b | this project, packed | flex_attention | 100.0% | 1,500 | 3.00 | 600 |  | 4.0 |",
        "| llama-7b | this project, packed | sdpa | 100.0% | 1,500 |  | 600 |  | 4.0 |",
    ]
    assert {line.count("|") for line in (head, rule, *lines)} == {10}
    # On a processor, by its own time.
    head, _, *lines = table(cells, cuda=False).splitlines()
    assert "real tokens/CPU s" in head
    assert [line.split(" | ")[4:6] for line in (lines[0], lines[2])] == [["250", "1.00"], ["500", "2.00"]]


def test_a_process_that_dies_leaves_a_line() -> None:
    assert gpu_sft.fault(-9, "") == "ended by SIGKILL (out of memory?)"
    assert gpu_sft.fault(-15, "Error") == "ended by SIGTERM"
    assert gpu_sft.fault(1, "Traceback\nValueError: a | b\n\nDone: 100%|##|\n") == "ValueError: a / b"
    assert gpu_sft.fault(3, "") == "exit code 3"


def test_steps_of_the_command_line_are_those_on_the_clock() -> None:
    assert case_of("opt-1.3b", 3).steps == 3
    assert case_of("opt-1.3b", None).steps == 20
