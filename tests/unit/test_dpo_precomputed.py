"""The reference's log-probabilities in the cache: what it says, made once for the same weights and pairs."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from sft_dist.backend import Backend
from sft_dist.data.order import FILLER
from sft_dist.dpo import precomputed
from sft_dist.dpo.batch import PairCollator, PairRows, known_log_probs
from sft_dist.dpo.precomputed import tables
from sft_dist.dpo.reference import load_reference
from sft_dist.world import World
from tests import tiny
from tests.recipe_texts import MINIMAL, load

ARGS: Any = SimpleNamespace(device=torch.device("cpu"))


def pairs(count: int) -> Dataset:
    chance = np.random.default_rng(0)

    def ids() -> list[int]:
        return [int(token) for token in chance.integers(5, 250, chance.integers(1, 12))]

    rows = [{"prompt_ids": ids(), "chosen_ids": ids(), "rejected_ids": ids(), "margin": None} for _ in range(count)]
    return Dataset.from_list([{**row, "length": sum(map(len, list(row.values())[:3]))} for row in rows])


@pytest.fixture
def setting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("SFT_DIST_CACHE", str(tmp_path / "cache"))
    model = tiny.save_model(tmp_path / "model", layers=1)
    recipe = load(f"stage: dpo\n{MINIMAL}", f"model.model_name_or_path={model}", "dpo.precompute_ref_log_probs=true",
                  "dpo.precompute_ref_batch_size=3")  # fmt: skip
    said: list[str] = []
    return SimpleNamespace(recipe=recipe, world=World(0, 1, 0, 1), backend=Backend(), bf16=False, said=said,
                           tokenizer=AutoTokenizer.from_pretrained(model), say=said.append)  # fmt: skip


def test_they_are_what_the_reference_says(setting: Any) -> None:
    train, held_out = pairs(8), pairs(2)
    (known, _) = tables(setting, ARGS, [train, held_out])
    rows = PairRows(train, len(train), 0, known)
    batch = PairCollator(0, precomputed=True)([rows[(4,)], rows[FILLER], rows[(1,)]])
    said = load_reference(setting, ARGS).log_probs(batch)
    found = known_log_probs(batch)
    assert found is not None and found.abs().sum() > 10
    torch.testing.assert_close(found, said, rtol=1e-5, atol=1e-5)


def test_they_are_made_once_for_the_same_weights_and_pairs(
    setting: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, made = pairs(5), []

    def counted(*words: Any) -> Any:
        made.append(1)
        return load_reference(*words)

    monkeypatch.setattr(precomputed, "load_reference", counted)
    first = tables(setting, ARGS, [rows])[0].values.copy()
    # A loss, and the same rows by way of another data set, change nothing.
    setting.recipe.dpo.beta = 0.7
    again = tables(setting, ARGS, [pairs(9).select(range(5))])[0].values
    assert len(made) == 1 and np.array_equal(first, again)
    assert [line.split(" pairs ")[1].split(" (")[0] for line in setting.said] == ["computed", "in the cache"]
    tables(setting, ARGS, [rows.select([1, 0, 2, 3, 4])])
    assert len(made) == 2
    file = tmp_path / "model" / "model.safetensors"
    weights = load_file(file)
    save_file({name: weight * 1.01 for name, weight in weights.items()}, file, metadata={"format": "pt"})
    assert not np.array_equal(tables(setting, ARGS, [rows])[0].values, first)
    assert len(made) == 3


def test_nothing_is_left_of_what_was_stopped(setting: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stopped(*_: Any) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("sft_dist.dpo.reference.FullReference.log_probs", stopped)
        with pytest.raises(KeyboardInterrupt):
            tables(setting, ARGS, [pairs(5)])
    assert [path.suffix for path in (tmp_path / "cache" / "reference").iterdir()] == [".lock"]
    assert len(tables(setting, ARGS, [pairs(5)])[0].values)
