"""Drawn responses: the same ones in any batches, of the model's own distribution, and ended where they are to end."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, GenerationConfig, LlamaConfig, LlamaForCausalLM

from sft_dist.ppo.sampling import PickedByChance, chances, respond, up_to_stop
from tests import tiny

PAD, STOP, TOKENS = 0, 2, 12


@pytest.fixture(scope="module", params=["llama", "opt"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """One whose distributions are neither flat nor sharp, and that often ends before the last token."""
    folder = tiny.save_model(tmp_path_factory.mktemp("model") / request.param, request.param, seed=1)
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(3)
    return model


def asked(model: Any, numbers: torch.Tensor | None, prompts: Sequence[list[int]], **more: Any) -> list[list[int]]:
    options = {"tokens": TOKENS, "temperature": 1.0, "stops": [STOP], "pad": PAD, "alive": lambda: None, **more}
    return respond(model, prompts, numbers, **options)


def prompts_of(count: int, vocabulary: int, seed: int = 0) -> list[list[int]]:
    draw = np.random.default_rng(seed)
    return [draw.integers(3, vocabulary, draw.integers(1, 30)).tolist() for _ in range(count)]


@pytest.mark.parametrize("greedy", [False, True])
def test_responses_are_the_same_in_any_batches(model: Any, greedy: bool) -> None:
    prompts = prompts_of(12, model.config.vocab_size)
    numbers = None if greedy else chances(7, 3, range(12), TOKENS)
    whole = asked(model, numbers, prompts)
    assert len({tuple(response) for response in whole}) > 8
    order = [5, 0, 11, 3, 8, 1, 10, 2, 9, 4, 7, 6]
    for start, stop in ((0, 1), (1, 4), (4, 12)):
        places = order[start:stop]
        own = None if greedy else chances(7, 3, places, TOKENS)
        assert asked(model, own, [prompts[place] for place in places]) == [whole[place] for place in places]


def test_the_numbers_are_of_seed_rollout_and_place_alone() -> None:
    whole = chances(7, 3, range(6), 5)
    assert torch.equal(chances(7, 3, [4, 1], 5), whole[[4, 1]])
    assert torch.equal(chances(7, 3, range(6), 3), whole[:, :3])
    assert whole.dtype == torch.float64
    others = [chances(8, 3, range(6), 5), chances(7, 4, range(6), 5), whole.roll(1, 0)]
    assert all(not (whole == other).any() for other in others)


def test_draws_follow_the_distribution() -> None:
    """Pearson's chi-square of 40,000 draws, under a temperature: below the 99.9% point of nine degrees of freedom."""
    draws, temperature = 40_000, 0.7
    logits = torch.randn(10, generator=torch.Generator().manual_seed(1))
    picked = PickedByChance(chances(0, 0, range(200), 200).reshape(-1, 1), temperature, width=4)
    kept = picked(torch.zeros(draws, 4, dtype=torch.int64), logits.expand(draws, -1))
    assert (kept > -torch.inf).sum(1).eq(1).all()
    counts = torch.bincount(kept.argmax(1), minlength=10).double()
    expected = draws * (logits.double() / temperature).softmax(0)
    assert ((counts - expected).square() / expected).sum() < 27.88
    # The test can tell: it is far off for the distribution of another temperature.
    other = draws * logits.double().softmax(0)
    assert ((counts - other).square() / other).sum() > 1000


def test_tokens_without_probability_are_never_drawn() -> None:
    scores = torch.tensor([[-torch.inf, 0.0, -torch.inf, 0.0, -torch.inf]]).expand(1000, -1)
    numbers = chances(0, 0, range(1000), 1)
    numbers[0], numbers[1] = 0.0, 1 - 2.0**-53
    kept = PickedByChance(numbers, 1.0, width=0)(torch.zeros(1000, 0, dtype=torch.int64), scores).argmax(1)
    assert set(kept.tolist()) == {1, 3}
    assert (kept[0], kept[1]) == (1, 3)


def test_the_tail_of_a_large_vocabulary_is_drawn_too() -> None:
    """Half of the probability lies on 50,000 tokens of 1e-5 each: a sum in float32 would end before the last."""
    logits = torch.zeros(50_001)
    logits[0] = float(np.log(50_000))
    numbers = torch.tensor([[0.25], [0.500005], [1 - 1e-7]], dtype=torch.float64)
    kept = PickedByChance(numbers, 1.0, width=1)(torch.zeros(3, 1, dtype=torch.int64), logits.expand(3, -1))
    assert kept.argmax(1).tolist() == [0, 1, 50_000]


@pytest.mark.parametrize("greedy", [False, True])
def test_responses_are_those_of_a_plain_loop_without_a_cache(model: Any, greedy: bool) -> None:
    prompts = prompts_of(4, model.config.vocab_size, seed=2)
    numbers = chances(1, 0, range(4), TOKENS)
    found = asked(model, None if greedy else numbers, prompts, temperature=0.8)
    for place, prompt in enumerate(prompts):
        ids: list[int] = []
        while len(ids) < TOKENS and STOP not in ids:
            with torch.no_grad():
                logits = model(torch.tensor([prompt + ids])).logits[0, -1]
            if greedy:
                ids.append(int(logits.argmax()))
            else:
                sums = np.cumsum((logits.double() / 0.8).softmax(0).numpy())
                ids.append(int(np.argmax(sums > float(numbers[place, len(ids)]))))
        assert found[place] == ids


def test_a_response_ends_with_the_token_that_ended_it() -> None:
    assert up_to_stop([5, 6, 2, 9, 3], [2, 3]) == [5, 6, 2]
    assert up_to_stop([3, 2], [2, 3]) == [3]
    assert up_to_stop([5, 6], [2, 3]) == [5, 6]
    assert up_to_stop([], [2]) == []


def test_every_stop_ends_a_response_and_padding_is_none(model: Any) -> None:
    """All of the vocabulary but a few tokens are stops; and none is."""
    prompts = prompts_of(20, model.config.vocab_size)
    numbers = chances(0, 0, range(20), TOKENS)
    going_on = list(range(model.config.vocab_size))
    stops = going_on[::2]
    for response in asked(model, numbers, prompts, stops=stops):
        assert all(token not in stops for token in response[:-1])
        assert response[-1] in stops or len(response) == TOKENS
    assert {len(response) for response in asked(model, numbers, prompts, stops=[])} == {TOKENS}


OWN = {
    "repetition_penalty": 5.0, "no_repeat_ngram_size": 1, "do_sample": True, "top_k": 1, "temperature": 9.0,
    "top_p": 0.1, "min_p": 0.9, "min_new_tokens": TOKENS, "suppress_tokens": list(range(5, 200)),
    "forced_eos_token_id": 3, "begin_suppress_tokens": list(range(5, 300)), "bad_words_ids": [[300], [301]],
    "num_beams": 4, "num_return_sequences": 3, "max_length": 3, "max_time": 1e-6, "stop_strings": ["a"],
    "eos_token_id": list(range(300)), "guidance_scale": 2.0, "renormalize_logits": True,
}  # fmt: skip


def test_settings_of_the_model_bend_no_distribution(model: Any) -> None:
    """What a model's author set for chat, in its generation_config."""
    prompts = prompts_of(6, model.config.vocab_size)
    numbers = chances(3, 0, range(6), TOKENS)
    expected = [asked(model, chosen, prompts) for chosen in (numbers, None)]
    before, own = model.generation_config, GenerationConfig(**OWN)
    model.generation_config = own
    try:
        assert [asked(model, chosen, prompts) for chosen in (numbers, None)] == expected
        assert model.generation_config is own
    finally:
        model.generation_config = before


def test_a_sign_of_life_is_given_at_every_token() -> None:
    signs: list[int] = []
    config = LlamaConfig(vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    asked(LlamaForCausalLM(config), None, [[3], [4, 5]], tokens=5, stops=[], alive=lambda: signs.append(1))
    assert len(signs) == 5
