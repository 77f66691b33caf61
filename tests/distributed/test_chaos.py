"""A short campaign of strikes (see tests/distributed/chaos): whatever hits a run, it ends as if nothing had."""

from __future__ import annotations

import re
import shutil
import sys
from pathlib import Path

import pytest

from tests.recipes import command

# Three strikes at each of two runs: a damaged checkpoint, a folder that is read-only for a while, a killed rank; all
# processes killed in an evaluation, a disk that is full for a while, and a signal when the last step is done.
SEED = 7482


@pytest.mark.skipif(shutil.which("unshare") is None, reason="needs unshare to mount small disks")
def test_struck_runs_end_as_undisturbed_ones(tmp_path: Path) -> None:
    words = ["--strikes", "6", "--each", "3", "--seed", str(SEED), "--strategies", "ddp,fsdp2"]
    module = [sys.executable, "-m", "tests.distributed.chaos", *words, "--folder", str(tmp_path / "chaos")]
    done = command(tmp_path, *module, limit=540)
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"^all +6 +6 +6 ", done.stdout, re.MULTILINE), done.stdout
