"""The whole road in real processes: train, measure, load the result, talk to it, and go on."""

from __future__ import annotations

import json
import stat
import sys
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests import tiny
from tests.recipes import records, sft_dist, small_recipe


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a recipe and its finished run on two processes."""
    folder = tmp_path_factory.mktemp("road")
    recipe = small_recipe(folder, tiny.save_model(folder / "base", "opt"))
    done = sft_dist(folder, "run", str(recipe), "parallel.processes=2")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    (folder / "output.txt").write_text(done.stdout + done.stderr)
    return folder


def test_the_model_directory_loads_and_carries_its_template(trained: Path) -> None:
    folder = trained / "run" / "model"
    AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = tokenizer.apply_chat_template([{"role": "user", "content": "q"}], tokenize=False, add_generation_prompt=True)
    assert text == "</s>### Instruction:\nq\n\n### Response:\n"


def test_a_run_leaves_what_is_needed_to_repeat_it(trained: Path) -> None:
    run = trained / "run"
    from sft_dist.recipe import load_recipe

    assert load_recipe(run / "recipe.yaml").parallel.processes == 2
    held = json.loads((run / "environment.json").read_text())
    assert held["versions"]["torch"]
    assert "parallel.processes=2" in held["command"]
    assert held["git"] is None or len(held["git"]["commit"]) == 40


def test_every_step_reports_loss_speed_and_memory(trained: Path) -> None:
    rows = records(trained / "run")
    wanted = {"loss", "perplexity", "learning_rate", "grad_norm", "tokens_per_second", "trained_tokens_per_second",
              "peak_memory_gb"}  # fmt: skip
    assert all(wanted <= set(row) for row in rows)
    assert rows[-1]["loss"] < rows[0]["loss"]
    assert "step  1/24  loss " in (trained / "output.txt").read_text()


def test_the_model_is_measured_before_and_after(trained: Path) -> None:
    run = trained / "run"
    summary = json.loads((run / "summary.json").read_text())
    assert summary["after"]["perplexity"] < summary["before"]["perplexity"]
    assert summary["before"]["records"] == summary["after"]["records"] == 7
    assert summary["data"]["train"]["records"] == 45
    answers = [json.loads(line) for line in (run / "eval" / "answers.jsonl").read_text().splitlines()]
    assert len(answers) == 2
    assert all(set(a) == {"prompt", "reference", "before", "after"} for a in answers)
    assert "<html" in (run / "eval" / "comparison.html").read_text()
    assert "perplexity" in (trained / "output.txt").read_text()


def test_trackers_write_beside_the_run_without_a_network(trained: Path) -> None:
    run = trained / "run"
    assert list((run / "wandb").glob("offline-run-*"))
    assert list((run / "tensorboard").glob("events.*"))


def test_files_of_a_run_are_their_owners(trained: Path) -> None:
    for path in (trained / "run").rglob("*"):
        if not path.is_symlink():
            assert stat.S_IMODE(path.stat().st_mode) & 0o077 == 0, path


def test_no_process_ends_in_a_crash_after_success(trained: Path) -> None:
    said = (trained / "output.txt").read_text()
    assert "SIGABRT" not in said
    assert "destroy_process_group" not in said
    assert "Traceback" not in said


def test_eval_repeats_the_measure_on_the_model_directory(trained: Path) -> None:
    done = sft_dist(trained, "eval", "run", "--output", "again", "eval.num_prompts=1")
    assert done.returncode == 0, done.stderr[-3000:]
    again = json.loads((trained / "again" / "measure.json").read_text())
    after = json.loads((trained / "run" / "summary.json").read_text())["after"]
    assert again["loss"] == pytest.approx(after["loss"], rel=1e-6)
    assert again["tokens"] == after["tokens"]


def test_chat_answers_in_the_terminal(trained: Path) -> None:
    import subprocess

    from tests.recipes import environment

    done = subprocess.run(
        [sys.executable, "-m", "launch.cli", "chat", "run", "--max-new-tokens", "4"],
        input="the quick brown fox\n/new\nagain\n", cwd=trained, env=environment(trained), capture_output=True,
        text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("model> ") == 2


def test_an_occupied_folder_is_refused_and_overwritten_only_when_told(trained: Path) -> None:
    before = (trained / "run" / "summary.json").read_text()
    done = sft_dist(trained, "run", "recipe.yaml", "parallel.processes=2")
    assert done.returncode == 2
    assert "holds another run; set output.resume=true" in done.stderr
    assert (trained / "run" / "summary.json").read_text() == before


def test_lora_leaves_an_adapter_that_loads(tmp_path: Path) -> None:
    recipe = small_recipe(tmp_path, tiny.save_model(tmp_path / "base"), records=8)
    done = sft_dist(
        tmp_path, "run", str(recipe), "peft.use_peft=true", "peft.lora_r=4", "parallel.processes=2",
        "train.learning_rate=0.01", "train.report_to=[]",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "run" / "model" / "adapter_model.safetensors").exists()
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model")
    assert any("lora_A" in name for name, _ in model.named_parameters())
    assert not (tmp_path / "run" / "wandb").exists()
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["after"]["loss"] < summary["before"]["loss"]
    again = sft_dist(tmp_path, "eval", "run", "--output", "again")
    assert again.returncode == 0, again.stderr[-3000:]
    measured = json.loads((tmp_path / "again" / "measure.json").read_text())
    assert measured["loss"] == pytest.approx(summary["after"]["loss"], rel=1e-5)


def test_bf16_autocast_trains_where_the_processor_has_it(tmp_path: Path) -> None:
    from sft_dist.hardware import cpu_has_bf16

    recipe = small_recipe(tmp_path, tiny.save_model(tmp_path / "base"), records=16)
    done = sft_dist(tmp_path, "run", str(recipe), "train.bf16=true", "train.report_to=[]", "parallel.processes=2")
    if cpu_has_bf16():
        assert done.returncode == 0, done.stderr[-3000:]
        assert records(tmp_path / "run")[-1]["loss"] < records(tmp_path / "run")[0]["loss"]
    else:
        assert done.returncode == 2
        assert "train.bf16: " in done.stderr
