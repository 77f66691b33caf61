"""The strikes themselves, and what a run has to do about each."""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from tests.distributed.chaos.disk import Disk
from tests.distributed.chaos.plan import EVAL_STEPS, MAX_FAILURES, SAVE_STEPS, STEPS, Strike
from tests.distributed.chaos.start import Start

GRACE = 25.0
# The launcher lets ranks outlive their grace by ten seconds, and the machine is slow.
_LATE = 20.0
# Of any start to its first step, and of a step; a machine with much else to do is slower by far than an idle one.
_PATIENCE = 150.0
_WHOLE = re.compile(r"checkpoint-(\d+)")


@dataclass
class Verdict:
    """What became of a strike.

    `reached`: the last step logged before it; `redone`: steps done again after it; `most`: that may be done again;
    `damaged`: the step of a checkpoint that was damaged, and of the one before it.
    """

    strike: Strike
    faults: list[str] = field(default_factory=list)
    reached: int | None = None
    redone: int | None = None
    # The newest save may be half done, and the one before it a step old.
    most: int = 2 * SAVE_STEPS
    damaged: tuple[int, int] | None = None

    @property
    def survived(self) -> bool:
        return not self.faults


@dataclass(frozen=True)
class Pace:
    """Seconds of an undisturbed run: until its first step, of a step, and from its last step to its end."""

    start_up: float
    step: float
    end: float


def reach(start: Start, disk: Disk, strike: Strike, pace: Pace) -> bool:
    """Wait for the moment of a strike; False where the run has ended before, or is too far for it."""
    if strike.moment == "start-up":
        return start.pause(max(0.0, strike.delay * pace.start_up - start.age))
    begins = {
        "step": lambda: True,
        "end": lambda: start.last_step == STEPS,
        "evaluation": lambda: (start.last_step or 1) % EVAL_STEPS == 0,
        "save": lambda: any(path.suffix == ".unfinished" for path in disk.checkpoints.iterdir()),
    }
    since = start.done
    steps = 1 if strike.moment == "end" else strike.steps

    def is_past() -> bool:
        return (start.last_step or 0) > strike.latest

    def has_come() -> bool:
        # After a strike that the start outlived some more are trained.
        return is_past() or (start.done >= steps and start.done - since >= min(steps, 2) and begins[strike.moment]())

    if not start.wait(has_come, _PATIENCE) or is_past():
        return False
    if strike.kind in ("SIGKILL in a save", "disk full, at the end"):
        # At once: small files are soon written.
        return start.code is None
    return start.pause(strike.delay * (pace.end if strike.moment == "end" else pace.step))


def hit(start: Start, disk: Disk, strike: Strike) -> Verdict | None:
    """Strike, and judge what the run does until it has ended or trains on. None where it had ended already."""
    start.look()
    verdict = Verdict(strike)
    act = _ACTS.get(strike.kind, _signal)
    if act(start, disk, strike, verdict) is False:
        return None
    if start.code is not None and (left := start.left_alive()):
        verdict.faults.append(f"processes {left} outlive the launcher")
    return verdict


def _rank(start: Start, strike: Strike) -> int:
    return int(strike.pick * max(len(start.ranks()), 1))


def _ends(start: Start, verdict: Verdict, seconds: float) -> bool:
    if start.wait_for_end(seconds):
        verdict.reached = start.last_step
        return True
    verdict.faults.append(f"still runs {seconds:.0f} s later")
    return False


def _kill_rank(start: Start, disk: Disk, strike: Strike, verdict: Verdict) -> bool:
    if not start.signal(signal.SIGKILL, _rank(start, strike)):
        return False
    return not _ends(start, verdict, _LATE + GRACE) or start.code != 0


def _kill_all(start: Start, disk: Disk, strike: Strike, verdict: Verdict) -> bool:
    if start.code is not None:
        return False
    start.kill()
    start.look()
    verdict.reached = start.last_step
    return True


def _signal(start: Start, disk: Disk, strike: Strike, verdict: Verdict) -> bool:
    name = strike.kind.split()[0]
    number = signal.Signals[name]
    inside = start.done > 0 and start.last_step != STEPS
    if not start.signal(number):
        return False
    if not _ends(start, verdict, GRACE + _LATE):
        return True
    code = start.code
    stopped = start.said(rf"stopped by {name} at step (\d+)")
    if code == 75 and stopped:
        if int(stopped[1]) not in complete(disk):
            verdict.faults.append(f"stopped at step {stopped[1]}, but its checkpoint is not complete")
        verdict.reached, verdict.most = int(stopped[1]), 0
    elif code == 0 and not inside:
        return False
    elif code != 75 and (inside or code not in (128 + number, -number)):
        verdict.faults.append(f"ended with exit code {code} instead of 75")
    elif inside and start.last_step != STEPS:
        verdict.faults.append("does not say at which step it stopped")
    return True


def _stop_rank(start: Start, disk: Disk, strike: Strike, verdict: Verdict) -> bool:
    rank = _rank(start, strike)
    others = set(start.ranks()) - {rank}
    if not start.signal(signal.SIGSTOP, rank):
        return False
    if not _ends(start, verdict, 90.0):
        start.signal(signal.SIGCONT, rank)
        return True
    if start.code != 75:
        verdict.faults.append(f"ended with exit code {start.code} instead of 75")
    for other in others:
        stacks = disk.run / "logs" / f"stacks-rank{other}.txt"
        if not stacks.exists() or "File " not in stacks.read_text():
            verdict.faults.append(f"no stacks in {stacks.name}")
    return True


def _damage(start: Start, disk: Disk, strike: Strike, verdict: Verdict) -> bool:
    if not complete(disk) or not _kill_all(start, disk, strike, verdict):
        return False
    whole = complete(disk)
    folder = disk.checkpoints / f"checkpoint-{whole[-1]}"
    files = sorted(folder.iterdir())
    # What remains of the pick tells the byte.
    place, part = divmod(strike.pick * len(files), 1)
    file = files[int(place)]
    if strike.kind == "truncated file":
        os.truncate(file, int(part * file.stat().st_size))
    else:
        flip(file, int(part * file.stat().st_size * 8))
    verdict.damaged = (whole[-1], whole[-2] if len(whole) > 1 else 0)
    verdict.most += SAVE_STEPS
    return True


def flip(file: Path, bit: int) -> None:
    """Change one bit of a file."""
    with open(file, "r+b") as opened:
        opened.seek(bit // 8)
        (byte,) = opened.read(1)
        opened.seek(bit // 8)
        opened.write(bytes([byte ^ 1 << bit % 8]))


def after_damage(start: Start, disk: Disk, verdict: Verdict) -> list[str]:
    """What is wrong with how a start went on that found a damaged checkpoint."""
    assert verdict.damaged is not None
    bad, good = verdict.damaged
    faults = []
    if not start.said(rf"/checkpoint-{bad}: damaged \("):
        faults.append(f"the damage of checkpoint-{bad} is not told")
    if not list(disk.checkpoints.glob(f"checkpoint-{bad}*.damaged")):
        faults.append(f"checkpoint-{bad} is not kept aside")
    if start.from_step != good:
        faults.append(f"went on from step {start.from_step} instead of {good}")
    return faults


def _fill_and_free(start: Start, disk: Disk, strike: Strike, verdict: Verdict) -> bool:
    return _fails_to_save(start, verdict, disk.fill, disk.free)


def _protect_and_release(start: Start, disk: Disk, strike: Strike, verdict: Verdict) -> bool:
    return disk.protect() and _fails_to_save(start, verdict, lambda: None, disk.release)


def _fails_to_save(start: Start, verdict: Verdict, worsen: Callable[[], None], mend: Callable[[], None]) -> bool:
    """A save has to fail, and after the mending another one has to succeed, without a new start."""
    since = len(start.lines)

    def failed() -> bool:
        worsen()
        return start.said(r"^checkpoint-\d+: not written \(", since) is not None

    told = start.wait(failed, _PATIENCE)
    mend()
    if not told:
        if start.last_step == STEPS:
            return False
        verdict.faults.append("no failed save is told")
        return True
    since = len(start.lines)
    trains = start.wait(lambda: start.completed(since) is not None, _PATIENCE)
    if not trains and start.code != 0:
        verdict.faults.append(f"no checkpoint was written afterwards; exit code {start.code}")
    verdict.redone = 0
    return True


def _fill(start: Start, disk: Disk, strike: Strike, verdict: Verdict) -> bool:
    _fill_until_the_end(start, disk)
    disk.free()
    verdict.reached = start.last_step
    verdict.most += MAX_FAILURES * SAVE_STEPS
    if start.code is None:
        verdict.faults.append(f"trains on after {_PATIENCE:.0f} s")
    elif start.code != 75 or not start.said("checkpoint.max_failures: "):
        verdict.faults.append(f"ended with exit code {start.code} instead of 75 for checkpoint.max_failures")
    return True


def _fill_until_the_end(start: Start, disk: Disk) -> None:
    def never() -> bool:
        disk.fill()
        return False

    start.wait(never, _PATIENCE)


def _fill_at_the_end(start: Start, disk: Disk, strike: Strike, verdict: Verdict) -> bool:
    """There is no room for the model, not even where an old checkpoint is removed."""
    _fill_until_the_end(start, disk)
    ends = _ends(start, verdict, 1.0)
    disk.free()
    if ends and start.code == 0:
        return False
    if ends and (start.code != 2 or not start.said("(?i)no space left on")):
        verdict.faults.append(f"ended with exit code {start.code} instead of 2 for the full disk")
    return True


def complete(disk: Disk) -> list[int]:
    """Steps of the checkpoints that have their names."""
    return sorted(int(found[1]) for path in disk.checkpoints.iterdir() if (found := _WHOLE.fullmatch(path.name)))


_ACTS: dict[str, Callable[[Start, Disk, Strike, Verdict], bool]] = {
    "SIGKILL to a rank": _kill_rank,
    "SIGKILL to all": _kill_all,
    "SIGKILL in a save": _kill_all,
    "SIGSTOP of a rank": _stop_rank,
    "truncated file": _damage,
    "flipped bit": _damage,
    "disk full, freed": _fill_and_free,
    "disk full, stays": _fill,
    "disk full, at the end": _fill_at_the_end,
    "read-only folder": _protect_and_release,
}
