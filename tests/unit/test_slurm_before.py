"""What comes before the ranks, and what is noted behind them, without a Slurm."""

from __future__ import annotations

import json
import socket
from pathlib import Path

import pytest

from launch.slurm import after, before
from launch.slurm.commands import SlurmDown
from launch.slurm.records import (
    End,
    RankRecord,
    SlurmDir,
    Start,
    Submission,
    append_attempt,
    read_attempts,
    read_submission,
    write_rank,
    write_submission,
)
from launch.slurm.script import AGAIN, FAILED, NOTHING_TO_DO

SUBMISSION = Submission(job_id="7", name="sft-dist:run", cluster="c.yaml", nodes=2, tasks_per_node=1, strategy="ddp",
                        threads=1, submitted="2026-11-25T17:00:00Z", requeue_max=3)  # fmt: skip
SCONTROL = """#!/bin/bash
# `scontrol show hostnames LIST`, `scontrol --oneliner show KIND NAME`, and orders, which are noted.
case "$*" in
"show hostnames n[0-1]") printf 'n0\\nn1\\n';;
"show hostnames n9") echo n9;;
"show hostnames n[8-9]") printf 'n8\\nn9\\n';;
*"show node "*) echo "NodeName=$4 NodeAddr=10.0.0.${4#n} State=${STATE:-IDLE}";;
*"show partition "*) echo "PartitionName=main TotalNodes=4";;
*"show job "*) echo "JobId=7 JobState=RUNNING Partition=main ExcNodeList=${EXCLUDED:-(null)} PreemptTime=None";;
*) echo "$*" >> "$ORDERS"; [ -z "$REFUSED" ] || { echo "$REFUSED" >&2; exit 1; };;
esac
"""


@pytest.fixture
def at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SlurmDir:
    """A run of two nodes, job 7."""
    programs = tmp_path / "bin"
    programs.mkdir()
    (programs / "scontrol").write_text(SCONTROL)
    (programs / "scontrol").chmod(0o700)
    monkeypatch.setenv("PATH", f"{programs}:/usr/bin:/bin")
    monkeypatch.setenv("ORDERS", str(tmp_path / "orders"))
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_JOB_NODELIST", "n[0-1]")
    monkeypatch.delenv("SLURM_ARRAY_JOB_ID", raising=False)
    monkeypatch.setattr("signal.signal", lambda number, handler: None)
    made = SlurmDir(tmp_path / "run")
    write_submission(made, SUBMISSION)
    return made


def said(capsys: pytest.CaptureFixture[str]) -> tuple[str, str]:
    captured = capsys.readouterr()
    return captured.out, captured.err


def test_it_notes_the_attempt_and_says_where_the_ranks_meet(at: SlurmDir, capsys: pytest.CaptureFixture[str]) -> None:
    for restart in range(2):
        assert before.main([str(at.root)]) == 0
        address, port, number = said(capsys)[0].split()
        assert (address, number) == ("10.0.0.0", str(restart)) and 20_000 <= int(port) < 32_000
    attempts = read_attempts(at)
    assert [(one.event, one.job, one.restart) for one in attempts] == [("start", "7", 0), ("start", "7", 1)]
    assert isinstance(attempts[0], Start) and attempts[0].nodes == ["n0", "n1"] and attempts[0].step == 0
    assert at.ranks("7", 1).is_dir()


def test_a_run_that_is_done_is_not_started_again(at: SlurmDir, capsys: pytest.CaptureFixture[str]) -> None:
    (at.root / "summary.json").write_text("{}")
    assert before.main([str(at.root)]) == NOTHING_TO_DO
    assert said(capsys) == ("", f"sft-dist: {at.root} is done\n")
    assert read_attempts(at) == []


def test_a_job_that_does_not_train_is_done_when_its_result_is_there(at: SlurmDir) -> None:
    (at.root / "summary.json").write_text("{}")
    write_submission(at, SUBMISSION.model_copy(update={"result": str(at.root / "report.json")}))
    assert before.main([str(at.root)]) == 0
    (at.root / "report.json").write_text("{}")
    assert before.main([str(at.root)]) == NOTHING_TO_DO


def test_what_it_cannot_do_is_one_line_and_no_word_for_the_script(
    at: SlurmDir, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    at.submission.write_text("{")
    assert before.main([str(at.root)]) == 2
    out, line = said(capsys)
    assert out == "" and line == (f"sft-dist: {at.submission}: cannot be read; submit the run with `sft-dist submit`\n")
    write_submission(at, SUBMISSION)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(before, "append_attempt", full)
    assert before.main([str(at.root)]) == 2
    out, line = said(capsys)
    assert out == "" and line == (
        f"sft-dist: {at.folder}: cannot be written: No space left on device; mend that, then "
        f"`sft-dist resume {at.root}`\n"
    )


def test_a_job_of_another_hand_takes_the_run_over(at: SlurmDir, monkeypatch: pytest.MonkeyPatch) -> None:
    at.task.write_bytes(b"task")
    at.cancelled.touch()
    monkeypatch.setenv("SLURM_JOB_ID", "8")
    assert before.main([str(at.root)]) == 0
    held = read_submission(at)
    assert held == SUBMISSION.model_copy(update={"job_id": "8"})
    # Where submitit looks for it.
    assert (at.folder / "8_submitted.pkl").read_bytes() == b"task"
    assert not at.cancelled.exists()


def test_a_job_that_is_put_back_stays_cancelled(at: SlurmDir) -> None:
    at.cancelled.touch()
    assert before.main([str(at.root)]) == 0
    assert at.cancelled.exists()


def test_a_job_of_an_array_has_its_own_name(monkeypatch: pytest.MonkeyPatch) -> None:
    assert before.job_name({"SLURM_JOB_ID": "12"}) == "12"
    given = {"SLURM_JOB_ID": "12", "SLURM_ARRAY_JOB_ID": "9", "SLURM_ARRAY_TASK_ID": "3"}
    assert before.job_name(given) == "9_3"


def test_ports_of_jobs_differ_and_are_free() -> None:
    assert len({before.free_port(number) for number in range(40)}) == 40
    wanted = before.free_port(123)
    with socket.socket() as taken:
        taken.bind(("", wanted))
        other = before.free_port(123)
    assert other != wanted and 20_000 <= other < 32_000


def test_a_node_that_slurm_does_not_know_is_called_by_its_name(at: SlurmDir, tmp_path: Path) -> None:
    assert before.address("n1") == "10.0.0.1"
    (tmp_path / "bin" / "scontrol").write_text("#!/bin/sh\necho 'Node n1 not found' >&2; exit 1\n")
    assert before.address("n1") == "n1"
    # A controller that is away does not cost the allocation.
    (tmp_path / "bin" / "scontrol").write_text("#!/bin/sh\necho 'Unable to contact slurm controller' >&2; exit 1\n")
    assert before.address("n1") == "n1"


# Behind the ranks


def finish(at: SlurmDir, code: int, *codes: int | None) -> tuple[int, End]:
    """An attempt whose ranks ended with `codes`: what the script is told, and what was noted."""
    append_attempt(at, Start(at="2026-11-25T17:00:00Z", job="7", restart=0, nodes=["n0", "n1"], step=0))
    for rank, own in enumerate(codes):
        ended = None if own is None else f"2026-11-25T17:00:0{rank}Z"
        write_rank(at, "7", 0, RankRecord(rank=rank, node=f"n{rank}", started="", ended=ended, code=own))
    answer = after.main([str(at.root), str(code), "10.0.0.0 20007 0"])
    last = read_attempts(at)[-1]
    assert isinstance(last, End)
    return answer, last


def orders(tmp_path: Path) -> list[str]:
    path = tmp_path / "orders"
    return path.read_text().splitlines() if path.exists() else []


def test_a_failure_starts_again_in_place_and_is_named_by_the_rank(
    at: SlurmDir, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (at.root / "logs").mkdir()
    (at.root / "logs" / "rank1.log").write_text(
        "2026-11-25T17:00:01.000000Z sft-dist: the disk is gone\n2026-11-25T17:00:01.000000Z bye\n"
    )
    (at.root / "metrics.jsonl").write_text('{"step": 11, "loss": 1}\n{"step": 12, "lo')
    answer, last = finish(at, 1, 75, 1)
    assert answer == AGAIN and (last.verdict, last.rank, last.node, last.step) == ("again", 1, "n1", 11)
    assert last.reason == "rank 1 on n1 ended with exit code 1: the disk is gone"
    assert orders(tmp_path) == []
    assert said(capsys)[1] == f"sft-dist: job 7, step 11: {last.reason}: starting again on the same nodes\n"


def test_a_step_that_ended_well_though_a_rank_did_not_fails_the_job(at: SlurmDir) -> None:
    answer, last = finish(at, 0, 0, 2)
    assert (answer, last.verdict) == (FAILED, "stop")


def test_a_run_that_is_done_is_done(at: SlurmDir, tmp_path: Path) -> None:
    answer, last = finish(at, 0, 0, 0)
    assert (answer, last.verdict, last.code) == (0, "done", 0) and orders(tmp_path) == []


@pytest.mark.parametrize(
    ("excluded", "orders_given"),
    [
        ("(null)", ["requeue 7", "update JobId=7 ExcNodeList=n1"]),
        ("n9", ["requeue 7", "update JobId=7 ExcNodeList=n9,n1"]),
        # Four nodes, two that the job needs: a third must not be kept from it.
        ("n[8-9]", ["requeue 7"]),
    ],
)
def test_a_node_that_does_not_answer_is_kept_from_the_job_that_goes_back(
    at: SlurmDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, excluded: str, orders_given: list[str]
) -> None:
    monkeypatch.setenv("EXCLUDED", excluded)
    answer, last = finish(at, 1, 1)
    assert (answer, last.verdict, last.reason) == (0, "requeue", "no answer from n1")
    assert orders(tmp_path) == orders_given


def test_a_requeue_that_slurm_refuses_is_noted_as_the_end(at: SlurmDir, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REFUSED", "Requested operation is presently disabled")
    monkeypatch.setenv("STATE", "DOWN*")
    answer, last = finish(at, 1, 1, 1)
    assert (answer, last.verdict) == (0, "stop")
    assert "Slurm does not put it back into the queue: Requested operation is presently disabled" in last.reason


def test_a_controller_that_is_away_is_asked_again(at: SlurmDir, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[list[str]] = []
    answers = after.ask

    def away(words: list[str]) -> str:
        if words[1] != "requeue":
            return answers(words)
        asked.append(words)
        if len(asked) < 3:
            raise SlurmDown("scontrol: Slurm does not answer; try again later")
        return ""

    monkeypatch.setattr(after, "ask", away)
    monkeypatch.setattr("time.sleep", lambda _: None)
    monkeypatch.setenv("STATE", "DOWN*")
    assert finish(at, 1, 1, 1)[1].verdict == "requeue"
    assert asked[:3] == [["scontrol", "requeue", "7"]] * 3


def test_a_submission_that_cannot_be_read_behind_the_ranks_is_one_line(
    at: SlurmDir, capsys: pytest.CaptureFixture[str]
) -> None:
    at.submission.unlink()
    assert after.main([str(at.root), "0", "10.0.0.0 20007 0"]) == 0
    assert said(capsys)[1].count("\n") == 1


def test_the_step_that_was_reached_is_the_last_that_is_known(tmp_path: Path) -> None:
    run = after.RunDir(tmp_path)
    assert after.reached(run) == 0
    lines = [json.dumps({"step": step, "loss": 1.0, "text": "x" * 100}) for step in range(1, 2000)]
    run.metrics.write_text("\n".join([*lines, "[]", "null", "{}", '{"step": nul']))
    assert after.reached(run) == 1999
