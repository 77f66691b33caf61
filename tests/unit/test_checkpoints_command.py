"""`sft-dist checkpoints` says which there are, which are sound, and what a run would do with them."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from launch import cli
from sft_dist.runlock import RunLock
from tests.checkpoints import turn_a_bit, write_checkpoint, write_run
from tests.recipes import ROOT


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Sound at 10 to 30, of which 20 is the best; 40 damaged within, one set aside, one half written."""
    measured = {"eval_strategy": "steps", "eval_steps": 10}
    run = write_run(tmp_path / "run", checkpoint={"metric_for_best_model": "eval_loss"}, train=measured)
    for step, loss in ((10, 2.5), (20, 2.125), (30, 2.25), (40, 1.0)):
        write_checkpoint(run, step, metrics={"eval_loss": loss}, strategy="zero3_offload", world_size=16)
    write_checkpoint(run, 5, world_size=4)
    os.utime(run / "checkpoints" / "checkpoint-10" / "manifest.json", (1.7e9, 1.7e9))
    turn_a_bit(run / "checkpoints" / "checkpoint-40" / "rank-00003.safetensors")
    (run / "checkpoints" / "checkpoint-5" / "rank-00001.safetensors").unlink()
    (run / "checkpoints" / "checkpoint-5").rename(run / "checkpoints" / "checkpoint-5.damaged")
    (run / "checkpoints" / "checkpoint-50.unfinished").mkdir()
    (run / "checkpoints" / "checkpoint-50.unfinished" / "rank-00000.safetensors").write_bytes(b"12345")
    return run


def listed(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    """What the command prints, which ends with 0."""
    capsys.readouterr()
    assert cli.main(["checkpoints", *map(str, words)]) == 0
    return capsys.readouterr().out


def as_json(capsys: pytest.CaptureFixture[str], *words: object) -> dict[str, Any]:
    """The same as JSON."""
    found: dict[str, Any] = json.loads(listed(capsys, *words, "--json"))
    return found


def row(text: str, step: int) -> str:
    """The line of a step in the table."""
    return next(line for line in text.splitlines() if re.match(rf"[>* ]* {step} +[cdu]", line))


def test_a_table_that_fits_80_columns(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = listed(capsys, run)
    table = text[: text.index("\n\n")].splitlines()
    assert max(map(len, table)) <= 80
    steps = [int(found[1]) for line in table if (found := re.match(r"[>* ]*?(\d+) ", line))]
    assert steps == [5, 10, 20, 30, 40, 50]
    for cell in ("complete", "1.23M", "16 x zero3_offload", "2023-11-", "2.5000"):
        assert cell in row(text, 10)
    assert row(text, 20).startswith("*") and row(text, 30).startswith(">")
    assert "damaged" in row(text, 5) and "damaged" in row(text, 40) and "unfinished" in row(text, 50)


def test_what_is_wrong_stands_on_a_line_that_names_the_file(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = listed(capsys, run).splitlines()
    assert "checkpoint-40: rank-00003.safetensors is damaged: its checksum is another" in lines
    assert "checkpoint-5.damaged: rank-00001.safetensors: No such file or directory; set aside" in lines
    assert [line for line in lines if line.startswith("checkpoint-50.unfinished: not written to the end")]


def test_the_last_line_says_what_a_resume_takes(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    held = sum(file.stat().st_size for file in (run / "checkpoints").glob("*/*"))
    *_, best, last = listed(capsys, run).splitlines()
    assert last == f"6 checkpoints, {held:,} bytes; > `output.resume=true` goes on from checkpoint-30"
    assert best == "* the best eval_loss: checkpoint-20 (2.1250)"


def test_quick_does_not_read_the_contents(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = listed(capsys, run, "--quick")
    assert "complete" in row(text, 40) and row(text, 40).startswith(">*")
    assert text.endswith("goes on from checkpoint-40 where its contents are sound, which were not read\n")
    turn_a_bit(run / "checkpoints" / "checkpoint-40" / "manifest.json")
    (run / "checkpoints" / "checkpoint-30" / "common.json").write_text("short")
    quick = as_json(capsys, run, "--quick")
    assert [each["state"] for each in quick["checkpoints"]] == [
        "damaged", "complete", "complete", "damaged", "damaged", "unfinished"
    ]  # fmt: skip
    assert quick["contents_read"] is False and quick["newest"] == 20


def test_json_says_the_same(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = as_json(capsys, run)
    assert (found["newest"], found["best"], found["metric"], found["alive"]) == (30, 20, "eval_loss", None)
    assert found["bytes"] == sum(each["bytes"] for each in found["checkpoints"])
    ten = found["checkpoints"][1]
    assert ten["written"] == "2023-11-14T22:13:20+00:00" and ten["metrics"] == {"eval_loss": 2.5}
    assert (ten["step"], ten["state"], ten["fault"]) == (10, "complete", None)
    assert (ten["trained_tokens"], ten["world_size"], ten["strategy"]) == (1_234_567, 16, "zero3_offload")
    assert "rank-00003" in found["checkpoints"][4]["fault"]


def test_the_folder_of_checkpoints_is_named_as_well(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = listed(capsys, run)
    assert listed(capsys, run / "checkpoints") == whole
    monkeypatch.chdir(run / "checkpoints")
    assert listed(capsys, ".") == whole


def test_a_run_without_any(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write_run(tmp_path / "run")
    text = listed(capsys, run)
    assert text == "0 checkpoints, 0 bytes; there is none that `output.resume=true` could go on from\n"
    (run / "checkpoints").rmdir()
    assert listed(capsys, run) == text


def test_a_living_run_is_told_of(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with RunLock(run):
        text = listed(capsys, run)
        assert as_json(capsys, run)["alive"]
    assert f"{run} is in use by a run on" in text and "; what is unfinished is being written" in text
    assert "removed when the run is started again" not in text
    assert "in use" not in listed(capsys, run)


def test_a_recipe_that_cannot_be_read_leaves_the_best_out(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run / "recipe.yaml").write_text("stage: of_another_version\n")
    found = as_json(capsys, run)
    assert found["newest"] == 30 and found["best"] is None


def test_files_of_one_node_are_told_as_such(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write_run(tmp_path / "run")
    write_checkpoint(run, 3, nodes=2)
    assert "these are the files of one of 2 nodes" in listed(capsys, run)


@pytest.mark.parametrize("name", ["empty", "nothing-here"])
def test_a_folder_that_is_no_run_is_one_line(tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").mkdir()
    assert cli.main(["checkpoints", str(tmp_path / name)]) == 2
    said = capsys.readouterr().err
    what = "holds no recipe.yaml and no checkpoints" if name == "empty" else "is no folder"
    assert said == f"sft-dist: RUN: {tmp_path / name} {what}; name a run's folder\n"


@pytest.mark.parametrize("words", [[], ["--json"]])
def test_a_reader_that_has_seen_enough_is_no_fault(run: Path, words: list[str]) -> None:
    command = [sys.executable, "-m", "launch.cli", "checkpoints", str(run), *words]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as started:
        assert started.stdout is not None and started.stderr is not None
        started.stdout.close()
        assert started.stderr.read() == ""
    assert started.returncode == 0
