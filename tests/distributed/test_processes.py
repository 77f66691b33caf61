"""The processes of a run live and die together, and the run's exit code says why."""

from __future__ import annotations

import os
import pty
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from launch.processes import Rank, run_ranks
from sft_dist.errors import UserError
from tests.distributed.workers.launcher import ranks
from tests.recipes import ROOT

LAUNCHER = Path(__file__).parent / "workers" / "launcher.py"


def until(condition: Callable[[], bool], seconds: float = 10.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.005)


def is_gone(pid: int) -> bool:
    """Ended; a zombie that nobody collects has ended, too."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    status = Path(f"/proc/{pid}/stat")
    return status.exists() and status.read_text().rpartition(")")[2].split()[0] == "Z"


def pids(folder: Path) -> list[int]:
    return [int(file.read_text()) for file in folder.glob("*.pid")]


@pytest.fixture
def launched(tmp_path: Path) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Starts a launcher of its own and waits until its ranks are ready."""
    started: list[subprocess.Popen[str]] = []

    def start(*words: str, grace: float = 30.0, ready: int | None = None) -> subprocess.Popen[str]:
        launcher = subprocess.Popen(
            [sys.executable, str(LAUNCHER), str(tmp_path), str(grace), *words],
            env={**os.environ, "PYTHONPATH": str(ROOT)}, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        started.append(launcher)
        until(lambda: len(pids(tmp_path)) == (len(words) if ready is None else ready))
        return launcher

    yield start
    for launcher in started:
        launcher.kill()
    for pid in pids(tmp_path):
        if not is_gone(pid):
            os.kill(pid, signal.SIGKILL)
    for launcher in started:
        launcher.communicate()


def test_a_run_of_which_no_rank_fails_gives_0(tmp_path: Path) -> None:
    assert run_ranks(ranks(tmp_path, "exit=0", "exit=0", "sleep=0.2 exit=0")) == 0


def test_rank_0_has_the_terminal_and_the_others_a_log_of_their_owner_s(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert run_ranks(ranks(tmp_path, "say=first", "say=second")) == 0
    assert capfd.readouterr().out == "first\n"
    log = tmp_path / "logs" / "rank1.log"
    assert log.read_text() == "second\n"
    assert stat.S_IMODE(log.stat().st_mode) == 0o600


def test_a_rank_killed_by_the_system_ends_the_others_and_is_named_first(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    lines = "\\n".join(f"line {n}" for n in range(1, 41))
    start = time.monotonic()
    code = run_ranks(ranks(tmp_path, "ready sleep", f"'say={lines}' await=rank0.pid die=SIGKILL", "ready sleep"))
    assert code == 128 + signal.SIGKILL
    assert time.monotonic() - start < 5
    assert all(map(is_gone, pids(tmp_path)))
    shown = capfd.readouterr().err.splitlines()
    assert shown[0].startswith("sft-dist: rank 1 was killed by SIGKILL (often: out of memory)")
    assert [line.strip() for line in shown[1:]] == [f"line {n}" for n in range(21, 41)]


@pytest.mark.parametrize(
    ("word", "code", "cause"),
    [
        ("exit=1", 1, "ended with exit code 1"),
        ("exit=3", 3, "ended with exit code 3"),
        ("die=SIGSEGV", 139, "was killed by SIGSEGV"),
        ("die=SIGTERM", 143, "was killed by SIGTERM"),
    ],
)
def test_the_first_failure_gives_the_code_of_the_run(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], word: str, code: int, cause: str
) -> None:
    # Rank 0 fails after it, as it does when it loses a peer.
    assert run_ranks(ranks(tmp_path, "exit_on=SIGTERM:1 ready sleep", f"await=rank0.pid {word}")) == code
    assert capfd.readouterr().err == f"sft-dist: rank 1 {cause}\n"


def test_a_rank_that_ignores_sigterm_is_killed_after_the_grace(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    start = time.monotonic()
    code = run_ranks(ranks(tmp_path, "note=SIGTERM ready sleep", "await=rank0.pid exit=1"), grace_seconds=0.3)
    assert code == 1
    assert 0.3 < time.monotonic() - start < 5
    assert (tmp_path / "rank0.signals").read_text() == "SIGTERM\n"
    assert "rank 0 did not end in time: killed" in capfd.readouterr().err


def test_what_a_rank_has_started_ends_with_it(tmp_path: Path) -> None:
    assert run_ranks(ranks(tmp_path, "child exit=0", "child ready sleep=0.2 exit=0")) == 0
    assert len(pids(tmp_path)) == 3
    until(lambda: all(map(is_gone, pids(tmp_path))))


def test_one_message_for_the_user_is_passed_on_once(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    fault = "'say=sft-dist: an earlier line' 'say=loading' 'say=sft-dist: r.yaml:3: mend it' 'say=bye' ready exit=2"
    code = run_ranks(ranks(tmp_path, "await=rank1.pid await=rank2.pid sleep", fault, fault))
    assert code == 2
    assert capfd.readouterr().err == "sft-dist: r.yaml:3: mend it\n"


def test_what_rank_0_has_said_itself_is_not_repeated(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    fault = "'say=sft-dist: r.yaml:3: mend it'"
    code = run_ranks(ranks(tmp_path, f"await=rank1.pid {fault} sleep=0.3 exit=2", f"{fault} ready exit=2"))
    assert code == 2
    shown = capfd.readouterr()
    assert shown.out + shown.err == "sft-dist: r.yaml:3: mend it\n"


def test_a_resumable_stop_waits_for_the_ranks_that_are_still_saving(tmp_path: Path) -> None:
    words = ("await=rank1.pid sleep=0.5 child exit=75", "ready exit=75")
    assert run_ranks(ranks(tmp_path, *words)) == 75
    assert (tmp_path / "rank0.child.pid").exists()


def test_a_resumable_rank_outweighs_those_that_it_left_to_be_ended(tmp_path: Path) -> None:
    code = run_ranks(ranks(tmp_path, "ready sleep", "await=rank0.pid exit=75", "sleep"), grace_seconds=0.3)
    assert code == 75


def test_a_log_goes_on_when_a_run_is_resumed_and_only_its_own_end_is_shown(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run_ranks(ranks(tmp_path, "", "'say=sft-dist: of the first run' exit=2"))
    capfd.readouterr()
    run_ranks(ranks(tmp_path, "", "say=progress exit=1"))
    assert "of the first run" not in capfd.readouterr().err
    assert (tmp_path / "logs" / "rank1.log").read_text() == "sft-dist: of the first run\nprogress\n"


def test_a_log_cannot_send_commands_to_the_terminal(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    run_ranks(ranks(tmp_path, "", "'say=10%\r\x1b[2Jdone\x07' exit=1"))
    assert capfd.readouterr().err.splitlines()[1:] == ["   [2Jdone"]


def test_a_log_that_cannot_be_written_ends_the_run_with_the_path(tmp_path: Path) -> None:
    (tmp_path / "logs").write_text("a file where the folder should be")
    with pytest.raises(UserError, match=r"logs/rank1\.log: cannot be written"):
        run_ranks(ranks(tmp_path, "ready sleep", "exit=0"))
    until(lambda: all(map(is_gone, pids(tmp_path))))


@pytest.mark.parametrize("name", ["SIGUSR1", "SIGUSR2", "SIGTERM", "SIGHUP", "SIGINT"])
def test_a_signal_reaches_every_rank_once(
    tmp_path: Path, launched: Callable[..., subprocess.Popen[str]], name: str
) -> None:
    noted = [tmp_path / f"rank{rank}.signals" for rank in range(3)]
    launcher = launched(*[f"note={name} ready await=done exit=0"] * 3)
    launcher.send_signal(signal.Signals[name])
    until(lambda: all(map(Path.exists, noted)))
    (tmp_path / "done").touch()
    assert launcher.wait(10) == 0
    assert [file.read_text() for file in noted] == [f"{name}\n"] * 3


def test_a_rank_that_stops_resumably_makes_the_stopped_run_resumable(
    launched: Callable[..., subprocess.Popen[str]],
) -> None:
    launcher = launched("exit_on=SIGTERM:75 ready sleep", "ready sleep")
    launcher.send_signal(signal.SIGTERM)
    assert launcher.wait(10) == 75


@pytest.mark.parametrize(("name", "code"), [("SIGTERM", 143), ("SIGINT", 130)])
def test_a_run_that_is_told_to_stop_says_no_more_than_that(
    launched: Callable[..., subprocess.Popen[str]], name: str, code: int
) -> None:
    launcher = launched("ready sleep", "ready sleep")
    launcher.send_signal(signal.Signals[name])
    shown = launcher.communicate(timeout=10)[1]
    assert launcher.returncode == code
    assert shown in ("", "sft-dist: stopping; Ctrl-C again ends all processes at once\n")


def test_a_rank_that_does_not_stop_in_time_is_killed(launched: Callable[..., subprocess.Popen[str]]) -> None:
    launcher = launched("note=SIGTERM ready sleep", "ready sleep", grace=0.3)
    launcher.send_signal(signal.SIGTERM)
    assert launcher.wait(10) == 143


def test_a_second_ctrl_c_ends_all_at_once(tmp_path: Path, launched: Callable[..., subprocess.Popen[str]]) -> None:
    launcher = launched("note=SIGINT child ready sleep", "note=SIGINT ready sleep", ready=3)
    launcher.send_signal(signal.SIGINT)
    until(lambda: all((tmp_path / f"rank{rank}.signals").exists() for rank in range(2)))
    assert launcher.poll() is None
    launcher.send_signal(signal.SIGINT)
    assert launcher.wait(5) == 130
    until(lambda: all(map(is_gone, pids(tmp_path))))


def test_ctrl_c_in_a_terminal_reaches_every_rank_once(tmp_path: Path) -> None:
    launcher, terminal = pty.fork()
    if launcher == 0:
        words = ["note=SIGINT tty ready await=done exit=0"] * 2
        os.environ["PYTHONPATH"] = str(ROOT)
        os.execv(sys.executable, [sys.executable, str(LAUNCHER), str(tmp_path), "30", *words])
    until(lambda: len(pids(tmp_path)) == 2)
    os.write(terminal, b"\x03")
    until(lambda: all((tmp_path / f"rank{rank}.signals").exists() for rank in range(2)))
    (tmp_path / "done").touch()
    assert os.waitstatus_to_exitcode(os.waitpid(launcher, 0)[1]) == 0
    os.close(terminal)
    assert [(tmp_path / f"rank{rank}.signals").read_text() for rank in range(2)] == ["SIGINT\n"] * 2
    assert [(tmp_path / f"rank{rank}.tty").read_text() for rank in range(2)] == ["True", "False"]


def test_what_nohup_ignores_stays_ignored(tmp_path: Path, launched: Callable[..., subprocess.Popen[str]]) -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        launcher = launched("ready await=done exit=0", "ready await=done exit=0")
    finally:
        signal.signal(signal.SIGHUP, before)
    launcher.send_signal(signal.SIGHUP)
    (tmp_path / "done").touch()
    assert launcher.wait(10) == 0


def test_a_killed_launcher_leaves_no_process(tmp_path: Path, launched: Callable[..., subprocess.Popen[str]]) -> None:
    launcher = launched("child ready sleep", "note=SIGTERM,SIGHUP child ready sleep", ready=4)
    assert not any(map(is_gone, pids(tmp_path)))
    launcher.kill()
    until(lambda: all(map(is_gone, pids(tmp_path))), 5)


@pytest.mark.skipif(sys.platform != "linux", reason="needs the kernel's parent-death signal")
def test_ranks_die_with_a_launcher_whose_keeper_was_killed_before(
    tmp_path: Path, launched: Callable[..., subprocess.Popen[str]]
) -> None:
    launcher = launched("ready sleep", "ready sleep")
    children = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()
    (keeper,) = set(map(int, children)) - set(pids(tmp_path))
    os.kill(keeper, signal.SIGKILL)
    launcher.kill()
    until(lambda: all(map(is_gone, pids(tmp_path))), 5)


def test_a_rank_that_cannot_be_started_is_a_failure_with_a_name(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    rank = Rank(1, [str(tmp_path / "no-such-program")], dict(os.environ), tmp_path / "rank1.log")
    assert run_ranks([rank]) == 1
    assert "No such file or directory" in capfd.readouterr().err
