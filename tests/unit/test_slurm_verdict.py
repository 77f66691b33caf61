"""What is decided when an attempt ends, case by case."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from launch.slurm.records import End, RankRecord, Start, Submission
from launch.slurm.verdict import Facts, decide, to_blame

NODES = ["n0", "n1"]
SUBMISSION = Submission(job_id="7", name="sft-dist:run", cluster="c.yaml", nodes=2, tasks_per_node=1, strategy="ddp",
                        threads=1, submitted="2026-11-25T17:00:00Z", requeue_max=100)  # fmt: skip
FACTS = Facts(code=1, step=40, ranks=(), silent=(), cancelled=False, preempted=False,
              seconds_left=30_000.0, spare_nodes=2)  # fmt: skip


def rank(number: int, code: int | None, second: int = 0, stopped: bool = False) -> RankRecord:
    ended = None if code is None else f"2026-11-25T17:10:{second:02d}.000000Z"
    return RankRecord(rank=number, node=f"n{number}", started="2026-11-25T17:00:01Z", ended=ended, code=code,
                      stopped=stopped)  # fmt: skip


def start(restart: int, job: str = "7") -> Start:
    return Start(at="2026-11-25T17:00:00Z", job=job, restart=restart, nodes=NODES, step=0)


def end(restart: int, verdict: str, step: int = 40, job: str = "7", **words: Any) -> End:
    return End(at="2026-11-25T17:00:00Z", job=job, restart=restart, code=1, step=step, verdict=verdict,
               **{"reason": "rank 1 on n1 ended with exit code 1", **words})  # fmt: skip


STOPPED = (rank(0, 75, stopped=True), rank(1, 75, stopped=True))
AT_THE_LIMIT = {"ranks": STOPPED, "code": 75, "seconds_left": 150.0}


@pytest.mark.parametrize(
    ("facts", "outcome", "blamed", "said"),
    [
        ({"code": 0, "ranks": (rank(0, 0), rank(1, 0))}, "done", None, "done"),
        # Slurm calls the step well, and a rank is not.
        ({"code": 0, "ranks": (rank(0, 0), rank(1, 1))}, "again", 1, "rank 1 on n1 ended with exit code 1"),
        # A fault of the user's comes again whatever is done; its peers died first, of losing it.
        (
            {"code": 1, "ranks": (rank(0, 1, 3), rank(1, 2, 5)), "message": "train.packing: is wrong; set it"},
            "stop", 1, "train.packing: is wrong; set it",
        ),
        ({"code": 2, "ranks": (rank(0, 2), rank(1, -9, 4))}, "stop", 0, "rank 0 on n0 ended with exit code 2"),
        # Killed by the kernel; srun then kills the peer.
        (
            {"code": 137, "ranks": (rank(0, -15, 2, stopped=True), rank(1, -9, 3))},
            "again", 1, "rank 1 on n1 was killed by SIGKILL (often: out of memory)",
        ),
        # The peer ends resumable for the loss of the one that had a bug.
        ({"code": 1, "ranks": (rank(0, 75, 1), rank(1, 1, 2))}, "again", 1, "rank 1 on n1 ended with exit code 1"),
        ({"code": 1, "ranks": (rank(0, 1),), "message": "ValueError: no"}, "again", 0,
         "rank 0 on n0 ended with exit code 1: ValueError: no"),
        # Hung: the watchdog ended it.
        ({"code": 75, "ranks": (rank(0, 75), rank(1, 75))}, "again", 0, "rank 0 on n0 ended with exit code 75"),
        (AT_THE_LIMIT, "requeue", None, "time limit"),
        # The signal comes up to a minute early.
        ({**AT_THE_LIMIT, "seconds_left": 120 + 60.0}, "requeue", None, "time limit"),
        ({**AT_THE_LIMIT, "preempted": True}, "requeue", None, "preempted"),
        ({**AT_THE_LIMIT, "seconds_left": 5000.0}, "requeue", None, "told to stop"),
        ({**AT_THE_LIMIT, "seconds_left": None}, "requeue", None, "told to stop"),
        # Told to stop before it could listen.
        ({"code": 140, "ranks": (rank(0, -12, stopped=True), rank(1, -12, stopped=True))}, "requeue", None,
         "told to stop"),
        ({"code": 143, "ranks": (rank(0, -15, stopped=True), rank(1, -15, stopped=True)), "preempted": True},
         "requeue", None, "preempted"),
        # Told to stop, and killed for not ending: not worth another start on these nodes at once.
        ({"code": 137, "ranks": (rank(0, 75, 1, stopped=True), rank(1, -9, 9, stopped=True)), "seconds_left": 60.0},
         "requeue", None, "time limit"),
        # Slurm lost a node: srun's own codes, and no rank's.
        ({"code": 141}, "again", None, "the step ended without a word (srun's exit code 141)"),
        ({"code": 233, "ranks": (rank(0, None), rank(1, None))}, "again", None,
         "2 ranks ended without a word (srun's exit code 233)"),
        ({"code": 137, "ranks": (rank(0, 0), rank(1, None))}, "again", None, "rank 1 ended without a word"),
        ({"code": 143, "ranks": (rank(0, -15, stopped=True),), "cancelled": True}, "stop", None, "cancelled"),
        # What was done before the cancellation arrived is done.
        ({"code": 0, "ranks": (rank(0, 0), rank(1, 0)), "cancelled": True}, "done", None, "done"),
    ],
)  # fmt: skip
def test_what_an_end_means(facts: dict[str, Any], outcome: str, blamed: int | None, said: str) -> None:
    verdict = decide(replace(FACTS, **facts), SUBMISSION, [start(0)])
    assert verdict.outcome == outcome, verdict
    assert said in verdict.reason
    assert verdict.rank == blamed
    assert verdict.node == (None if blamed is None else f"n{blamed}")
    assert verdict.exclude == ()


def test_a_node_that_does_not_answer_is_left_out() -> None:
    facts = replace(
        FACTS, code=143, ranks=(rank(0, -15, stopped=True), rank(1, None)), silent=["n1"], seconds_left=None
    )
    facts = replace(facts, ranks=(rank(0, 1), rank(1, None)))
    verdict = decide(facts, SUBMISSION, [start(0)])
    assert (verdict.outcome, verdict.exclude, verdict.reason) == ("requeue", ("n1",), "no answer from n1")


@pytest.mark.parametrize(("spare", "excluded"), [(0, ()), (1, ("n0",)), (2, ("n0", "n1"))])
def test_no_more_nodes_are_left_out_than_can_be_spared(spare: int, excluded: tuple[str, ...]) -> None:
    facts = replace(FACTS, ranks=(rank(0, 1),), silent=["n0", "n1"], spare_nodes=spare)
    verdict = decide(facts, SUBMISSION, [start(0)])
    assert (verdict.outcome, verdict.exclude) == ("requeue", excluded)


def test_a_node_on_which_ranks_die_twice_is_left_out() -> None:
    died = replace(FACTS, code=137, ranks=(rank(0, -15, 9, stopped=True), rank(1, -9, 3)), step=60)
    first = decide(died, SUBMISSION, [start(0)])
    assert (first.outcome, first.node) == ("again", "n1")
    history = [start(0), end(0, "again", 40, node="n1", rank=1), start(1)]
    second = decide(died, SUBMISSION, history)
    assert (second.outcome, second.exclude) == ("requeue", ("n1",))
    # On another node, it is no node's fault yet.
    other = replace(died, ranks=(rank(0, -9, 3), rank(1, -15, 9, stopped=True)))
    assert decide(other, SUBMISSION, history).outcome == "again"
    # And after a while in the queue neither.
    queued = [*history[:1], end(0, "requeue", 40, node="n1"), start(1)]
    assert decide(died, SUBMISSION, queued).outcome == "again"


def test_a_bug_of_ours_is_no_fault_of_a_node() -> None:
    history = [start(0), end(0, "again", 20, node="n1", rank=1), start(1)]
    assert decide(replace(FACTS, ranks=(rank(1, 1),)), SUBMISSION, history).outcome == "again"


def test_so_many_attempts_at_one_step_end_the_run() -> None:
    failed = replace(FACTS, ranks=(rank(1, 1),))
    history = [start(0), end(0, "again"), start(1), end(1, "requeue"), start(2)]
    verdict = decide(failed, SUBMISSION, history)
    assert verdict.outcome == "stop"
    assert verdict.reason == "rank 1 on n1 ended with exit code 1; 3 attempts in a row ended at step 40"
    assert decide(failed, SUBMISSION.model_copy(update={"same_step": 4}), history).outcome == "again"
    assert decide(replace(failed, step=41), SUBMISSION, history).outcome == "again"
    # A preemption between them says nothing, and does not count.
    between = [*history[:-1], start(2), end(2, "requeue", reason="preempted"), start(3)]
    assert decide(failed, SUBMISSION, between).outcome == "stop"
    assert decide(replace(failed, **AT_THE_LIMIT, preempted=True), SUBMISSION, between).outcome == "requeue"


def test_a_run_that_was_resumed_after_its_end_has_all_its_attempts_again() -> None:
    history = [start(0), end(0, "again"), start(1), end(1, "again"), start(2), end(2, "stop"), start(0, "8")]
    assert decide(replace(FACTS, ranks=(rank(1, 1),)), SUBMISSION, history).outcome == "again"


def test_a_time_limit_that_is_too_short_for_a_step_ends_the_run() -> None:
    limit = replace(FACTS, **AT_THE_LIMIT, step=0)
    history = [start(0), end(0, "requeue", 0, reason="time limit"), start(1), end(1, "requeue", 0, reason="time limit")]
    verdict = decide(limit, SUBMISSION, [*history, start(2)])
    assert verdict.outcome == "stop"
    assert verdict.reason == "the time limit is too short; 3 attempts in a row ended at step 0"
    assert decide(replace(limit, step=5), SUBMISSION, [*history, start(2)]).outcome == "requeue"


@pytest.mark.parametrize(("facts", "submission"), [
    ({"seconds_left": 200.0}, {}),
    ({}, {"in_place": False}),
])  # fmt: skip
def test_what_does_not_start_again_in_place_goes_back_into_the_queue(
    facts: dict[str, Any], submission: dict[str, Any]
) -> None:
    failed = replace(FACTS, ranks=(rank(1, 1),), **facts)
    assert decide(failed, SUBMISSION.model_copy(update=submission), [start(0)]).outcome == "requeue"


@pytest.mark.parametrize("ranks", [STOPPED, (rank(1, 1),)])
def test_the_queue_is_left_after_so_many_times(ranks: tuple[RankRecord, ...]) -> None:
    facts = replace(FACTS, ranks=ranks, seconds_left=5000.0)
    submission = SUBMISSION.model_copy(update={"requeue_max": 2, "in_place": False, "same_step": 9})
    # The second was killed by Slurm without a word, the attempt in place was no requeue, another job is another matter.
    history = [start(0, "3"), start(1, "3"), start(2, "3"), start(0), end(0, "requeue"), start(1), start(2)]
    verdict = decide(facts, submission, history)
    assert verdict.outcome == "stop"
    assert verdict.reason.endswith("; it went back into the queue 2 times, as often as requeue.max allows")
    in_place = [start(0), end(0, "again"), start(1), end(1, "requeue"), start(2)]
    assert decide(facts, submission, in_place).outcome == "requeue"


def test_a_death_of_its_own_is_blamed_before_those_that_follow_from_it() -> None:
    # By the clock the peers were sooner.
    assert to_blame([rank(0, 75, 1), rank(1, -9, 2, stopped=True), rank(2, -11, 3)]) == rank(2, -11, 3)
    assert to_blame([rank(0, 1, 5), rank(1, 1, 4)]) == rank(1, 1, 4)
    assert to_blame([rank(0, None), rank(1, 0)]) is None
