"""PPO as a run: a step by hand, rollouts and losses that are equal under every strategy, exact resumption, learning."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from sft_dist.ppo.plan import Plan
from tests import ppo_by_hand
from tests.outcome import numbers, weights_hash
from tests.ppo_runs import (
    BESIDE,
    CASES,
    ROLLOUTS,
    STEPS_PER_ROLLOUT,
    TARGET_KL,
    job,
    learning_recipe,
    rollouts_of,
    small_recipe,
    told_of,
)
from tests.ppo_runs import weights_at as weights
from tests.ranks import do_runs
from tests.recipes import records, sft_dist

TOLERANCE = 1e-4
# A head alone under LoRA is in docs/parity.md.
SHOWN = ("greedy", "sampled", "lora")
# In the middle of a rollout's steps, and between two rollouts.
CUTS = (6, 8)
# Under the strategies these have packed rows, on one process they have padded ones.
PACKED = ("greedy", "lora")
# Rollouts within which the mean reward has come to nine tenths of the best (docs/benchmarks.md has more of them).
LEARNED = {("llama", "length"): 24, ("opt", "share"): 18}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With the runs on one process, which the tests share."""
    folder = tmp_path_factory.mktemp("ppo")
    recipe = small_recipe(folder)
    jobs = [
        [str(ppo_by_hand.prepare(folder))],
        *(job(folder, recipe, f"single-{name}", *CASES[name], "train.save_steps=1") for name in SHOWN),
        *_learning(folder / "learning"),
    ]
    do_runs(folder, "single", 1, jobs)
    return folder


def _learning(folder: Path) -> list[list[str]]:
    folder.mkdir()
    return [
        job(folder, learning_recipe(folder, architecture), f"{architecture}-{task}",
             f"ppo.reward=tests.letters:{task}", f"train.num_train_epochs={rollouts}")
        for (architecture, task), rollouts in LEARNED.items()
    ]  # fmt: skip


def test_a_step_by_hand_is_the_trainers(folder: Path) -> None:
    """Two tokens, one layer, no torch: what the trainer kept of two rollouts, its losses, its updated weights."""
    run, plan = folder / "by-hand", Plan(prompts=8, rollout=8, epochs=2, mini_batches=2, rollouts=2, seed=42)
    first, second = rollouts_of(run)
    log, reference = records(run), _doubled(folder / "policy")
    # The KL of the first rollout is zero, by which the adaptive weight falls by a fifth of 8 / 40.
    kl_coef = ppo_by_hand.SETTINGS["kl_coef"]
    coefficients = (kl_coef, kl_coef * (1 - 0.2 * 8 / 40))
    before = ppo_by_hand.scores_of(first.responses)
    checked = ((0, first, [], coefficients[0], (0,)), (4, second, before, coefficients[1], (4, 5)))
    for start, rollout, scores, coefficient, steps in checked:
        policy, value = (_behind(folder, start, part) for part in ("policy", "value"))
        of = ppo_by_hand.judged(rollout.prompts, rollout.responses, policy, reference, value, scores, coefficient)
        for name in ("log_probs", "reference", "values", "advantages", "returns"):
            for row, expected in enumerate(getattr(of, name)):
                kept = getattr(rollout, name)[row, : len(expected)].tolist()
                assert kept == pytest.approx(expected, abs=1e-6), (name, row)
        for step in steps:
            policy, value = (_behind(folder, step, part) for part in ("policy", "value"))
            rows = plan.mini_batch(step)
            for name, expected in ppo_by_hand.losses(policy, value, of, rows).items():
                assert log[step][name] == pytest.approx(expected, abs=1e-6), (step, name)
            norm, *updated = ppo_by_hand.step(policy, value, of, rows)
            assert log[step]["grad_norm"] == pytest.approx(norm, rel=1e-6)
            for part, expected_weights, old in zip(("policy", "value"), updated, (policy, value), strict=True):
                found = _behind(folder, step + 1, part)
                assert found.keys() == expected_weights.keys()
                assert max(np.abs(found[n] - old[n]).max() for n in found) > 1e-3
                assert max(np.abs(found[n] - expected_weights[n]).max() for n in found) < 1e-6
    # The second rollout is far enough from the reference, and the last of the steps clips some tokens and not others.
    assert abs(second.log_probs - second.reference).max() > 0.05
    assert 0 < log[5]["policy/clipfrac_avg"] < 1


def _doubled(folder: Path) -> dict[str, np.ndarray]:
    return {name: value.astype(np.float64) for name, value in load_file(folder / "model.safetensors").items()}


def _behind(folder: Path, step: int, part: str) -> dict[str, np.ndarray]:
    return weights(folder / "by-hand", step, part) if step else _doubled(folder / part)


@pytest.mark.parametrize("strategy", ["ddp", "zero2", "zero3", "fsdp2"])
def test_rollouts_and_losses_are_equal_and_resumption_is_exact(folder: Path, strategy: str) -> None:
    recipe = folder / "llama.yaml"
    cases = {name: (*CASES[name], f"data.packing={'required' if name in PACKED else 'false'}") for name in SHOWN}
    jobs = [job(folder, recipe, f"{strategy}-{name}", *words) for name, words in cases.items()]
    again = [(name, step) for name, step in zip(("sampled", "lora"), CUTS, strict=True)]
    jobs += [
        job(folder, recipe, f"{strategy}-{name}-again", *cases[name], "output.resume=true",
             f"cut:{folder / f'{strategy}-{name}'}:{step}")
        for name, step in again
    ]  # fmt: skip
    do_runs(folder, strategy, 2, jobs)
    for name in SHOWN:
        _assert_equal(folder / f"single-{name}", folder / f"{strategy}-{name}")
    for name, _ in again:
        whole, resumed = folder / f"{strategy}-{name}", folder / f"{strategy}-{name}-again"
        assert _timeless(resumed) == _timeless(whole), name
        assert weights_hash(resumed) == weights_hash(whole), name
        assert told_of(resumed) == told_of(whole), name
        assert [one["rollout"] for one in told_of(whole)] == list(range(ROLLOUTS))


def _timeless(run: Path) -> dict[tuple[int, str], Any]:
    return {key: value for key, value in numbers(run).items() if not key[1].startswith("time/")}


def _assert_equal(one: Path, other: Path) -> None:
    """Tokens alike, all else to the tolerance, and the runs are such that it says something."""
    expected, found = rollouts_of(one), rollouts_of(other)
    assert len(expected) == len(found) == ROLLOUTS
    for a, b in zip(expected, found, strict=True):
        assert b.responses == a.responses, other
        for name in ("score", "log_probs", "reference", "values", "entropy", "advantages", "returns"):
            apart = (getattr(a, name) - getattr(b, name)).abs().max().item()
            assert apart < TOLERANCE, f"{other.name}: {name} of rollout {a.number} differs by {apart:.1e}"
    assert (expected[-1].log_probs - expected[-1].reference).abs().max() > 0.02
    assert len({tuple(response) for response in expected[-1].responses}) > 4
    ours, theirs = records(one), records(other)
    assert len(ours) == len(theirs) == ROLLOUTS * STEPS_PER_ROLLOUT
    names = [name for name in ours[0] if "/" in name and not name.startswith("time/")]
    for row, same in zip(ours, theirs, strict=True):
        for name in ("loss", "grad_norm", *(name for name in names if name in row)):
            assert same[name] == pytest.approx(row[name], rel=TOLERANCE, abs=TOLERANCE), (other.name, row["step"], name)


def test_updates_that_have_gone_too_far_are_left_out_with_the_rest_of_their_rollout(folder: Path) -> None:
    run = folder / "single-sampled"
    log, left_out = records(run), []
    for step in range(2, len(log) + 1):
        first = step - (step - 1) % STEPS_PER_ROLLOUT
        far = any(row["policy/approxkl_avg"] > TARGET_KL for row in log[first - 1 : step])
        before, behind = (weights(run, number, "policy") for number in (step - 1, step))
        assert far is all(np.array_equal(before[name], behind[name]) for name in before), step
        left_out.append(far)
    assert 0 < sum(left_out) < len(left_out)


def test_the_loss_beside_the_rollouts_is_that_of_sft(folder: Path) -> None:
    """Of all trained tokens of the step's records alike, under the policy that the run began with."""
    model = AutoModelForCausalLM.from_pretrained(folder / "llama").eval()
    tokenizer = AutoTokenizer.from_pretrained(folder / "llama")
    losses: list[float] = []
    for prompt, answer in BESIDE:
        asked, ids = (tokenizer(text)["input_ids"] for text in (f"{prompt}<ask>", f"{prompt}<ask>{answer}<end>"))
        with torch.no_grad():
            logits = model(torch.tensor([ids])).logits[0].double()
        losses += [-float(logits[t - 1].log_softmax(0)[ids[t]]) for t in range(len(asked), len(ids))]
    assert len(losses) == sum(len(answer) + 1 for _, answer in BESIDE)
    found = records(folder / "single-sampled")
    assert found[0]["loss/ptx_avg"] == pytest.approx(np.mean(losses), abs=1e-5)
    assert found[-1]["loss/ptx_avg"] < found[0]["loss/ptx_avg"]
    assert "loss/ptx_avg" not in records(folder / "single-greedy")[0]


@pytest.mark.parametrize(("architecture", "task"), list(LEARNED))
def test_it_learns_what_has_a_known_optimum(folder: Path, architecture: str, task: str) -> None:
    told = told_of(folder / "learning" / f"{architecture}-{task}")
    assert told[0]["objective/scores"] < 0.6
    assert told[-1]["objective/scores"] >= 0.9


def test_a_reward_that_fails_on_one_process_ends_the_run_with_a_line(folder: Path) -> None:
    """The other one must not wait in the reward model, whose weights are sharded."""
    rewards = {"mine": {"function": "tests.letters:failing"}, "scorer": {"model": str(folder / "llama-reward")}}
    done = sft_dist(
        folder, "run", str(folder / "llama.yaml"), f"ppo.rewards={json.dumps(rewards)}", "parallel.processes=2",
        "parallel.strategy=fsdp2", f"output.output_dir={folder / 'failing'}",
    )  # fmt: skip
    assert done.returncode == 2, done.stdout[-3000:] + done.stderr[-3000:]
    said = "ppo.rewards.mine.function: tests.letters:failing raised LookupError: no judge (first of the response "
    assert said in done.stderr + done.stdout
    assert "Traceback" not in done.stderr + done.stdout
