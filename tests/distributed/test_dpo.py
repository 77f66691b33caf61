"""DPO under each strategy: one loss curve, whatever the processes and wherever the reference's numbers come from."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tests import tiny
from tests.outcome import numbers, weights_hash
from tests.ranks import do_runs
from tests.recipes import dpo_recipe, records

TOLERANCE = 1e-5
# A mean over pairs and one over tokens, with the tail of the longer side weighted.
MIXED = ("dpo.loss_type=[ipo, sft]", "dpo.loss_weights=[1, 0.5]", "dpo.ld_alpha=0.5")
LORA = ("peft.use_peft=true", "peft.lora_r=4")
CASES = {
    "full": (),
    "lora": LORA,
    "known": ("dpo.precompute_ref_log_probs=true",),
    "mixed": (*MIXED, "eval.enabled=false"),
}
SHORT = ("train.num_train_epochs=1", "eval.num_prompts=0", "train.report_to=none")
STRATEGIES = {
    "ddp": ["full", "mixed"],
    "zero2": ["full"],
    "zero3": ["full", "lora"],
    "fsdp2": ["full", "known", "lora"],
}
RESUMED = (*SHORT, "train.save_strategy=steps", "train.save_steps=3", "train.full_determinism=true",
           "train.logging_steps=2", "train.per_device_train_batch_size=1", "eval.enabled=false",
           "dpo.precompute_ref_log_probs=true", "train.eval_strategy=steps", "train.eval_steps=2")  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dpo")
    dpo_recipe(folder, tiny.save_model(folder / "model", "llama"))
    # 21 pairs in global batches of 4: the last has one pair and filler.
    whole = ("parallel.processes=1", "train.per_device_train_batch_size=4")
    do_runs(folder, "single", 1, [job(folder, "single", name, *whole) for name in CASES] + resumed(folder))
    return folder


def job(folder: Path, strategy: str, name: str, *words: str) -> list[str]:
    out = f"output.output_dir={folder / f'{strategy}-{name}'}"
    return [str(folder / "recipe.yaml"), *SHORT, "train.adam_epsilon=1e-4", *CASES[name], *words, out]


def resumed(folder: Path) -> list[list[str]]:
    recipe, whole = str(folder / "recipe.yaml"), folder / "whole"
    again = f"output.output_dir={folder / 'again'}"
    return [
        [recipe, *RESUMED, f"output.output_dir={whole}"],
        [recipe, *RESUMED, again, "output.resume=true", f"cut:{whole}:3"],
    ]


def differences(folder: Path, name: str, other: str) -> dict[str, float]:
    """The largest difference of each number of two runs, relative to its largest value."""
    found, expected = (records(folder / run) for run in (name, other))
    assert len(found) == len(expected) == 6
    worst = {}
    for key in ("loss", "grad_norm", "rewards/chosen", "rewards/margins", "logps/rejected", "kl_k2", "entropy"):
        ours, theirs = (torch.tensor([row[key] for row in rows], dtype=torch.float64) for rows in (found, expected))
        worst[key] = float((ours - theirs).abs().max() / theirs.abs().max())
    # In the first step policy and reference are one: which side is ahead is a matter of round-off.
    for key in ("rewards/accuracies", "num_trained_tokens", "num_tokens"):
        assert [row[key] for row in found[1:]] == [row[key] for row in expected[1:]], key
    return worst


@pytest.mark.parametrize("strategy", list(STRATEGIES))
def test_losses_and_measures_are_those_of_one_process(folder: Path, strategy: str) -> None:
    do_runs(folder, strategy, 2, [job(folder, strategy, name) for name in STRATEGIES[strategy]])
    for name in STRATEGIES[strategy]:
        worst = differences(folder, f"{strategy}-{name}", f"single-{name}")
        assert max(worst.values()) < TOLERANCE, (name, worst)
        held_out = [json.loads((folder / f"{one}-{name}" / "summary.json").read_text())["after"]
                    for one in (strategy, "single") if name != "mixed"]  # fmt: skip
        for measure in held_out[1:]:
            assert held_out[0] == pytest.approx(measure, rel=1e-4, abs=1e-6)


def test_a_reference_that_was_asked_beforehand_says_the_same(folder: Path) -> None:
    assert max(differences(folder, "single-known", "single-full").values()) < TOLERANCE
    before, after = (
        json.loads((folder / f"single-{name}" / "summary.json").read_text())["after"] for name in ("known", "full")
    )
    assert "kl" not in before and after.pop("kl") > 0
    assert before == pytest.approx(after, rel=1e-4)


def test_a_resumed_run_has_the_bits_of_one_that_was_never_stopped(folder: Path) -> None:
    assert numbers(folder / "whole") == numbers(folder / "again")
    assert weights_hash(folder / "whole") == weights_hash(folder / "again")
    # Numbers of the training rows and of the held-out rows, made by the first run that wanted them, under any strategy.
    assert len(list((folder / "cache" / "reference").glob("*.npy"))) == 2
    made = [log.read_text().count(" pairs computed (") for log in folder.glob("*.0.log")]
    assert sum(made) == 2
