"""The built-in pairs: the right answer beside a wrong one, and nothing but the text to tell which is which."""

from __future__ import annotations

import re
from collections import Counter
from typing import Any

import pytest

from sft_dist.config import DataSection, Recipe
from sft_dist.data import python_docs, python_docs_pairs, sources
from sft_dist.data.pair_formats import parse_pair
from sft_dist.errors import DataError

Pair = dict[str, Any]
END_OF_A_SENTENCE = re.compile(r"[.!?:`)]$")


@pytest.fixture(scope="module")
def splits() -> dict[str, list[Pair]]:
    return {split: list(python_docs_pairs.build(split)) for split in python_docs_pairs.SPLITS}


@pytest.fixture(scope="module")
def told() -> dict[str, dict[str, tuple[str, str, str]]]:
    """Split -> id -> family, question and answer, of `python-docs`."""
    return {
        split: {name: (family, *turns[0]) for name, family, turns in python_docs.records(split)}
        for split in python_docs.SPLITS
    }


def test_questions_and_right_answers_are_those_of_python_docs(
    splits: dict[str, list[Pair]], told: dict[str, dict[str, tuple[str, str, str]]]
) -> None:
    for split, pairs in splits.items():
        assert len(pairs) >= 0.98 * len(told[split])
        for pair in pairs:
            assert (pair["prompt"], pair["chosen"]) == told[split][pair["id"]][1:]


def test_each_kind_of_rejected_side_is_what_it_says(
    splits: dict[str, list[Pair]], told: dict[str, dict[str, tuple[str, str, str]]]
) -> None:
    for split, pairs in splits.items():
        owners = {answer: (name, family) for name, (family, _, answer) in told[split].items()}
        for pair in pairs:
            family, rejected = told[split][pair["id"]][0], pair["rejected"]
            if pair["kind"] == "truncated":
                assert pair["chosen"].startswith(rejected)
                assert len(rejected) < len(pair["chosen"])
                assert not END_OF_A_SENTENCE.search(rejected), pair
            else:
                name, of = owners[rejected]
                assert name.rsplit("/", 1)[0] != pair["id"].rsplit("/", 1)[0]
                assert (of == family) == (pair["kind"] == "near")


def test_nothing_of_the_held_out_pairs_is_trained_on(splits: dict[str, list[Pair]]) -> None:
    # What is cut off is part of an answer; of those, `python-docs` tells the splits apart.
    texts = {
        split: {pair[side] for pair in pairs for side in ("chosen", "rejected") if pair["kind"] != "truncated"}
        for split, pairs in splits.items()
    }
    assert not texts["train"] & texts["test"]


def test_neither_length_nor_form_tells_which_side_is_right(splits: dict[str, list[Pair]]) -> None:
    for split, pairs in splits.items():
        kinds = Counter(pair["kind"] for pair in pairs)
        assert min(kinds[kind] for kind in python_docs_pairs.KINDS) >= 0.2 * len(pairs)
        longer = sum(len(pair["chosen"]) > len(pair["rejected"]) for pair in pairs) / len(pairs)
        assert 0.44 <= longer <= 0.56, split
        code = [sum(pair[side].startswith("```") for pair in pairs) for side in ("chosen", "rejected")]
        assert abs(code[0] - code[1]) <= 0.05 * len(pairs)
    wrong = [pair for pair in splits["train"] if pair["kind"] != "truncated"]
    near = sum(abs(len(pair["chosen"]) - len(pair["rejected"])) <= 0.5 * len(pair["chosen"]) for pair in wrong)
    assert near >= 0.8 * len(wrong)


def test_pairs_are_a_source_with_a_held_out_split() -> None:
    recipe = Recipe.model_validate(
        {
            "stage": "reward",
            "model": {"model_name_or_path": "m"},
            "data": {"dataset_name": "python-docs-pairs"},
            "output": {"output_dir": "o"},
        }
    )
    assert sources.test_split_of(recipe) == "test"
    source = sources.open_source(recipe.data, "test")
    assert source.fingerprint != sources.open_source(DataSection(dataset_name="python-docs"), "test").fingerprint
    first = next(source.records())
    assert first.where == "python-docs-pairs/test: record 1"
    pair = parse_pair(first.fields or {})
    assert pair.chosen == (first.fields or {})["chosen"]
    with pytest.raises(DataError, match="python-docs-pairs has no split 'dev'; it has train, test"):
        sources.open_source(recipe.data, "dev")
