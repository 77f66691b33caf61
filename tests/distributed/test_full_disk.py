"""A full disk ends a run with one line, and what was written before stays whole."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest

from tests import tiny
from tests.recipes import command, small_recipe


@pytest.mark.skipif(shutil.which("unshare") is None, reason="needs unshare to mount a small disk")
@pytest.mark.parametrize("room", ["600k", "4k"])
def test_a_full_disk_is_one_line(tmp_path: Path, room: str) -> None:
    """The folder of the run is on a disk with room for half of the model (or none), filled while it trains."""
    recipe = small_recipe(tmp_path, tiny.save_model(tmp_path / "base", layers=4), records=8)
    run = tmp_path / "run"
    run.mkdir()
    words = [sys.executable, "-m", "sft_dist", str(recipe), "parallel.processes=1", "train.report_to=none"]
    script = f'mount -t tmpfs -o size={room} disk {run} && "$@"; code=$?; cp -r {run} {tmp_path}/kept; exit $code'
    done = command(tmp_path, "unshare", "--mount", "--map-root-user", "sh", "-c", script, "sh", *words)
    assert done.returncode == 2, done.stdout + done.stderr
    faults = [line for line in done.stderr.splitlines() if line.startswith("sft-dist: ")]
    assert len(faults) == 1, done.stderr
    assert faults[0].startswith("sft-dist: output.output_dir: ")
    assert "No space left on device" in faults[0] or "no space left" in faults[0]
    assert "Traceback" not in done.stderr
    kept = tmp_path / "kept"
    assert not (kept / "model").exists()
    if room != "4k":
        json.loads((kept / "environment.json").read_text())
        assert (kept / "metrics.jsonl").exists()


@pytest.mark.skipif(shutil.which("unshare") is None, reason="needs unshare to mount a small disk")
def test_a_disk_too_small_for_the_prepared_rows_is_one_line(tmp_path: Path) -> None:
    """The cache is on a disk with room for a part of the rows; nothing of them is left there."""
    recipe = small_recipe(tmp_path, tiny.save_model(tmp_path / "base"), records=4000)
    cache = tmp_path / "small"
    cache.mkdir()
    words = [sys.executable, "-m", "sft_dist", str(recipe), "parallel.processes=1", "train.report_to=none"]
    script = f'mount -t tmpfs -o size=500k disk {cache} && "$@"; code=$?; cp -r {cache} {tmp_path}/kept; exit $code'
    done = command(
        tmp_path, "unshare", "--mount", "--map-root-user", "sh", "-c", script, "sh", *words, SFT_DIST_CACHE=str(cache)
    )
    assert done.returncode == 2, done.stdout + done.stderr
    faults = [line for line in done.stderr.splitlines() if line.startswith("sft-dist: ")]
    assert len(faults) == 1, done.stderr
    assert faults[0].startswith(f"sft-dist: {cache}: no space left on the device for the prepared rows")
    assert "SFT_DIST_CACHE" in faults[0] and "Traceback" not in done.stderr
    assert [file for file in (tmp_path / "kept" / "rows").iterdir() if file.suffix != ".lock"] == []


@pytest.mark.skipif(shutil.which("unshare") is None, reason="needs unshare to mount a small disk")
def test_logs_on_a_full_disk_do_not_end_a_run(tmp_path: Path) -> None:
    """Neither what rank 0 prints, nor the log of another rank."""
    recipe = small_recipe(tmp_path, tiny.save_model(tmp_path / "base"), records=12)
    logs = tmp_path / "run" / "logs"
    logs.mkdir(parents=True)
    words = [sys.executable, "-m", "launch.cli", "run", str(recipe), "parallel.processes=2", "train.report_to=none"]
    # No byte is left for the log of rank 1.
    script = f"mount -t tmpfs -o size=4k disk {logs} && head -c 4096 /dev/zero >{logs}/rank1.log"
    script += ' && exec "$@" >/dev/full 2>&1'
    done = command(tmp_path, "unshare", "--mount", "--map-root-user", "sh", "-c", script, "sh", *words)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run" / "model" / "model.safetensors").exists()
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["steps"] > 0


def test_a_run_that_stops_can_go_on_though_it_cannot_say_so(tmp_path: Path) -> None:
    """The exit code does not hang on a line for people."""
    for act in ("raise Stopped('no space', agreed=True)", "leave_at_once('no space')"):
        code = (
            "import sys\nfrom sft_dist.process import guarded, outlive_full_logs\n"
            f"from sft_dist.stopping import Stopped, leave_at_once\ndef work():\n    {act}\n"
            "outlive_full_logs()\nsys.exit(guarded(work))\n"
        )
        shell = ["sh", "-c", 'exec "$@" >/dev/full 2>&1', "sh", sys.executable, "-u", "-c", code]
        assert command(tmp_path, *shell).returncode == 75
