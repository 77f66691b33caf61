"""PPO's plan, rollouts, safeguards and pictures, each by itself."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import pytest
import torch

from sft_dist.config_stages import PPOSection
from sft_dist.errors import UserError
from sft_dist.export.checkpoint import PolicyTensors
from sft_dist.ppo.formulas import AdaptiveKL, Moments
from sft_dist.ppo.plan import Places, Plan, plan_of
from sft_dist.ppo.rollout import Response, Rollout, from_document, put_together, repetition, settle, to_document
from sft_dist.ppo.safeguards import Safeguards
from sft_dist.recipe import load_recipe
from sft_dist.render.panels import Panel, panels_svg

PLAN = Plan(prompts=10, rollout=6, epochs=2, mini_batches=3, rollouts=5, seed=3)


def test_each_pass_takes_every_prompt_once_and_in_another_order() -> None:
    taken = [row for number in range(PLAN.rollouts) for row in PLAN.prompts_of(number)]
    passes = [taken[start : start + 10] for start in range(0, 30, 10)]
    assert all(sorted(one) == list(range(10)) for one in passes)
    assert passes[0] != passes[1] != passes[2]


def test_each_epoch_over_a_rollout_takes_every_response_once() -> None:
    steps = [PLAN.mini_batch(step) for step in range(PLAN.steps)]
    epochs = [[row for step in steps[start : start + 3] for row in step] for start in range(0, len(steps), 3)]
    assert all(sorted(one) == list(range(6)) for one in epochs)
    assert len({tuple(one) for one in epochs}) == len(epochs) == PLAN.rollouts * PLAN.epochs


def test_the_loader_deals_out_places_and_knows_a_filler() -> None:
    places = Places(PLAN)
    assert [places[row] for row in range(4)] == [0, 1, 0, 1]
    assert len(places) == PLAN.steps * PLAN.rows
    assert places[()] == -1


def recipe(folder: Path, **ppo: Any) -> Any:
    text = {"stage": "ppo", "model": {"model_name_or_path": "m"}, "data": {"dataset_name": "d.jsonl"},
            "output": {"output_dir": str(folder / "run")}, "ppo": {"reward": "a:b", **ppo}}  # fmt: skip
    (folder / "r.yaml").write_text(json.dumps(text))
    return load_recipe(folder / "r.yaml", [])


def test_a_plan_follows_from_the_recipe(tmp_path: Path) -> None:
    found = plan_of(recipe(tmp_path, rollout_batch_size=32, num_ppo_epochs=3), prompts=100, rows=8)
    assert (found.mini_batches, found.steps_per_rollout, found.rollouts) == (4, 12, 10)
    with pytest.raises(UserError, match=r"ppo\.rollout_batch_size: 30 prompts do not divide into mini-batches of 8"):
        plan_of(recipe(tmp_path, rollout_batch_size=30), prompts=100, rows=8)


def response(place: int, tokens: int, ended: bool = True, score: float = 1.0) -> Response:
    given = torch.arange(tokens).float() / 7 + place
    return Response(place, list(range(tokens)), ended, -given, -given - 0.1, given, given, score, {"reward": score})


def rollout(*responses: Response) -> Rollout:
    return put_together(2, [5, 3, 8][: len(responses)], [[1], [1, 2], [3]][: len(responses)], responses)


def test_responses_are_put_together_in_the_order_of_their_prompts() -> None:
    found = rollout(response(1, 2, score=2.0), response(0, 4))
    assert [len(one) for one in found.responses] == [4, 2]
    assert found.score.tolist() == [1.0, 2.0]
    assert found.mask.tolist() == [[True] * 4, [True, True, False, False]]
    assert found.values[1, 2:].tolist() == [0.0, 0.0]


def test_a_rollout_goes_through_a_checkpoint_to_the_bit() -> None:
    found = rollout(response(0, 3, score=0.1), response(1, 1, ended=False, score=1 / 3))
    settle(found, PPOSection(), AdaptiveKL(0.05, None, 1), Moments())
    again = from_document(to_document(found))
    for name, value in vars(found).items():
        other = getattr(again, name)
        assert torch.equal(value, other) if isinstance(value, torch.Tensor) else value == other, name
    assert again.score.dtype == torch.float64 and again.ended.dtype == torch.bool


@pytest.mark.parametrize(
    ("settings", "score"),
    [
        ({}, 1.5),
        ({"missing_eos_penalty": 1.0}, 1.0),
        ({"length_target": 2, "length_penalty": 0.5}, 1.25),
        ({"reward_clip": 1.0}, 1.0),
        ({"reward_norm": True}, 0.0),
    ],
)
def test_what_a_score_is_made_of(settings: dict[str, Any], score: float) -> None:
    found = rollout(response(0, 3, ended=False, score=1.0), response(1, 2, score=2.0))
    told = settle(found, PPOSection(kl_coef=0.0, **settings), AdaptiveKL(0.0, None, 1), Moments())
    assert told["objective/rlhf_reward"] == pytest.approx(score, abs=1e-7)
    assert told["objective/scores"] == 1.5


def test_repetition_is_the_share_of_runs_seen_before() -> None:
    assert repetition([1, 2, 3]) == 0.0
    assert repetition([7] * 8) == pytest.approx(4 / 5)
    assert repetition([1, 2, 3, 4, 1, 2, 3, 4]) == pytest.approx(1 / 5)


def told(reward: float, kl: float = 1.0, length: float = 10.0, repeated: float = 0.0) -> dict[str, float]:
    return {"objective/scores": reward, "objective/kl": kl, "completions/mean_length": length,
            "completions/repetition": repeated}  # fmt: skip


def test_alarms_sound_once_and_only_while_the_reward_rises() -> None:
    guards = Safeguards(PPOSection(alarm_window=2, kl_target=1.0))
    assert [line for number in range(2) for line in guards.judge(number, told(0.0))] == []
    found = [guards.judge(number, told(1.0, kl=3.0, length=30.0, repeated=0.8)) for number in range(2, 5)]
    assert [len(lines) for lines in found] == [0, 3, 0]
    assert "the reward rose from 0 to 1 while responses went from 10 to 30 tokens" in found[1][0]
    assert guards.alarms == 3
    # Not where the reward falls: that is no hacking.
    assert not [line for number in range(5, 8) for line in guards.judge(number, told(-1.0, length=99.0))]
    assert guards.alarms == 0


def test_alarms_go_through_a_checkpoint() -> None:
    settings = PPOSection(alarm_window=2)
    whole, first = Safeguards(settings), Safeguards(settings)
    numbers = [told(number / 10, length=10.0 + 9 * number) for number in range(9)]
    lines = [whole.judge(number, one) for number, one in enumerate(numbers)]
    for number, one in enumerate(numbers[:6]):
        first.judge(number, one)
    second = Safeguards(settings)
    second.load_state(json.loads(json.dumps(first.state())))
    assert [second.judge(number, numbers[number]) for number in range(6, 9)] == lines[6:]


def test_kl_that_runs_away_lowers_the_learning_rate_or_stops() -> None:
    guards = Safeguards(PPOSection(max_kl=5.0, on_max_kl="lower_lr"))
    factors = []
    for number, kl in enumerate([1.0, 9.0, 9.0, 1.0, 1.0, 1.0]):
        guards.judge(number, told(0.0, kl=kl))
        factors.append(guards.lr_factor)
    assert factors == [1.0, 0.5, 0.25, 0.5, 1.0, 1.0]
    with pytest.raises(UserError, match=r"ppo\.max_kl: rollout 3: the KL to the reference is 6 nats, above 5; raise"):
        Safeguards(PPOSection(max_kl=5.0)).judge(3, told(0.0, kl=6.0))


def test_a_picture_of_panels_leaves_out_what_is_no_number() -> None:
    panels = [Panel("reward", [(0, 0.5), (1, float("nan")), (2, 0.75)], line=1.0), Panel("none", [(0, float("inf"))])]
    picture = ElementTree.fromstring(panels_svg(panels, "rollout"))
    assert picture.attrib["aria-label"] == "reward from 0.5 at 0 to 0.75 at 2"
    assert len(picture.findall(".//polyline")) == 1
    assert panels_svg([], "rollout") == ""


def test_the_policy_of_a_checkpoint_has_its_own_names() -> None:
    class Held(dict[str, torch.Tensor]):
        def shape(self, name: str) -> tuple[int, ...]:
            return tuple(self[name].shape)

        def dtype(self, name: str) -> torch.dtype:
            return self[name].dtype

        def read(self, name: str) -> torch.Tensor:
            return self[name]

    names = ["policy.a.lora_A.default.weight", "policy.a.lora_A.value.weight", "value_head.weight", "value.b.weight"]
    found = PolicyTensors(Held({name: torch.full((2,), float(at)) for at, name in enumerate(names)}))
    assert list(found) == ["a.lora_A.default.weight"]
    assert found.read("a.lora_A.default.weight").tolist() == [0.0, 0.0]
    assert "value_head.weight" not in found
