"""The lock on a run's folder: one run at a time, and none kept out by a run that died."""

from __future__ import annotations

import json
import multiprocessing
import os
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.queues import SimpleQueue
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from sft_dist import runlock
from sft_dist.errors import UserError
from sft_dist.runlock import FILE_NAME, RunLock, refuse_if_alive
from tests.recipes import ROOT

LONG = 1e6
in_json = st.recursive(
    st.none() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner) | st.dictionaries(st.sampled_from(["host", "pid", "started", "token"]), inner),
).map(lambda value: json.dumps(value).encode())
linux = pytest.mark.skipif(not Path("/proc/self/ns/pid").exists(), reason="asks the kernel about other processes")
# Takes the lock of a folder, says so, and holds it until its input ends.
HOLD = """
import sys
from pathlib import Path
from sft_dist.runlock import RunLock
with RunLock(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""
# Dies just before it puts its lock in the place of a stale one.
DIE_TAKING_OVER = """
import os, sys
from pathlib import Path
from sft_dist.runlock import RunLock
os.replace = lambda *_: os._exit(9)
RunLock(Path(sys.argv[1])).acquire()
"""


def until(condition: Callable[[], object], seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.002)


def python(code: str, *words: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", code, *words], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )


@contextmanager
def holding(root: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that holds the lock of a folder."""
    with python(HOLD, str(root)) as process:
        try:
            assert process.stdout is not None and process.stdout.readline() == "held\n"
            yield process
        finally:
            process.kill()


def left_behind(root: Path, **changed: Any) -> Path:
    """The lock of a run of another process number, given no sign of life for an hour."""
    with RunLock(root):
        text = (root / FILE_NAME).read_text()
    path = root / FILE_NAME
    path.write_text(json.dumps(json.loads(text) | {"token": "theirs", **changed}))
    os.utime(path, (time.time() - 3600,) * 2)
    return path


def test_the_lock_says_who_holds_the_folder_and_is_gone_afterwards(tmp_path: Path) -> None:
    path = tmp_path / "new" / "run" / FILE_NAME
    with RunLock(path.parent, "sft-dist run r.yaml") as lock:
        held = json.loads(path.read_text())
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        assert lock.is_held() and lock.replaced is None
    assert held["pid"] == os.getpid() and held["command"] == "sft-dist run r.yaml"
    assert set(held) == {"host", "boot_id", "pid_namespace", "pid", "started", "token", "command", "since"}
    assert list(path.parent.iterdir()) == []
    assert not lock.is_held()
    lock.acquire()
    assert json.loads(path.read_text())["token"] != held["token"]
    lock.release()
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700


def test_a_second_run_is_refused_in_one_line_while_the_first_lives(tmp_path: Path) -> None:
    refuse_if_alive(tmp_path)
    refuse_if_alive(tmp_path / "none")
    with holding(tmp_path) as process:
        before = (tmp_path / FILE_NAME).read_bytes()
        for attempt in (lambda: refuse_if_alive(tmp_path), RunLock(tmp_path).acquire):
            with pytest.raises(UserError) as refused:
                attempt()
            head, _, tail = str(refused.value).partition(", last heard of ")
            host = json.loads(before)["host"]
            assert head == f"output.output_dir: {tmp_path} is in use by a run on {host} (pid {process.pid}"
            assert tail.partition(" s ago); ")[0].isdigit()
            assert tail.endswith(" s ago); wait for its end, stop it, or name another folder")
        assert (tmp_path / FILE_NAME).read_bytes() == before
        assert [path.name for path in tmp_path.iterdir()] == [FILE_NAME]
        process.communicate("")
        assert process.returncode == 0
    refuse_if_alive(tmp_path)
    with RunLock(tmp_path) as lock:
        assert lock.replaced is None


@linux
@pytest.mark.parametrize("reaped", [True, False], ids=["gone", "zombie"])
def test_the_lock_of_a_killed_run_is_taken_over_at_once(tmp_path: Path, reaped: bool) -> None:
    with holding(tmp_path) as process:
        process.kill()
        if reaped:
            process.wait()
        else:
            until(lambda: Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z")
        refuse_if_alive(tmp_path, stale_seconds=LONG)
        with RunLock(tmp_path, stale_seconds=LONG) as lock:
            assert lock.replaced is not None
            assert lock.replaced.endswith(f"(pid {process.pid}) ended without giving the folder back")
            assert lock.is_held()
            assert [path.name for path in tmp_path.iterdir()] == [FILE_NAME]


@linux
def test_a_process_that_got_the_number_of_a_dead_run_does_not_keep_its_folder(tmp_path: Path) -> None:
    left_behind(tmp_path, started=1)
    refuse_if_alive(tmp_path, stale_seconds=LONG)
    with RunLock(tmp_path, stale_seconds=LONG) as lock:
        assert lock.replaced is not None


@linux
def test_a_run_of_this_machine_is_alive_however_long_it_was_silent(tmp_path: Path) -> None:
    left_behind(tmp_path)
    with pytest.raises(UserError, match=rf"pid {os.getpid()}, last heard of 36\d\d s ago\); wait"):
        RunLock(tmp_path).acquire()


@pytest.mark.parametrize(
    "elsewhere",
    [{"host": "node7"}, {"boot_id": "another"}, {"pid_namespace": "pid:[1]"}, {"boot_id": None}, {"started": None}],
    ids=str,
)
def test_a_run_elsewhere_is_alive_while_it_is_heard_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, elsewhere: dict[str, Any]
) -> None:
    path = left_behind(tmp_path, pid=7, **elsewhere)
    heard = path.stat().st_mtime
    # By the clock of the file system: that of this machine is an hour ahead of it.
    monkeypatch.setattr(runlock, "_clock", lambda _: heard + 59)
    with pytest.raises(UserError, match=r"\(pid 7, last heard of 59 s ago\); wait for its end"):
        RunLock(tmp_path).acquire()
    with pytest.raises(UserError, match="in use"):
        refuse_if_alive(tmp_path)
    monkeypatch.setattr(runlock, "_clock", lambda _: heard + 61)
    refuse_if_alive(tmp_path)
    with RunLock(tmp_path) as lock:
        assert lock.replaced is not None
        assert lock.replaced.endswith("(pid 7) was last heard of 61 s ago and counts as ended")
        assert lock.is_held()


def test_the_clock_is_that_of_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(time, "time", lambda: 0.0)
    assert 0 <= runlock._clock(tmp_path) - (tmp_path / "file").stat().st_mtime < 60
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@settings(max_examples=60, deadline=None)
@given(st.binary(max_size=40) | in_json)
@example(b"")
@example(b"[" * 20_000)
@example(b'{"pid": ' + b"9" * 5000 + b"}")
def test_a_lock_that_cannot_be_read_is_judged_by_its_age(content: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        path = root / FILE_NAME
        path.write_bytes(content)
        with pytest.raises(UserError, match=r"in use by a run of unknown origin \(last heard of 0 s ago\); wait"):
            RunLock(root).acquire()
        assert path.read_bytes() == content
        os.utime(path, (0, 0))
        with RunLock(root) as lock:
            assert lock.replaced is not None and lock.replaced.endswith(" s ago and counts as ended")
        assert list(root.iterdir()) == []


@linux
@pytest.mark.parametrize("number", [0, -1, 2**62, 10**300])
def test_a_number_that_no_process_has_is_that_of_a_dead_run(tmp_path: Path, number: int) -> None:
    left_behind(tmp_path, pid=number)
    refuse_if_alive(tmp_path, stale_seconds=LONG)


def test_the_sign_of_life_goes_on_through_failures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, utime, failed = tmp_path / FILE_NAME, os.utime, []

    def fail(*_: object) -> None:
        failed.append(1)
        raise OSError(28, "No space left on device")

    with RunLock(tmp_path, heartbeat_seconds=0.002):
        utime(path, (0, 0))
        until(lambda: path.stat().st_mtime > 0)
        monkeypatch.setattr(os, "utime", fail)
        until(lambda: len(failed) > 2)
        utime(path, (0, 0))
        monkeypatch.setattr(os, "utime", utime)
        until(lambda: path.stat().st_mtime > 0)


def test_a_lock_that_is_anothers_by_now_is_neither_refreshed_nor_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, looks = tmp_path / FILE_NAME, []
    is_held = RunLock.is_held
    monkeypatch.setattr(RunLock, "is_held", lambda self: looks.append(is_held(self)) or looks[-1])
    with RunLock(tmp_path, heartbeat_seconds=0.002) as lock:
        until(lambda: looks)
        other = tmp_path / "other"
        other.write_text("theirs")
        os.utime(other, (0, 0))
        os.replace(other, path)
        looks.clear()
        until(lambda: len(looks) > 3)
        assert not lock.is_held()
    assert path.read_text() == "theirs" and path.stat().st_mtime == 0
    path.unlink()
    lock.release()


def test_a_forked_process_does_not_give_the_folder_back(tmp_path: Path) -> None:
    with RunLock(tmp_path) as lock:
        child = multiprocessing.get_context("fork").Process(target=lock.release)
        child.start()
        child.join()
        assert child.exitcode == 0 and lock.is_held()


def test_the_lock_stays_where_it_was_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "there").mkdir()
    monkeypatch.chdir(tmp_path)
    with RunLock(Path("run")) as lock:
        monkeypatch.chdir("there")
        assert lock.is_held()
    assert list((tmp_path / "run").iterdir()) == []


def test_a_folder_that_cannot_be_locked_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"^output\.output_dir: .*/file cannot be locked: File exists; mend that, or"):
        RunLock(tmp_path / "file").acquire()
    refuse_if_alive(tmp_path / "file")
    (tmp_path / FILE_NAME).mkdir()
    os.utime(tmp_path / FILE_NAME, (0, 0))
    with pytest.raises(UserError, match="cannot be locked: Is a directory"):
        RunLock(tmp_path).acquire()
    assert {path.name for path in tmp_path.iterdir()} == {"file", FILE_NAME}

    def full(descriptor: int, _: str) -> None:
        os.close(descriptor)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fdopen", full)
    with pytest.raises(UserError, match="cannot be locked: No space left on device"):
        RunLock(tmp_path / "new").acquire()
    assert list((tmp_path / "new").iterdir()) == []


@linux
def test_a_run_that_finds_a_stale_lock_too_late_does_not_replace_its_successor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    left_behind(tmp_path, started=1)
    rival, succeed = RunLock(tmp_path), runlock._succeed

    def overtaken(*arguments: Any) -> bool:
        monkeypatch.setattr(runlock, "_succeed", succeed)
        rival.acquire()
        return succeed(*arguments)

    monkeypatch.setattr(runlock, "_succeed", overtaken)
    with pytest.raises(UserError, match=f"in use by a run on .* \\(pid {os.getpid()}"):
        RunLock(tmp_path).acquire()
    assert rival.replaced is not None and rival.is_held()
    rival.release()
    assert list(tmp_path.iterdir()) == []


@linux
def test_a_run_that_lost_what_it_was_about_to_take_over_replaces_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when it was stopped for so long, just before the last step, that another machine gave it up."""
    left_behind(tmp_path, started=1)
    rival, replace = RunLock(tmp_path), os.replace

    def late(source: Path, target: Path) -> None:
        monkeypatch.setattr(os, "replace", replace)
        monkeypatch.setattr(runlock, "_start_time", lambda _: None)
        rival.acquire()
        monkeypatch.undo()
        replace(source, target)

    monkeypatch.setattr(os, "replace", late)
    with pytest.raises(UserError, match="in use"):
        RunLock(tmp_path).acquire()
    assert rival.is_held()
    assert [path.name for path in tmp_path.iterdir()] == [FILE_NAME]
    rival.release()


@linux
def test_a_death_while_taking_over_leaves_nothing_in_the_way(tmp_path: Path) -> None:
    left_behind(tmp_path, started=1)
    for _ in range(2):
        with python(DIE_TAKING_OVER, str(tmp_path)) as process:
            process.communicate("")
        assert process.returncode == 9
    assert len(list(tmp_path.iterdir())) > 1
    with RunLock(tmp_path, stale_seconds=LONG) as lock:
        assert lock.replaced is not None and lock.is_held()
        assert [path.name for path in tmp_path.iterdir()] == [FILE_NAME]


def race(roots: list[Path], start: Barrier, won: SimpleQueue[int]) -> None:
    for number, root in enumerate(roots):
        start.wait(60)
        try:
            # Held to the end of the process.
            RunLock(root, heartbeat_seconds=LONG).acquire()
        except UserError as error:
            assert " is in use by a run " in str(error)
        else:
            won.put(number)
    start.wait(60)


@linux
def test_of_processes_that_race_for_a_stale_lock_exactly_one_gets_it(tmp_path: Path) -> None:
    roots = [tmp_path / str(number) for number in range(60)]
    for number, root in enumerate(roots):
        left_behind(root, started=1, pid=number)
    context = multiprocessing.get_context("fork")
    start, won = context.Barrier(4), context.SimpleQueue()
    racers = [context.Process(target=race, args=(roots, start, won)) for _ in range(4)]
    for racer in racers:
        racer.start()
    for racer in racers:
        racer.join(60)
    assert [racer.exitcode for racer in racers] == [0] * 4
    winners = []
    while not won.empty():
        winners.append(won.get())
    assert sorted(winners) == list(range(60))


def test_the_lock_is_free_of_torch() -> None:
    with python("import sys, sft_dist.runlock; print(*sys.modules)") as process:
        assert not {"torch", "transformers", "numpy"} & set(process.communicate("")[0].split())
