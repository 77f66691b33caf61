"""What cannot work in a PPO recipe, told in one line that names the key, the sample and the mend."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from sft_dist.data.formats import Turn
from sft_dist.data.prompts import room_for_prompts
from sft_dist.errors import UserError
from sft_dist.ppo.names import RewardName, value_source
from sft_dist.ppo.plan import plan_of
from sft_dist.ppo.rewards import FunctionReward, Texts, load_function, model_rewards, refuse_other_value
from sft_dist.recipe import load_recipe
from tests import letters
from tests.ppo_runs import small_recipe


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe that is right, with a reward model and a function."""
    return small_recipe(tmp_path_factory.mktemp("ppo"))


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A reward model of another vocabulary than the policy's."""
    folder = letters.save_reward_model(tmp_path_factory.mktemp("other"))
    letters.tokenizer(letters.LETTERS[::-1]).save_pretrained(folder)
    return folder


def refused(of: Callable[[], Any]) -> str:
    with pytest.raises(UserError) as caught:
        of()
    said = str(caught.value)
    assert "\n" not in said
    return said


FUNCTION = ("ppo.rewards=null", "ppo.reward=tests.letters:share")


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["ppo.rewards=null"], "ppo.reward: is missing: name a reward model, or a function as package.module:function"),
        (["ppo.reward=tests.letters:share"], "ppo.rewards: cannot stand with ppo.reward"),
        (["ppo.rewards=null", "ppo.reward=a:b:c"], "ppo.reward: a:b:c is neither a model nor package.module:function"),
        (["ppo.rewards={x: {weight: 2}}"], "ppo.rewards.x: names a model or a function, one of the two"),
        (["ppo.rewards={x: {model: m, function: 'a:b'}}"], "ppo.rewards.x: names a model or a function, one of"),
        (["ppo.rewards={x: {function: share}}"], "ppo.rewards.x.function: share is not package.module:function"),
        (["ppo.rewards={x: {model: m, weight: 0}}"], "ppo.rewards.x.weight: 0 leaves the reward out"),
        (["ppo.response_length=32"], "ppo.response_length: 32 tokens leave no room for a prompt in rows of 32"),
        (["ppo.rollout_batch_size=10"], "10 prompts are not whole mini-batches of 4 responses (parallel.global_batch_"),
        (["ppo.rollout_batch_size=10"], "(parallel.global_batch_size); make it 12"),
        (["ppo.num_mini_batches=3"], "ppo.rollout_batch_size: 8 prompts are not 3 mini-batches of 4 responses"),
        (["train.max_steps=6"], "train.max_steps: 6 is no whole number of rollouts, each of 4 steps"),
        (["ppo.num_ppo_epochs=3", "train.max_steps=8"], "(ppo.num_ppo_epochs=3, 2 mini-batches); take 12"),
        (["ppo.num_ppo_epochs=0"], "ppo.num_ppo_epochs"),
        (["ppo.temperature=-1"], "ppo.temperature"),
        (["ppo.lam=1.5"], "ppo.lam"),
        (["ppo.kl_estimator=k4"], "ppo.kl_estimator"),
        (["ppo.length_target=5"], "ppo.length_penalty: goes with ppo.length_target"),
        (["ppo.ptx_coef=1"], "ppo.ptx_coef: goes with ppo.ptx_dataset_name"),
        (["ppo.kl_horizon=5"], "ppo.kl_horizon: has no effect without ppo.kl_target"),
        (["ppo.kl_target=5", "ppo.kl_coef=0"], "ppo.kl_coef: 0 cannot be steered to ppo.kl_target"),
        (["ppo.on_max_kl=lower_lr"], "ppo.on_max_kl: has no effect without ppo.max_kl"),
        (["guard.spike_factor=4"], "guard.spike_factor: a loss of PPO is near zero"),
        (["data.streaming=true", "train.max_steps=8"], "data.streaming: is for stage=sft"),
        (["stage=sft"], "ppo.response_length: has no effect while stage is sft"),
    ],
)  # fmt: skip
def test_settings_that_do_not_go_together(recipe: Path, overrides: list[str], said: str) -> None:
    with pytest.raises(UserError) as caught:
        load_recipe(recipe, overrides)
    lines = str(caught.value).splitlines()
    assert any(said in line for line in lines), lines
    # One line for each fault: `stage=sft` makes several settings idle.
    assert len(lines) == 1 or overrides == ["stage=sft"]


def test_batches_that_do_not_divide_by_the_processes_there_are(recipe: Path) -> None:
    """Where the recipe leaves the global batch open, only the worker knows it."""
    found = load_recipe(recipe, ["parallel.global_batch_size=null"])
    assert plan_of(found, 24, 4).mini_batches == 2
    said = refused(lambda: plan_of(found, 24, 3))
    assert said.startswith("ppo.rollout_batch_size: 8 prompts do not divide into mini-batches of 3 responses")
    assert "make it a multiple of that (9), or change parallel.global_batch_size" in said
    found = load_recipe(recipe, ["parallel.global_batch_size=null", "ppo.rollout_batch_size=null",
                                 "ppo.num_mini_batches=3", "train.max_steps=12"])  # fmt: skip
    assert (plan_of(found, 24, 5).rollout, plan_of(found, 24, 5).rollouts) == (15, 2)


def test_a_context_that_leaves_no_room_for_a_prompt(recipe: Path) -> None:
    """The model's own limit, which the recipe does not tell."""
    found = load_recipe(recipe, ["train.max_length=null", "ppo.response_length=64"])
    assert room_for_prompts(found, None) is None
    assert room_for_prompts(found, 65) == 1
    said = refused(lambda: room_for_prompts(found, 64))
    assert said.startswith("ppo.response_length: 64 tokens leave no room for a prompt in rows of 64")


# Reward functions.

TEXTS = Texts(
    [(Turn("user", "ask"),)] * 3, ["one", "two", "three"], [[1]] * 3, [[2]] * 3, [f"data.jsonl:{n}" for n in (4, 5, 6)]
)


def _lazily(**_: Any) -> Iterator[float]:
    yield 1.0
    raise ValueError("over\nand out")


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (lambda **_: 1 / 0, "raised ZeroDivisionError: division by zero (first of the response 'one' to data.jsonl:4)"),
        (lambda prompts: [], "raised TypeError"),
        (_lazily, "raised ValueError: over and out (first of the response 'one' to data.jsonl:4)"),
        (lambda **_: [1.0, 2.0], "gave 2 rewards for 3 completions"),
        (lambda **_: [1.0] * 4, "gave 4 rewards for 3 completions"),
        (lambda **_: None, "gave a NoneType; it must give a list of numbers"),
        (lambda **_: 1.0, "gave a float; it must give a list of numbers"),
        (lambda **_: [1.0, float("nan"), 1.0], "gave nan for the response 'two' to data.jsonl:5; it must give finite"),
        (lambda **_: [1.0, 1.0, -np.inf], "for the response 'three' to data.jsonl:6; it must give finite numbers"),
        (lambda **_: torch.tensor([1.0, 1.0, torch.nan]), "for the response 'three' to data.jsonl:6"),
        (lambda **_: ["1", "2", "3"], "gave '1' for the response 'one' to data.jsonl:4; it must give finite numbers"),
        (lambda **_: torch.zeros(3, 2), "for the response 'one' to data.jsonl:4; it must give finite numbers"),
        (lambda **_: [None, 1.0, 1.0], "gave None for the response 'one'"),
    ],
)  # fmt: skip
def test_a_reward_function_that_gives_no_rewards(given: Callable[..., Any], said: str) -> None:
    reward = FunctionReward(RewardName("x", "ppo.rewards.x.function", "mine:score", 1.0), given)
    found = refused(lambda: reward(TEXTS))
    assert found.startswith("ppo.rewards.x.function: mine:score ")
    assert said in found


@pytest.mark.parametrize(
    "given",
    [[1, 2.5, True], (0.0, 1.0, 2.0), np.arange(3, dtype=np.float32), torch.tensor([1.0, 2.0, 3.0]),
     torch.zeros(3, 1), [torch.tensor(1.0), np.float64(2), 3], iter([1.0, 2.0, 3.0])],
)  # fmt: skip
def test_rewards_may_be_numbers_of_any_library(given: Any) -> None:
    rewards = FunctionReward(RewardName("x", "ppo.reward", "mine:score", 1.0), lambda **_: given)(TEXTS)
    assert len(rewards) == 3
    assert all(type(reward) is float for reward in rewards)


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("no_such_module:score", "No module named 'no_such_module'"),
        ("tests.letters:no_such", "module 'tests.letters' has no attribute 'no_such'"),
        ("tests.letters:ROOM", "tests.letters:ROOM is a int, not a function"),
        ("broken_reward:score", "SyntaxError"),
        ("failing_reward:score", "RuntimeError: not today"),
    ],
)
def test_a_reward_function_that_cannot_be_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str, said: str
) -> None:
    (tmp_path / "broken_reward.py").write_text("def score(:\n")
    (tmp_path / "failing_reward.py").write_text("raise RuntimeError('not\\ntoday')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    found = refused(lambda: load_function(RewardName("x", "ppo.reward", source, 1.0)))
    assert found.startswith(f"ppo.reward: {source}")
    assert said in found
    assert "failing_reward" not in sys.modules


# Reward and value models.


def test_a_reward_model_of_another_tokenizer_is_refused_or_given_the_text_anew(recipe: Path, other: Path) -> None:
    found = load_recipe(recipe, ["ppo.rewards=null", f"ppo.reward={other}"])
    policy = str(recipe.parent / "llama")
    words = AutoTokenizer.from_pretrained(policy)
    said = refused(lambda: model_rewards(found, words, policy))
    assert said.startswith(f"ppo.reward: {other}: its vocabulary has 13 tokens, the policy's 13, and they are not the ")
    assert said.endswith("set ppo.retokenize=true to give it the text anew")
    found = load_recipe(recipe, ["ppo.rewards=null", f"ppo.reward={other}", "ppo.retokenize=true"])
    (reward,) = model_rewards(found, words, policy)
    texts = Texts(
        [(Turn("user", "ab"),)], ["a"], [words("ab<ask>")["input_ids"]], [words("a<end>")["input_ids"]], ["x:1"]
    )
    assert reward.tokenizer is not None
    assert reward.tokenizer.decode(reward.rows(texts)[0]).startswith("ab")
    assert reward.rows(texts)[0] != texts.prompt_ids[0] + texts.completion_ids[0]


def test_the_value_begins_with_a_model_that_reads_the_policys_tokens(recipe: Path, other: Path) -> None:
    found = load_recipe(recipe, [f"ppo.value_model_name_or_path={other}"])
    words = AutoTokenizer.from_pretrained(recipe.parent / "llama")
    said = refused(lambda: refuse_other_value(found, words))
    assert said.startswith(f"ppo.value_model_name_or_path: {other}: its vocabulary has 13 tokens")
    assert said.endswith("take a model that reads the policy's tokens")
    refuse_other_value(load_recipe(recipe, [f"ppo.value_model_name_or_path={recipe.parent / 'llama-reward'}"]), words)
    assert value_source(found.ppo, "policy", ["scorer"]) == str(other)
    left = load_recipe(recipe, []).ppo
    assert [value_source(left, "policy", rewards) for rewards in (["a", "b"], [])] == ["a", "policy"]


def test_a_causal_model_is_no_reward_model(recipe: Path) -> None:
    policy = str(recipe.parent / "llama")
    found = load_recipe(recipe, ["ppo.rewards=null", f"ppo.reward={policy}"])
    said = refused(lambda: model_rewards(found, AutoTokenizer.from_pretrained(policy), policy))
    assert said.startswith(f"ppo.reward: {policy}")
    assert "stage=reward" in said or "reward model" in said


def test_a_reward_model_that_is_not_there(recipe: Path) -> None:
    policy = str(recipe.parent / "llama")
    found = load_recipe(recipe, ["ppo.rewards=null", "ppo.reward=/no/such/folder"])
    said = refused(lambda: model_rewards(found, AutoTokenizer.from_pretrained(policy), policy))
    assert said.startswith("ppo.reward: /no/such/folder")
