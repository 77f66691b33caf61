"""The logs of all ranks as one, the first error before them, and what comes while they are watched."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from launch import cli
from launch.logs import command, reading
from launch.logs.failure import first_failure
from launch.logs.places import over
from sft_dist.runlock import RunLock
from tests.slurm_runs import NOON, SlurmRun, fake_command, iso, stamped, traceback

REMOTE = "torch.distributed.DistBackendError: NCCL error: remote process exited or there was a network error"


@pytest.fixture
def run(tmp_path: Path) -> SlurmRun:
    return SlurmRun(tmp_path / "run")


@pytest.fixture(autouse=True)
def utc(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TZ", "UTC")
    time.tzset()


def printed(capsys: pytest.CaptureFixture[str], *words: str) -> list[str]:
    assert cli.main(["logs", *words]) == 0
    return capsys.readouterr().out.splitlines()


def bare(lines: list[str]) -> list[str]:
    """Lines without their time and the width of their label."""
    return [re.sub(r" +\|", " |", re.sub(r"^\d\d:\d\d:\d\d ", "", line)) for line in lines if " |" in line]


def write_traceback(run: SlurmRun, rank: int, at: float, *last: str, prefix: str = "") -> None:
    run.log(rank, *((at + n * 1e-4, prefix + line) for n, line in enumerate(traceback(*last))))


# One log out of many


def test_lines_stand_in_the_order_of_time_with_their_rank(run: SlurmRun, capsys: pytest.CaptureFixture[str]) -> None:
    run.log(0, (1, "first"), (3, "third"))
    run.log(11, (2, "second"), (4, "fourth"))
    assert printed(capsys, str(run.root)) == [
        "--- 2026-11-25, UTC+0000 ---",
        "17:00:01 rank 0     | first",
        "17:00:02 rank 11    | second",
        "17:00:03 rank 0     | third",
        "17:00:04 rank 11    | fourth",
    ]


def test_what_ranks_say_alike_is_said_once(run: SlurmRun, capsys: pytest.CaptureFixture[str]) -> None:
    for rank in (0, 1, 2, 5):
        run.log(rank, (1 + rank / 10, f"[rank{rank}]: loading"), (2 + rank / 10, f"I am {rank}"), (9, "far"))
    run.log(4, (15, "far"))
    assert bare(printed(capsys, str(run.root))) == [
        "ranks 0-2,5 | loading", *(f"rank {rank} | I am {rank}" for rank in (0, 1, 2, 5)), "ranks 0-2,5 | far",
        "rank 4 | far",
    ]  # fmt: skip


def test_folding_does_not_swap_the_lines_of_a_rank(run: SlurmRun, capsys: pytest.CaptureFixture[str]) -> None:
    run.log(0, (1.0, "a"), (1.1, "b"))
    run.log(1, (1.2, "b"), (1.3, "a"), (1.4, "a"))
    assert bare(printed(capsys, str(run.root))) == ["rank 0 | a", "ranks 0-1 | b", "rank 1 | a", "rank 1 | a"]


def test_tracebacks_are_not_torn_apart(run: SlurmRun, capsys: pytest.CaptureFixture[str]) -> None:
    for rank in (0, 1):
        write_traceback(run, rank, 1, f"ValueError: of {rank}")
        run.log(rank, (1.0005, "after"))
    block = traceback("ValueError: of ")
    assert bare(printed(capsys, str(run.root))) == [
        *(f"rank 0 | {line}{'0' * line.startswith('V')}" for line in block),
        *(f"rank 1 | {line}{'1' * line.startswith('V')}" for line in block),
        "ranks 0-1 | after",
    ]


def test_lines_without_a_time_belong_to_the_line_before(run: SlurmRun, capsys: pytest.CaptureFixture[str]) -> None:
    path = run.root / "logs" / "rank0.log"
    path.write_text("of a local run\n" + stamped((1, "one")) + "more of one\n" + stamped((3, "three")))
    run.log(1, (2, "two"))
    assert bare(printed(capsys, str(run.root))) == [
        "rank 0 | of a local run", "rank 0 | one", "rank 0 | more of one", "rank 1 | two", "rank 0 | three",
    ]  # fmt: skip


def test_a_local_runs_logs_follow_one_another_whole(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    logs = tmp_path / "logs"
    logs.mkdir()
    (logs / "rank1.log").write_text("a\nb\n")
    (logs / "rank10.log").write_text("e\n")
    (logs / "rank2.log").write_text("c\nd")
    assert bare(printed(capsys, str(tmp_path))) == [
        "rank 1 | a", "rank 1 | b", "rank 2 | c", "rank 2 | d", "rank 10 | e",
    ]  # fmt: skip


def test_nothing_in_a_log_acts_on_the_terminal(run: SlurmRun, capsys: pytest.CaptureFixture[str]) -> None:
    path = run.log(
        0, (1, "\x1b[31mred\x1b[0m \x1b]0;title\x07x\x1b[2J \x07\x9b[ \u202e"), (2, " 1%\r 50%\r99%"), (3, "dos\r")
    )
    path.write_bytes(path.read_bytes() + stamped((4, ""))[:-1].encode() + b"\xff\xfe\n")
    assert bare(printed(capsys, str(run.root))) == [
        "rank 0 | red x ⟪U+0007⟫⟪U+009B⟫[ ⟪U+202E⟫", "rank 0 | 99%", "rank 0 | dos", "rank 0 | \ufffd\ufffd",
    ]  # fmt: skip


def test_the_jobs_own_output_and_its_attempts_are_part_of_it(run: SlurmRun, capsys: pytest.CaptureFixture[str]) -> None:
    run.start(0)
    run.log(0, (1, "line"))
    run.end(2, "requeue", "time limit", code=75, step=7)
    run.start(9, restart=1, step=5)
    (run.root / "slurm" / "123_0_log.out").write_text("srun: error\n")
    assert bare(printed(capsys, str(run.root))) == [
        "job | srun: error", "run | attempt 1 of job 123 begins on n0, n1", "rank 0 | line",
        "run | attempt 1 of job 123 has ended at step 7: time limit; back into the queue",
        "run | attempt 2 of job 123 begins on n0, n1 from step 5",
    ]  # fmt: skip
    assert bare(printed(capsys, str(run.root), "--rank", "0")) == ["rank 0 | line"]


def test_only_the_end_is_shown_unless_all_is_asked_for(run: SlurmRun, capsys: pytest.CaptureFixture[str]) -> None:
    run.log(0, *((n, f"line {n}") for n in range(300)))
    run.log(1, *((n + 0.5, f"line {n}.5") for n in range(300)))
    shown = printed(capsys, str(run.root))
    assert shown[0] == "--- the last 100 lines; --lines all shows all of them ---"
    assert bare(shown)[0] == "rank 0 | line 250" and len(bare(shown)) == 100
    assert bare(printed(capsys, str(run.root), "--lines", "3"))[0] == "rank 1 | line 298.5"
    assert len(bare(printed(capsys, str(run.root), "--lines", "all"))) == 600
    assert len(bare(printed(capsys, str(run.root), "--rank", "1", "--lines", "1000"))) == 300


def test_from_a_time_on(run: SlurmRun, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    run.log(0, *((n, f"line {n}") for n in range(10_000)))
    shown = bare(printed(capsys, str(run.root), "--since", iso(9900)))
    assert shown[0] == "rank 0 | line 9900" and len(shown) == 100
    monkeypatch.setattr(time, "time", lambda: NOON + 10_000)
    assert bare(printed(capsys, str(run.root), "--since", "2m"))[0] == "rank 0 | line 9880"


def test_a_large_log_is_not_read_from_its_beginning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "rank0.log"
    path.write_text(stamped(*((n / 10, "x" * 80) for n in range(50_000))))
    monkeypatch.setattr(reading, "_CHUNK", 1 << 12)
    offset = reading.since(path, NOON + 4000)
    found = next(reading.LogReader(path, 0, offset).units(final=True))
    assert found.at is not None and NOON + 3990 < found.at <= NOON + 4000
    offset = reading.last_lines(path, 7)
    assert path.stat().st_size - offset == 7 * len(stamped((0, "x" * 80)))
    assert reading.last_lines(path, 10**6) == 0


def test_a_line_of_any_length_is_held_in_part_only(tmp_path: Path) -> None:
    path = tmp_path / "rank0.log"
    path.write_bytes(b"y" * 1_000_000 + b"\nnext\n" + b"\r".join(b"%d%%" % n for n in range(200_000)) + b"\nend\n")
    units = list(reading.LogReader(path, 0).units(final=True))
    assert [len(unit.lines[0]) < 140_000 for unit in units] == [True] * 4
    assert [unit.lines[0] for unit in units[1:]] == ["next", "199999%", "end"]


# The first error


def test_the_exception_that_the_others_follow_from_is_shown_first(
    run: SlurmRun, capsys: pytest.CaptureFixture[str]
) -> None:
    run.start(0)
    write_traceback(run, 3, 6, "ValueError: a row of no length", "and what it says further")
    for rank in (0, 1):
        write_traceback(run, rank, 6.5, REMOTE, prefix=f"[rank{rank}]: ")
        run.rank(rank, 1, 6.6)
    run.rank(3, 1, 7)
    run.rank(2, -15, 9, stopped=True)
    failure = first_failure(run.root)
    assert failure is not None and failure.summary == "ValueError: a row of no length"
    shown = printed(capsys, str(run.root))
    assert shown[0] == (
        "first error: rank 3 on n1, 2026-11-25 17:00:07: ended with exit code 1; 2 more failed after it"
    )
    assert shown[1:6] == [
        f"  {line}" for line in traceback("ValueError: a row of no length", "and what it says further")
    ]


@pytest.mark.parametrize(
    ("codes", "blamed"),
    [
        ({0: (1, 5.0), 1: (-9, 6.0)}, 0),
        ({0: (1, 6.0), 1: (-9, 5.0)}, 1),
        ({0: (2, 4.0), 1: (1, 5.0)}, 1),
        ({0: (75, 4.0), 1: (-11, 5.0)}, 1),
        ({0: (2, 4.0), 1: (75, 5.0)}, 0),
        ({0: (0, 4.0), 1: (None, None), 2: (1, 5.0)}, 2),
        ({0: (75, 4.0), 3: (75, 3.0)}, 3),
    ],
)
def test_who_is_to_blame(run: SlurmRun, codes: dict[int, tuple[int | None, float | None]], blamed: int) -> None:
    run.start(0)
    for rank, (code, ended) in codes.items():
        run.rank(rank, code, ended)
    failure = first_failure(run.root)
    assert failure is not None and failure.rank == blamed


def test_a_lost_peer_is_never_to_blame_while_there_is_another(run: SlurmRun) -> None:
    run.start(0)
    for rank, words in enumerate(
        (REMOTE, "RuntimeError: [../gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:3",
         "RuntimeError: Broken pipe")
    ):  # fmt: skip
        write_traceback(run, rank, 1 + rank, words)
        run.rank(rank, 1, 1.5 + rank)
    run.log(3, (9, "sft-dist: output.output_dir: no space left on the device; free some"))
    run.rank(3, 2, 9)
    failure = first_failure(run.root)
    assert failure is not None
    assert (failure.rank, failure.summary) == (3, "sft-dist: output.output_dir: no space left on the device; free some")


def test_a_rank_that_could_not_even_say_so_is_to_blame_for_lost_peers(run: SlurmRun) -> None:
    """Its node is gone, and with it whoever writes how its ranks ended."""
    run.start(0)
    for rank in (0, 1):
        write_traceback(run, rank, 6, REMOTE)
        run.rank(rank, 1, 6.5)
    for rank in (2, 3):
        run.log(rank, (5, "step 7/9"))
        run.rank(rank, None)
    failure = first_failure(run.root)
    assert failure is not None and failure.rank == 0
    run.end(9, "requeue", "a node was lost")
    failure = first_failure(run.root)
    assert failure is not None
    assert (failure.rank, failure.node, failure.code, failure.words) == (2, "n1", None, ("step 7/9",))


def test_the_last_lines_of_a_rank_that_was_killed_are_no_reason(
    run: SlurmRun, capsys: pytest.CaptureFixture[str]
) -> None:
    run.start(0)
    write_traceback(run, 2, 1, "ValueError: that it got over")
    run.log(2, (5, "step 7/9"))
    run.rank(2, -9, 6)
    failure = first_failure(run.root)
    assert failure is not None and failure.summary == "its last line: step 7/9"
    shown = printed(capsys, str(run.root))
    assert shown[0] == "first error: rank 2 on n1, 2026-11-25 17:00:06: was killed by SIGKILL (often: out of memory)"
    assert shown[1] == "its last lines, which may have nothing to do with it:"


def test_of_several_attempts_the_newest_counts(run: SlurmRun) -> None:
    run.start(0)
    write_traceback(run, 0, 1, "ValueError: old")
    run.rank(0, 1, 2)
    run.start(100, restart=1)
    assert first_failure(run.root) is None
    write_traceback(run, 1, 101, "ValueError: new")
    run.rank(1, 1, 102, restart=1)
    failure = first_failure(run.root)
    assert failure is not None and failure.summary == "ValueError: new"


def test_ranks_that_stopped_in_order_have_not_failed(run: SlurmRun) -> None:
    run.start(0)
    run.rank(0, 75, 5, stopped=True)
    run.rank(1, -15, 6, stopped=True)
    run.rank(2, 140, 6, stopped=True)
    assert first_failure(run.root) is None
    run.rank(3, -9, 9, stopped=True)
    failure = first_failure(run.root)
    assert failure is not None
    assert (failure.rank, failure.cause) == (3, "did not end in time when it was told to stop, and was killed")


# Watching


def until(is_so: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_following_goes_over_restarts_and_new_ranks_to_the_end(
    run: SlurmRun, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command, "_POLL_SECONDS", 0.01)
    said: list[str] = []

    def seen(text: str) -> bool:
        said.append(capsys.readouterr().out)
        return text in "".join(said)

    run.start(0)
    log = run.log(0, (1, "first"))
    watcher = threading.Thread(target=command.show, args=(str(run.root),), kwargs={"follow": True})
    watcher.start()
    until(lambda: seen("| first"))
    log.write_bytes(log.read_bytes() + stamped((2, "loading ...")).strip().encode())
    until(lambda: seen("| loading ..."))
    run.end(3, "requeue", "preempted")
    run.start(4, restart=1)
    run.log(1, (5, "of a new rank"))
    until(lambda: seen("| of a new rank"))
    write_traceback(run, 1, 6, "ValueError: at last")
    run.rank(1, 1, 7, restart=1)
    run.end(8, "stop", "failed at the same step", restart=1)
    watcher.join(20)
    assert not watcher.is_alive()
    assert seen("first error: rank 1 on n0")
    lines = bare("".join(said).splitlines())
    assert lines == [
        "run | attempt 1 of job 123 begins on n0, n1", "rank 0 | first", "rank 0 | loading ...",
        "run | attempt 1 of job 123 has ended at step 0: preempted; back into the queue",
        "run | attempt 2 of job 123 begins on n0, n1", "rank 1 | of a new rank",
        *(f"rank 1 | {line}" for line in traceback("ValueError: at last")),
        "run | attempt 2 of job 123 has ended at step 0: failed at the same step; stopped",
    ]  # fmt: skip


def test_following_ends_when_the_job_is_gone_without_a_word(
    run: SlurmRun, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_command(
        tmp_path / "bin", monkeypatch, "scontrol", "echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1"
    )
    monkeypatch.setattr(command, "_POLL_SECONDS", 0.01)
    monkeypatch.setattr(command, "_ASK_SECONDS", 0.0)
    run.start(0)
    run.log(0, (1, "first"))
    assert "the run has ended" in printed(capsys, str(run.root), "--follow")[-1]


def test_a_cancelled_run_is_watched_until_it_has_ended(run: SlurmRun, monkeypatch: pytest.MonkeyPatch) -> None:
    run.at.cancelled.touch()
    assert over(run.root)
    run.start(0)
    assert not over(run.root)
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + 600)
    assert over(run.root)
    monkeypatch.undo()
    run.end(9, "stop", "cancelled", code=75)
    assert over(run.root)


def test_a_run_that_is_trained_is_watched_until_its_job_has_said_so(
    run: SlurmRun, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run.start(0)
    (run.root / "summary.json").write_text("{}")
    assert not over(run.root)
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + 600)
    assert over(run.root)
    monkeypatch.undo()
    run.end(60, "done", "done", code=0, step=120)
    assert over(run.root)
    assert bare(printed(capsys, str(run.root)))[-1] == "run | attempt 1 of job 123 has ended at step 120: done"


def test_a_local_run_is_over_when_nobody_holds_it(tmp_path: Path) -> None:
    (tmp_path / "logs").mkdir()
    assert over(tmp_path)
    with RunLock(tmp_path):
        assert not over(tmp_path)


# Words that make no sense


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--rank", "x"], "--rank: 'x' is no rank; write 3, 0-7 or 0,3"),
        (["--rank", "7-3"], "--rank: '7-3' is no rank"),
        (["--rank", "0,9"], "has no log of rank 9; there are those of ranks 0"),
        (["--since", "yesterday"], "--since: 'yesterday' is no time; write 90s, 10m, 2h, 1d, or a time such as"),
        (["--lines", "0"], "--lines: '0' is no number of lines; write 1 or more, or all"),
    ],
)
def test_words_that_make_no_sense_are_one_line(
    run: SlurmRun, words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    run.log(0, (1, "line"))
    assert cli.main(["logs", str(run.root), *words]) == 2
    assert said in capsys.readouterr().err


def test_what_is_no_run_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["logs", str(tmp_path)]) == 2
    assert f"RUN: {tmp_path} holds no recipe.yaml, logs or slurm; name a run's folder" in capsys.readouterr().err


def test_a_run_without_logs_says_so(run: SlurmRun, capsys: pytest.CaptureFixture[str]) -> None:
    assert "has no logs yet: its job has not begun" in printed(capsys, str(run.root))[0]
