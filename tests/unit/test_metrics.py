"""What is reported is what was computed: FLOPs, throughput, MFU, perplexity, lines."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from sft_dist import metrics
from sft_dist.hardware import cpu_has_bf16, peak_flops
from sft_dist.metrics import SourceLosses, Throughput, flops_per_token, line, mfu, perplexity
from sft_dist.trainers.guard import Event
from sft_dist.trainers.ordered import Ordered
from sft_dist.trainers.resumable import Resumable
from tests.recipes import command


def llama(tied: bool) -> torch.nn.Module:
    config = LlamaConfig(
        vocab_size=100, hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=4, max_position_embeddings=64, tie_word_embeddings=tied,
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config)  # type: ignore[no-any-return]


@pytest.mark.parametrize("tied", [True, False])
def test_flops_count_what_is_multiplied(tied: bool) -> None:
    """By hand: four projections and three MLP matrices a layer, the head, the norms, and attention."""
    model = llama(tied)
    weights = 3 * (4 * 32 * 32 + 3 * 32 * 64 + 2 * 32) + 32 + 100 * 32
    assert flops_per_token(model, model.config, 50) == 6 * weights + 12 * 3 * 32 * 50


def test_frozen_weights_cost_no_gradient_of_their_own() -> None:
    model = llama(tied=True)
    whole = flops_per_token(model, model.config, 0)
    model.requires_grad_(False)
    assert flops_per_token(model, model.config, 0) == pytest.approx(whole * 4 / 6)


def test_throughput_is_tokens_over_the_time_since_the_last_look(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [10.0]
    monkeypatch.setattr(metrics.time, "perf_counter", lambda: clock[0])
    seen = Throughput()
    clock[0] = 50.0
    seen.start()
    seen.tokens, seen.trained_tokens, clock[0] = 1000, 400, 52.0
    assert seen.look() == {"tokens_per_second": 500, "trained_tokens_per_second": 200}
    seen.tokens, seen.trained_tokens, clock[0] = 1100, 500, 53.0
    assert seen.look() == {"tokens_per_second": 100, "trained_tokens_per_second": 100}
    assert seen.overall() == pytest.approx({"tokens_per_second": 1100 / 3, "trained_tokens_per_second": 500 / 3})


def test_mfu_is_told_only_where_the_peak_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert mfu(1000.0, 1e9, 1) is None
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H100 80GB HBM3")
    assert mfu(989e3, 1e9, 2) == pytest.approx(0.5)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Some Other Card")
    assert mfu(1000.0, 1e9, 1) is None


@pytest.mark.parametrize(
    ("name", "peak"),
    [("NVIDIA H100 PCIe", 756e12), ("NVIDIA H100 80GB HBM3", 989e12), ("NVIDIA A100-SXM4-40GB", 312e12),
     ("NVIDIA GH200 480GB", 989e12), ("NVIDIA L40S", 362e12), ("NVIDIA L4", 121e12), ("Tesla T4", None)],
)  # fmt: skip
def test_the_peak_is_that_of_the_very_card(name: str, peak: float | None) -> None:
    assert peak_flops(name) == peak


def test_perplexity_of_a_loss_that_overflows_is_infinite() -> None:
    assert perplexity(0.0) == 1.0
    assert perplexity(5000.0) == math.inf


def test_lines_for_people() -> None:
    said = line({"loss": 2.5, "learning_rate": 1e-5, "tokens_per_second": 12345.6, "mfu": 0.413}, 7, 120)
    assert said == "step   7/120  loss 2.5000  lr 1.00e-05  tok/s 12,346  mfu 41.3%"
    assert line({"eval_loss": 1.0, "eval_perplexity": 2.718}, 7, 120) == "step   7/120  held-out loss 1.0000  ppl 2.718"
    assert line({"train_runtime": 3.0}, 7, 120) is None


def test_bf16_is_read_off_the_processor(tmp_path) -> None:  # type: ignore[no-untyped-def]
    info = tmp_path / "cpuinfo"
    info.write_text("flags : fpu avx512_bf16 sse")
    assert cpu_has_bf16(info)
    info.write_text("flags : fpu avx512f sse")
    assert not cpu_has_bf16(info)
    assert not cpu_has_bf16(tmp_path / "absent")


def test_losses_are_told_apart_by_source() -> None:
    found = SourceLosses(["chat", "docs", "idle"], torch.device("cpu"))
    log_probs = torch.tensor([[-1.0, -2.0, 0.0], [-4.0, 0.0, 0.0]])
    trained = torch.tensor([[True, True, False], [True, False, False]])
    found.add(log_probs, trained, torch.tensor([[0, 1, 1], [1, 1, 1]]))
    found.add(log_probs, trained, torch.tensor([[0, 0, 0], [0, 0, 0]]))
    logs = found.look(lambda sums: sums * 2)  # two ranks with the same tokens
    assert logs == {"loss/chat": 8 / 4, "tokens/chat": 8, "loss/docs": 3.0, "tokens/docs": 4, "tokens/idle": 0}
    assert found.look(lambda sums: sums) == {"tokens/chat": 8, "tokens/docs": 4, "tokens/idle": 0}


def test_a_step_that_is_left_out_is_in_no_loss_of_a_source(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("on_step_begins", "_deal_with"):
        monkeypatch.setattr(Resumable, name, lambda *_: None)
    trainer, sums = Ordered(), SourceLosses(["chat", "docs"], torch.device("cpu"))
    trainer.sums = sums

    def step(loss: float) -> None:
        trainer.on_step_begins()
        sums.add(torch.tensor([[-loss, -1.0]]), torch.tensor([[True, True]]), torch.tensor([[0, 1]]))

    step(2.0)
    step(100.0)
    trainer._deal_with(Event("the loss", 100.0, 2.0, "skip"))
    step(4.0)
    logs = sums.look(lambda own: own)
    assert logs == {"loss/chat": 3.0, "tokens/chat": 2, "loss/docs": 1.0, "tokens/docs": 2}


def test_a_process_ends_with_its_code_and_what_it_has_to_say() -> None:
    code = "import atexit; from sft_dist.process import end_process; atexit.register(print, 'handlers')\n"
    done = command(Path.cwd(), sys.executable, "-c", code + "print('said'); end_process(7)")
    assert (done.returncode, done.stdout) == (7, "said\nhandlers\n")
