"""Rows, accounts and refusals do not depend on how many processes prepare the data."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from sft_dist.data import pool
from sft_dist.errors import DataError
from tests.recipes import write_conversations
from tests.unit.test_prepare import prepared, recipe_for


@pytest.fixture(autouse=True)
def _many_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool, "PATIENCE", 0.0)
    monkeypatch.setattr(pool, "BATCH", 16)


def by(workers: int, file: Path, monkeypatch: pytest.MonkeyPatch, **data: Any) -> Any:
    monkeypatch.setenv("SFT_DIST_CACHE", str(file.parent / f"cache-{workers}"))
    return prepared(recipe_for(file, dataset_num_proc=workers, **data))[0]


def test_rows_are_the_same_and_in_the_same_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write_conversations(tmp_path / "a.jsonl", 1500)
    lines = file.read_text().splitlines()
    file.write_text("\n".join([*lines[:700], "{broken", *lines[700:], *lines[:40]]) + "\n")
    one, three = (by(n, file, monkeypatch, max_bad_records=1, deduplicate=True, min_response_length=4) for n in (1, 3))
    assert one.rows.to_list() == three.rows.to_list()
    assert asdict(one.account) == asdict(three.account)
    assert one.account.bad_count == 1 and one.account.duplicates == 40 and one.account.too_short_response > 0


def test_the_first_bad_record_is_the_one_that_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write_conversations(tmp_path / "a.jsonl", 600)
    lines = file.read_text().splitlines()
    for place in (250, 251, 500):
        lines[place] = "{broken"
    file.write_text("\n".join(lines) + "\n")
    said = []
    for workers in (1, 2):
        with pytest.raises(DataError) as refused:
            by(workers, file, monkeypatch)
        said.append(str(refused.value))
    assert said[0] == said[1]
    assert said[0].startswith(f"{file}:251: ")
