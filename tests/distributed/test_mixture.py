"""`data.mixture`: exact proportions, and the loss and the tokens of each source, packed, streamed or neither."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from tests import tiny
from tests.recipes import records, sft_dist, small_recipe, write_conversations

MIXED = ("data.dataset_name=null", "data.mixture.many.dataset_name=many.jsonl", "data.mixture.many.weight=3",
         "data.mixture.few.dataset_name=few.jsonl", "data.mixture.few.weight=1", "eval.enabled=false")  # fmt: skip
WAYS = {
    "plain": (),
    "packed": ("data.packing=true", "train.max_length=256"),
    "streamed": ("data.streaming=true", "data.packing=true", "train.max_steps=5", "data.shuffle_buffer=16"),
}


@pytest.mark.parametrize("way", WAYS)
def test_sources_are_mixed_in_proportion_and_told_apart(tmp_path: Path, way: str) -> None:
    recipe = small_recipe(tmp_path, tiny.save_model(tmp_path / "model"))
    write_conversations(tmp_path / "many.jsonl", 30, seed=2)
    write_conversations(tmp_path / "few.jsonl", 8, seed=3)
    out = {number: tmp_path / f"on-{number}" for number in (1, 2)}
    for number, folder in out.items():
        done = sft_dist(tmp_path, "run", str(recipe), *MIXED, *WAYS[way], f"output.output_dir={folder}",
                        f"parallel.processes={number}", "train.num_train_epochs=1")  # fmt: skip
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        if way != "streamed":
            form = r"\nmixture: (\d+) documents an epoch: many .*? \((\d+) of 30 .*; few .*? \(8 of 8 "
            found = re.search(form, done.stdout)
            assert found is not None, done.stdout
            assert abs(int(found[2]) - 0.75 * int(found[1])) < 1
    first, second = records(out[1]), records(out[2])
    for key in ("loss", "loss/many", "loss/few"):
        told = [row[key] for row in first if key in row]
        assert told and told == pytest.approx([row[key] for row in second if key in row], rel=1e-5)
    last = first[-1]
    assert last["tokens/many"] + last["tokens/few"] == last["num_trained_tokens"]
    # The loss of all is the mean of the sources', by tokens.
    before = {"tokens/many": 0, "tokens/few": 0}
    for row in first:
        tokens = {name: row[f"tokens/{name}"] - before[f"tokens/{name}"] for name in ("many", "few")}
        whole = sum(count * row.get(f"loss/{name}", 0.0) for name, count in tokens.items()) / sum(tokens.values())
        assert whole == pytest.approx(row["loss"], rel=1e-5)
        before = row
    account = json.loads((out[1] / "summary.json").read_text())["data"]["train"]
    assert account["records"] >= 30
