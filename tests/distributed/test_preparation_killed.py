"""A preparation that is killed, as a whole or one of its processes, leaves nothing that is taken for whole."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.recipes import ROOT, write_conversations

PREPARE = """
import sys
from sft_dist.data import pool
pool.PATIENCE, pool.BATCH = 0.0, 32
from tests.unit.test_prepare import prepared, recipe_for
train, _ = prepared(recipe_for(sys.argv[1], dataset_num_proc=2))
print(len(train.rows), train.account.tokens, hash(tuple(map(tuple, train.rows["input_ids"][:]))))
"""
LIMIT = 90.0  # seconds


def start(file: Path, cache: Path) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "SFT_DIST_CACHE": str(cache), "PYTHONHASHSEED": "0"}
    return subprocess.Popen([sys.executable, "-c", PREPARE, str(file)], env=environment, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE)  # fmt: skip


def helpers_of(pid: int) -> list[int]:
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:
        return []
    return [int(child) for child in children if b"pool_helper" in _command(int(child))]


def _command(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


def wait_for(condition: object) -> None:
    assert callable(condition)
    until = time.monotonic() + LIMIT
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.01)


def has_written(cache: Path, size: int, process: subprocess.Popen[str]) -> bool:
    """So many bytes of rows, or the end."""
    sizes = []
    for file in cache.glob("rows/*/rows.arrow"):
        try:
            sizes.append(file.stat().st_size)
        except OSError:
            continue
    return process.poll() is not None or max(sizes, default=0) >= size


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, int]:
    """A file, what an undisturbed preparation prints of it, and the bytes of its rows."""
    folder = tmp_path_factory.mktemp("corpus")
    file = write_conversations(folder / "a.jsonl", 4000)
    process = start(file, folder / "cache")
    out, error = process.communicate(timeout=LIMIT)
    assert process.returncode == 0, error
    (rows,) = (folder / "cache").glob("rows/*/rows.arrow")
    return file, out, rows.stat().st_size


def test_killed_at_any_moment_the_next_start_makes_the_same_rows(
    corpus: tuple[Path, str, int], tmp_path: Path
) -> None:  # fmt: skip
    file, expected, size = corpus
    draw = random.Random(1)
    for moment in (0, *(draw.randrange(size) for _ in range(4))):
        cache = tmp_path / str(moment)
        process = start(file, cache)
        wait_for(lambda cache=cache, moment=moment, process=process: has_written(cache, moment, process))
        helpers = helpers_of(process.pid)
        process.kill()
        process.communicate(timeout=LIMIT)
        # Nobody has to end them.
        wait_for(lambda helpers=helpers: not any(b"pool_helper" in _command(pid) for pid in helpers))
    again = start(file, cache)
    out, error = again.communicate(timeout=LIMIT)
    assert (again.returncode, out) == (0, expected), error
    assert not list(cache.glob("rows/*.unfinished"))


def test_a_helper_that_is_killed_is_one_line_and_the_next_start_succeeds(
    corpus: tuple[Path, str, int], tmp_path: Path
) -> None:  # fmt: skip
    file, expected, _ = corpus
    process = start(file, tmp_path / "cache")
    wait_for(lambda: helpers_of(process.pid) or process.poll() is not None)
    os.kill(helpers_of(process.pid)[0], signal.SIGKILL)
    _, error = process.communicate(timeout=LIMIT)
    assert process.returncode != 0
    assert "UserError" in error.splitlines()[-1], error
    assert not list((tmp_path / "cache").glob("rows/*/rows.arrow"))
    again = start(file, tmp_path / "cache")
    assert again.communicate(timeout=LIMIT)[0] == expected
