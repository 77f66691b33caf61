"""What writes the ranks' logs: times before lines, and no end of a training over a log."""

from __future__ import annotations

import re
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from launch import logstamp

SCRIPT = Path(logstamp.__file__)
STAMP = re.compile(rb"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z ")


def started(log: Path) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-I", "-S", str(SCRIPT), str(log)],
        stdin=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def until(is_so: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def read(log: Path) -> bytes:
    return log.read_bytes() if log.exists() else b""


def test_each_line_has_the_time_of_its_arrival(tmp_path: Path) -> None:
    log = tmp_path / "logs" / "rank0.log"
    before = logstamp.stamp_of(time.time())
    done = started(log)
    done.communicate("ein Wort\n\nbar 1\rbar 2\rbar 3\nnö\nno end".encode(), timeout=20)
    lines = log.read_bytes().split(b"\n")
    assert [STAMP.sub(b"", line, count=1).decode() for line in lines] == [
        "ein Wort", "", "bar 1\rbar 2\rbar 3", "nö", "no end",
    ]  # fmt: skip
    stamps = [STAMP.match(line)[0] for line in lines]  # type: ignore[index]
    stamps = [before, *stamps, logstamp.stamp_of(time.time())]
    assert stamps == sorted(stamps)
    assert log.stat().st_mode & 0o777 == 0o600
    assert log.parent.stat().st_mode & 0o777 == 0o700
    assert done.returncode == 0


def test_a_line_has_the_time_of_its_first_byte_and_one_stamp_only() -> None:
    stamper = logstamp.Stamper()
    assert stamper.add(b"half", 1.0) == b""
    assert stamper.add(b" a line\nnext", 2.5) == b"1970-01-01T00:00:01.000000Z half a line\n"
    assert stamper.rest() == b"1970-01-01T00:00:02.500000Z next"
    assert stamper.rest() == b""
    assert stamper.add(b" word", 3.0) == b""
    assert stamper.rest() == b" word"
    assert stamper.add(b"\nend\n", 4.0) == b"\n1970-01-01T00:00:04.000000Z end\n"
    assert not stamper.waits


def test_a_line_without_an_end_is_held_in_pieces_only() -> None:
    stamper = logstamp.Stamper()
    given = b"".join(stamper.add(b"x" * 50_000, 1.0) for _ in range(10)) + stamper.rest()
    assert STAMP.sub(b"", given, count=1) == b"x" * 500_000


def test_a_line_whose_end_does_not_come_can_be_read(tmp_path: Path) -> None:
    log = tmp_path / "rank0.log"
    process = started(log)
    assert process.stdin is not None
    process.stdin.write(b"loading ... ")
    process.stdin.flush()
    until(lambda: read(log).endswith(b"Z loading ... "))
    process.communicate(b"done\nnext\n", timeout=20)
    first, second, end = read(log).split(b"\n")
    assert STAMP.sub(b"", first) == b"loading ... done"
    assert STAMP.sub(b"", second) == b"next"
    assert end == b""


def test_a_line_that_a_killed_writer_left_is_ended(tmp_path: Path) -> None:
    log = tmp_path / "rank0.log"
    log.write_bytes(b"2026-11-25T17:01:02.123456Z torn")
    started(log).communicate(b"new\n", timeout=20)
    assert [STAMP.sub(b"", line) for line in read(log).split(b"\n")] == [b"torn", b"new", b""]


def test_signals_to_stop_do_not_cost_the_last_words(tmp_path: Path) -> None:
    log = tmp_path / "rank0.log"
    process = started(log)
    assert process.stdin is not None
    process.stdin.write(b"first\n")
    process.stdin.flush()
    until(lambda: b"first" in read(log))
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        process.send_signal(number)
    process.communicate(b"last words\n", timeout=20)
    assert process.returncode == 0
    assert read(log).endswith(b"last words\n")


def test_a_log_that_is_a_link_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "rank0.log").symlink_to(tmp_path / "elsewhere")
    process = started(tmp_path / "rank0.log")
    _, said = process.communicate(b"line\n" * 100_000, timeout=20)
    assert process.returncode == 0
    assert not (tmp_path / "elsewhere").exists()
    assert said.count(b"rank0.log cannot be written: ") == 1


def test_a_full_disk_loses_lines_and_says_so_when_it_is_over(tmp_path: Path) -> None:
    """RLIMIT_FSIZE stands for the disk: a write beyond it fails, the first one in its middle."""
    path = tmp_path / "rank0.log"
    log = logstamp.Log(str(path))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (40, hard))
        for line in (b"a" * 29 + b"\n", b"b" * 29 + b"\n", b"c" * 29 + b"\n"):
            log.write(line)
        assert log.owes
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)
    log.write(b"d\n")
    assert not log.owes
    first, torn, note, last, end = read(path).split(b"\n")
    assert (first, torn, last, end) == (b"a" * 29, b"b" * 10, b"d", b"")
    assert re.fullmatch(STAMP.pattern + rb"sft-dist: 50 bytes of this log are lost here: File too large", note)


def test_a_log_that_was_removed_is_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logstamp, "_RETRY_SECONDS", 0.0)
    log = logstamp.Log(str(tmp_path / "logs" / "rank0.log"))
    log.write(b"one\n")
    (tmp_path / "logs" / "rank0.log").unlink()
    (tmp_path / "logs").rmdir()
    log.write(b"two\n")
    assert read(tmp_path / "logs" / "rank0.log") == b"two\n"


def test_a_disk_that_does_not_answer_does_not_hold_up_the_worker() -> None:
    """The reader takes all there is, while the writer hangs in its first write."""
    answers = threading.Event()
    written: list[tuple[bytes, int]] = []

    class Hanging(logstamp.Log):
        def write(self, text: bytes, lost: int = 0) -> None:
            answers.wait(20)
            written.append((text, lost))

    queue = logstamp.Queue()
    writer = threading.Thread(target=logstamp.write, args=(queue, Hanging("unused")))
    writer.start()
    worker = subprocess.Popen(["head", "-c", str(40 << 20), "/dev/zero"], stdout=subprocess.PIPE)
    assert worker.stdout is not None
    logstamp.read(worker.stdout.fileno(), queue)
    assert worker.wait(20) == 0
    answers.set()
    writer.join(20)
    assert sum(len(text) + lost for text, lost in written) == (40 << 20) + len(logstamp.stamp_of(0))
    assert 20 << 20 < sum(lost for _, lost in written) < 40 << 20
    worker.stdout.close()


def test_more_than_can_be_held_is_counted() -> None:
    queue = logstamp.Queue()
    queue.put(b"x" * (16 << 20))
    queue.put(b"lost")
    queue.put(b"too")
    text, lost, is_closed = queue.take(0)
    assert (len(text), lost, is_closed) == (16 << 20, 7, False)
    queue.put(b"again")
    queue.close()
    assert queue.take(0) == (b"again", 0, True)
