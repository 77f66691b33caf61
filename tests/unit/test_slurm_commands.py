"""Slurm's commands, answered by small programs of the test's own."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import pytest

from launch.slurm.commands import SlurmDown, SlurmRefused, ask, expanded, fields, minutes, show

Fake = Callable[[str, str], None]


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Fake:
    """Puts a shell script under a name in front of all other commands."""
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")

    def make(name: str, body: str) -> None:
        (tmp_path / name).write_text(f"#!/bin/sh\n{body}\n")
        (tmp_path / name).chmod(0o700)

    return make


def test_an_answer_is_what_is_printed(fake: Fake) -> None:
    fake("squeue", 'cat; echo "$1 $LC_ALL $SLURM_TIME_FORMAT $EXTRA"; echo noise >&2')
    assert ask(["squeue", "a b"], text="in\n", environment={"EXTRA": "x"}) == "in\na b C standard x\n"


def test_a_command_that_hangs_is_given_up_with_its_children(fake: Fake, tmp_path: Path) -> None:
    fake("squeue", f"sleep 60 & echo $! > {tmp_path}/pid; trap '' TERM; wait")
    began = time.monotonic()
    with pytest.raises(SlurmDown, match=r"^squeue: no answer within 0\.3 s: Slurm is down or busy; try again later$"):
        ask(["squeue"], 0.3)
    assert time.monotonic() - began < 5
    child = Path(f"/proc/{(tmp_path / 'pid').read_text().strip()}/stat")
    deadline = time.monotonic() + 5
    # Dead, but perhaps not waited for yet by whoever inherits it.
    while child.exists() and child.read_text().rpartition(")")[2].split()[0] != "Z":
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize(
    ("body", "kind", "said"),
    [
        ("echo 'squeue: error: Invalid job id' >&2; exit 1", SlurmRefused, "squeue: Invalid job id"),
        ("printf 'sbatch: error: a\\n\\nsbatch: error: b\\n' >&2; exit 1", SlurmRefused, "squeue: a; b"),
        ("echo out; exit 3", SlurmRefused, "squeue: out"),
        ("exit 3", SlurmRefused, "squeue: failed with exit code 3"),
        (
            "echo 'load_jobs error: Unable to contact slurm controller' >&2; exit 1", SlurmDown,
            "squeue: Slurm does not answer (load_jobs error: Unable to contact slurm controller); try again later",
        ),
        ("printf '\\377' >&2; exit 1", SlurmRefused, "squeue: \ufffd"),
    ],
)  # fmt: skip
def test_a_failure_is_one_line(fake: Fake, body: str, kind: type[Exception], said: str) -> None:
    fake("squeue", body)
    with pytest.raises(kind) as error:
        ask(["squeue"])
    assert str(error.value) == said


def test_what_is_not_there_or_cannot_be_run_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SlurmDown, match=r"^sacctmgr: no such command: there is no Slurm here; log in to a node that"):
        ask(["sacctmgr"])
    (tmp_path / "sinfo").write_text("#!/nothing/here\n")
    (tmp_path / "sinfo").chmod(0o700)
    with pytest.raises(SlurmDown, match="sinfo: cannot be run: No such file or directory; mend the installation"):
        ask(["sinfo"])


def test_the_fields_of_a_line_may_hold_blanks(fake: Fake) -> None:
    line = "JobId=7 JobName=a b Comment=/x y/z=1 Reason=(null) GRES=gpu:2(IDX:0-1) MCS_label=N/A TRES=cpu=4,mem=1G"
    found = fields(line)
    assert found["JobName"] == "a b" and found["JobId"] == "7" and found["Reason"] == "(null)"
    assert found["TRES"] == "cpu=4,mem=1G"
    fake(
        "scontrol", f'[ "$3" = job ] && echo "{line}"; [ "$3" = hostnames ] || [ "$2" = hostnames ] && echo "n0\nn1"; :'
    )
    assert show("job", "7")["MCS_label"] == "N/A"
    assert expanded("n[0-1]") == ["n0", "n1"]


@pytest.mark.parametrize(
    ("text", "value"),
    [("30", 30), ("1:30", 1.5), ("2:00:00", 120), ("1-0", 1440), ("1-12:30", 2190), ("1-00:00:30", 1440.5),
     ("UNLIMITED", None), ("", None), ("NONE", None), ("-5", None), ("5 m", None)],
)  # fmt: skip
def test_times_of_slurm_in_minutes(text: str, value: float | None) -> None:
    assert minutes(text) == value
