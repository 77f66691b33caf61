"""Reward models: one loss curve under every strategy, heads that others load, and going on to the bit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AutoPeftModelForSequenceClassification
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from sft_dist.export.command import Wishes, export
from tests import tiny
from tests.ranks import do_runs
from tests.recipes import records, reward_recipe

STRATEGIES = ("ddp", "zero2", "zero3", "fsdp2")
CASES = [*(("full", strategy) for strategy in STRATEGIES), ("lora", "zero3"), ("lora", "fsdp2")]
LORA = ["peft.use_peft=true", "peft.lora_r=4", "peft.lora_dropout=0"]
# No tiny epsilon, which lets round-off grow, and small steps, for a head's loss has no bound (docs/parity.md).
COMMON = ["train.adam_epsilon=1e-4", "train.learning_rate=2e-4", "train.full_determinism=true"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("reward")
    recipes = {
        "full": reward_recipe(folder / "llama", tiny.save_model(folder / "llama" / "model")),
        "lora": reward_recipe(folder / "opt", tiny.save_model(folder / "opt" / "model", "opt", activation="gelu")),
    }

    def job(kind: str, name: str, *more: str) -> list[str]:
        where = f"output.output_dir={folder / f'{kind}-{name}'}"
        return [str(recipes[kind]), where, *COMMON, *(LORA if kind == "lora" else []), *more]

    whole = ["train.per_device_train_batch_size=4"]
    steps = ["train.save_strategy=steps", "train.save_steps=2", "train.logging_steps=3"]
    cut = f"cut:{folder / 'full-steps'}:4"
    jobs = [job(kind, "one", *whole) for kind in recipes]
    jobs += [job(kind, "steps", *steps) for kind in recipes]
    jobs += [job("full", "again", *steps, "output.resume=true", cut)]
    do_runs(folder, "ddp", 1, jobs)
    for strategy in STRATEGIES:
        do_runs(folder, strategy, 2, [job(kind, name) for kind, name in CASES if name == strategy])
    return folder


@pytest.mark.parametrize(("kind", "strategy"), CASES)
def test_losses_and_figures_are_equal_however_the_run_is_spread(runs: Path, kind: str, strategy: str) -> None:
    reference, found = records(runs / f"{kind}-one"), records(runs / f"{kind}-{strategy}")
    # 9 pairs in global batches of 4: three steps an epoch, the last of one pair.
    assert len(found) == len(reference) == 6
    for key in ("loss", "grad_norm", "accuracy", "margin", "mean_reward", "reward_std", "num_trained_tokens"):
        expected = [row[key] for row in reference]
        assert [row[key] for row in found] == pytest.approx(expected, rel=1e-5, abs=2e-6), key
    for when in ("before", "after"):
        one, other = (summary(runs / f"{kind}-{name}")[when] for name in ("one", strategy))
        assert other == pytest.approx(one, rel=1e-5, abs=2e-6)


def summary(run: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run / "summary.json").read_text())
    return found


def test_the_loss_is_that_of_the_pairs_and_falls(runs: Path) -> None:
    held = [json.loads(line) for line in (runs / "full-one" / "eval" / "rewards.jsonl").read_text().splitlines()]
    for when in ("before", "after"):
        measure = summary(runs / "full-one")[when]
        margins = [json.loads(line).get("margin") or 0.0 for line in (runs / "llama" / "held.jsonl").open()]
        chosen, rejected = torch.tensor([row[when] for row in held], dtype=torch.float64).T
        losses = torch.log1p(torch.exp(torch.tensor(margins) - chosen + rejected)) + 0.01 * (chosen + rejected) ** 2
        assert measure["loss"] == pytest.approx(losses.mean().item(), rel=1e-6)
        assert measure["accuracy"] == pytest.approx((chosen > rejected).double().mean().item())
        assert measure["margin"] == pytest.approx((chosen - rejected).mean().item(), rel=1e-5)
        assert sum(summary(runs / "full-one")["margins"][when]) == measure["pairs"] == len(held) == 7
    assert summary(runs / "full-one")["after"]["loss"] < summary(runs / "full-one")["before"]["loss"]


@pytest.mark.parametrize(("kind", "strategy"), [("full", "one"), ("lora", "one"), *CASES[2:]])
def test_others_load_the_head_and_give_the_same_rewards(runs: Path, kind: str, strategy: str) -> None:
    run = runs / f"{kind}-{strategy}"
    tokenizer = AutoTokenizer.from_pretrained(run / "model")
    if kind == "full":
        model = AutoModelForSequenceClassification.from_pretrained(run / "model")
    else:
        model = AutoPeftModelForSequenceClassification.from_pretrained(
            run / "model", num_labels=1, pad_token_id=tokenizer.pad_token_id
        )
    give_the_rewards_of(run, model, tokenizer)


@pytest.mark.parametrize("source", ["lora-fsdp2", "lora-steps/checkpoints/checkpoint-6", "full-steps/checkpoints/*-6"])
def test_exported_ones_give_the_same_rewards(runs: Path, tmp_path: Path, source: str) -> None:
    (folder,) = runs.glob(source)
    export(str(folder), tmp_path / "out", Wishes(), say=lambda _: None)
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    give_the_rewards_of(runs / source.split("/")[0], model, AutoTokenizer.from_pretrained(tmp_path / "out"))


def give_the_rewards_of(run: Path, model: Any, tokenizer: Any) -> None:
    model.eval()
    held = [json.loads(line) for line in (run / "eval" / "rewards.jsonl").read_text().splitlines()]
    for row in held[:3]:
        for at, side in enumerate(("chosen", "rejected")):
            turns = [
                *({"role": r, "content": c} for r, c in row["prompt"]),
                {"role": "assistant", "content": row[side]},
            ]
            text = tokenizer.apply_chat_template(turns, tokenize=False).rstrip("\n")
            batch = tokenizer([text, text + tokenizer.pad_token * 3], add_special_tokens=False, return_tensors="pt",
                              padding=True)  # fmt: skip
            with torch.no_grad():
                rewards = model(**batch).logits[:, 0].tolist()
            assert rewards == pytest.approx([row["after"][at]] * 2, abs=1e-4)


def test_going_on_is_exact(runs: Path) -> None:
    whole, again = (load_file(runs / f"full-{name}" / "model" / "model.safetensors") for name in ("steps", "again"))
    assert all(torch.equal(again[name], weight) for name, weight in whole.items())
    timed = {"time", "tokens_per_second", "trained_tokens_per_second", "peak_memory_gb"}
    first, second = (
        [{key: value for key, value in row.items() if key not in timed} for row in records(runs / f"full-{name}")]
        for name in ("steps", "again")
    )
    assert first == second
    assert summary(runs / "full-again")["after"] == summary(runs / "full-steps")["after"]
