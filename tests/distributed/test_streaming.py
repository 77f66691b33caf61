"""`data.streaming`: the same blocks on any number of processes; how it goes on is in test_resume."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from sft_dist.data.stream import Folder, Layout, Position, Stream
from sft_dist.data.streaming import open_stream
from sft_dist.recipe import load_recipe
from tests import tiny
from tests.recipes import records, sft_dist, small_recipe, write_conversations

STREAM = ("data.streaming=true", "data.shuffle_buffer=10", "data.packing=true", "train.max_length=128",
          "train.max_steps=8", "eval.enabled=false")  # fmt: skip


def run(folder: Path, recipe: Path, *overrides: str) -> str:
    done = sft_dist(folder, "run", str(recipe), *STREAM, *overrides)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def close(a: list[dict[str, Any]], b: list[dict[str, Any]]) -> None:
    assert [row["step"] for row in a] == [row["step"] for row in b]
    for key in ("loss", "grad_norm"):
        assert [row[key] for row in a] == pytest.approx([row[key] for row in b], rel=1e-5), key


def test_a_stream_trains_the_same_on_any_number_of_processes(tmp_path: Path) -> None:
    recipe = small_recipe(tmp_path, tiny.save_model(tmp_path / "model"))
    one, two = (f"output.output_dir={tmp_path / name}" for name in ("one", "two"))
    said = run(tmp_path, recipe, one, "parallel.processes=1", "train.save_strategy=steps", "train.save_steps=3")
    assert "\nstream: blocks of 10 documents; the first has " in said
    run(tmp_path, recipe, two, "parallel.processes=2")
    whole = records(tmp_path / "one")
    assert len(whole) == 8
    close(whole, records(tmp_path / "two"))
    assert [row["num_trained_tokens"] for row in whole] == [
        row["num_trained_tokens"] for row in records(tmp_path / "two")
    ]
    # Nothing is left on the disk.
    assert not list((tmp_path / "cache" / "streams").iterdir())
    saved = json.loads((tmp_path / "one" / "checkpoints" / "checkpoint-3" / "stream.json").read_text())
    assert saved["row"] == 12
    assert 0 < saved["position"]["row"] <= 12


def test_other_data_than_those_of_the_checkpoint_are_refused(tmp_path: Path) -> None:
    recipe = small_recipe(tmp_path, tiny.save_model(tmp_path / "model"))
    run(tmp_path, recipe, "parallel.processes=1", "train.save_strategy=steps", "train.save_steps=4")
    write_conversations(tmp_path / "train.jsonl", 46, seed=5)
    done = sft_dist(tmp_path, "run", str(recipe), *STREAM, "parallel.processes=1", "output.resume=true")
    assert done.returncode == 2
    assert "data.dataset_name: the data are not those that " in done.stderr


def streamed_rows(stream: Stream, blocks: int) -> list[list[int]]:
    return [row for number in range(blocks) for row in stream.block(number).rows["input_ids"][:]]


def opened(folder: Path, monkeypatch: pytest.MonkeyPatch, *overrides: str, start: Position | None = None) -> Any:
    monkeypatch.setenv("SFT_DIST_CACHE", str(folder / "cache"))
    recipe = load_recipe(folder / "recipe.yaml", (*STREAM, *overrides))
    return open_stream(recipe, 128, Layout(128, 1), start or Position(), True, lambda: None)


def test_a_killed_producer_is_started_again_and_makes_the_same_blocks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small_recipe(tmp_path, tiny.save_model(tmp_path / "model"))
    stream, process = opened(tmp_path, monkeypatch)
    try:
        expected = []
        for number in range(6):
            stream.want(0, number)
            expected.append([ids.tolist() for ids in stream.block(number).rows["input_ids"][:]])
        assert len(expected[0]) == 10
    finally:
        process.stop()
    stream, process = opened(tmp_path, monkeypatch)
    try:
        stream.block(0)
        os.kill(process._process.pid, signal.SIGKILL)
        process._process.wait()
        for number in range(6):
            stream.want(0, number)
            assert [ids.tolist() for ids in stream.block(number).rows["input_ids"][:]] == expected[number]
        position = stream.block(2).after
    finally:
        process.stop()
    stream, process = opened(tmp_path, monkeypatch, start=position)
    try:
        assert [ids.tolist() for ids in stream.block(3).rows["input_ids"][:]] == expected[3]
        assert Folder(stream.folder.root).blocks()[0] == 3
    finally:
        process.stop()


def test_what_is_wrong_with_the_data_of_a_stream_is_one_line_on_all_ranks(tmp_path: Path) -> None:
    recipe = small_recipe(tmp_path, tiny.save_model(tmp_path / "model"))
    with open(tmp_path / "train.jsonl", "a") as file:
        file.write("{broken\n")
    done = sft_dist(tmp_path, "run", str(recipe), *STREAM, "parallel.processes=2")
    assert done.returncode == 2
    assert "train.jsonl:46: broken JSON" in done.stderr
    assert "Traceback" not in done.stderr
