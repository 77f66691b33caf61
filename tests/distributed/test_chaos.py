"""A short campaign of strikes (see tests/distributed/chaos): whatever hits a run, it ends as if nothing had."""

from __future__ import annotations

import re
import shutil
import sys
from pathlib import Path

import pytest

from tests.recipes import command

# Three strikes at one run: a damaged checkpoint, a folder that is read-only for a while, a killed rank.
SEED = 7482


@pytest.mark.skipif(shutil.which("unshare") is None, reason="needs unshare to mount small disks")
def test_struck_runs_end_as_undisturbed_ones(tmp_path: Path) -> None:
    words = ["--strikes", "3", "--each", "3", "--seed", str(SEED), "--strategies", "fsdp2"]
    module = [sys.executable, "-m", "tests.distributed.chaos", *words, "--folder", str(tmp_path / "chaos")]
    done = command(tmp_path, *module, limit=540)
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"^all +3 +3 +3 ", done.stdout, re.MULTILINE), done.stdout
