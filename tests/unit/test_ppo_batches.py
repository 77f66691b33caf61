"""Prompts with their responses, padded and packed: the models say the same of them as of each alone."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from sft_dist.attention import Way
from sft_dist.packing_choice import packed_way
from sft_dist.ppo.actors import Actors
from sft_dist.ppo.batches import batch_of
from tests import letters

PAD = 0


def drawn(responses: tuple[int, ...] = (5, 1, 0, 9, 12, 3)) -> tuple[list[list[int]], list[list[int]]]:
    draw = random.Random(0)

    def ids(number: int) -> list[int]:
        return [draw.randrange(3, 12) for _ in range(number)]

    return [ids(draw.randint(1, 14)) for _ in responses], [ids(number) for number in responses]


def actors(folder: Path, architecture: str, shared: bool, temperature: float = 0.7) -> Actors:
    letters.save_model(folder, architecture, seed=1)
    policy, reference = (AutoModelForCausalLM.from_pretrained(folder) for _ in range(2))
    torch.manual_seed(2)
    value = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1)
    head = torch.nn.Linear(48, 1, bias=False) if shared else None
    with torch.no_grad():
        for weight in reference.parameters():
            weight.mul_(1.1)
    return Actors(policy, None if shared else value, head, reference, [], temperature)


def seen(model: Actors, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What is said of the tokens of the responses, one behind the other, and the gradients of its sum."""
    model.zero_grad()
    found = model("train", batch=batch, entropy=True)
    loss = sum(value[batch["mask"]].sum() * (number + 1) for number, value in enumerate(found.values()))
    loss.backward()
    gradients = {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}
    found |= {"reference": model("look", batch=batch)["reference"]}
    return {name: value[batch["mask"]].detach() for name, value in found.items()} | gradients


def alone(model: Actors) -> dict[str, torch.Tensor]:
    prompts, responses = drawn()
    parts = [seen(model, batch_of([a], [b], PAD)) for a, b in zip(prompts, responses, strict=True) if b]
    told = ("log_probs", "entropy", "values", "reference")
    return {name: (torch.cat if name in told else sum)([part[name] for part in parts]) for name in parts[0]}  # type: ignore[operator]


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("architecture", ["llama", "opt"])
def test_rows_say_of_a_response_what_it_says_alone(architecture: str, shared: bool, tmp_path: Path) -> None:
    model = actors(tmp_path, architecture, shared)
    wanted = alone(model)
    ways = [None, packed_way(model.policy, "required", False, lambda _: None)]
    assert ways[1] is (Way.MASK4D if architecture == "opt" else Way.POSITIONS)
    for model.way in ways:
        found = seen(model, batch_of(*drawn(), PAD, model.way is not None))
        assert found.keys() == wanted.keys()
        for name, value in wanted.items():
            torch.testing.assert_close(
                found[name], value, rtol=1e-4, atol=2e-5, msg=lambda text, name=name: name + text
            )


def test_a_log_probability_is_that_of_the_token_behind(tmp_path: Path) -> None:
    model = actors(tmp_path, "llama", shared=True)
    prompt, response = [3, 4, 5], [6, 7]
    logits = model.policy(torch.tensor([[*prompt, *response]])).logits[0] / 0.7
    wanted = logits.log_softmax(-1)[[2, 3], response]
    torch.testing.assert_close(
        model("train", batch=batch_of([prompt], [response], PAD), entropy=False)["log_probs"][0], wanted
    )


def test_packed_rows_are_few_and_have_every_token_but_the_last_ones() -> None:
    prompts, responses = drawn()
    batch = batch_of(prompts, responses, PAD, packed=True)
    tokens = [[*a, *b[:-1]] for a, b in zip(prompts, responses, strict=True)]
    assert batch["input_ids"].shape[1] == max(map(len, tokens))
    assert len(batch["input_ids"]) < len(prompts)
    assert int((batch["document_ids"] > 0).sum()) == sum(map(len, tokens))
    flat = batch["input_ids"].flatten()
    for number, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
        before = flat[batch["before"][number, : len(response)]].tolist()
        assert before == [*prompt[-1:], *response][: len(response)]
        assert batch["responses"][number, : len(response)].tolist() == response


def test_all_rows_as_one_leave_no_padding_behind() -> None:
    from sft_dist.ppo.batches import selected

    prompts, responses = drawn()
    batch: dict[str, Any] = batch_of(prompts, responses, PAD, packed=True)
    kept = batch["document_ids"] > 0
    joined = batch["input_ids"][kept].view(1, -1, 1)
    rows = batch["input_ids"].unsqueeze(-1)
    mask = batch["mask"]
    assert torch.equal(selected(joined, batch, Way.VARLEN)[mask], selected(rows, batch, None)[mask])
