"""Of all ranks that failed in a run's newest attempt, the one to blame, and its last words."""

from __future__ import annotations

import contextlib
import re
import signal
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from launch import logtail
from launch.logs.reading import LogReader, Unit, last_lines, since
from launch.slurm.records import End, RankRecord, SlurmDir, Start, read_attempts, read_ranks, seconds
from sft_dist.rundir import RunDir

_LINES = 20
# Kinds of endings, the first to blame first: 0 a death of its own, 1 one that the rank has said itself, 3 a death that
# the launcher brought.
_LOST_PEER = 2
_ASKED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
_IN_ORDER = frozenset((*logtail.SPOKEN, *(-number for number in _ASKED), *(128 + number for number in _ASKED)))
_LATE = "did not end in time when it was told to stop, and was killed"
_SILENT = "left no word of its end: its node was lost, or it was killed with all that watched it"
# A dying rank's lines; further back is ordinary training.
_MOST_LINES = 500
# Clocks of the nodes, and what a log writes after its worker has ended.
_LEEWAY = 5.0
# What a rank says when another has died: the others' deaths explain it, and it explains nothing.
_CONSEQUENCE = re.compile(
    r"(?i)connection (?:closed|reset|refused|was closed|aborted)|closed by peer|broken pipe|socket ?timeout"
    r"|remote (?:process|error|peer)|peer(?: process)? .*(?:exited|died|lost)|ncclremoteerror|nccl.*(?:abort|timeout)"
    r"|watchdog caught collective|collective operation timeout|timed out (?:waiting|after)"
    r"|wait timeout|store.*(?:timeout|closed)|failed to (?:recv|send)|distbackenderror|distnetworkerror"
)
_OWN = re.compile(r"(?i)out of memory|cuda error|ecc error|assert")


@dataclass(frozen=True)
class Failure:
    """How a rank failed. `code` is as in subprocess, None of a rank that has left no word; `at` ISO 8601.

    `words`: the lines that tell most, harmless; `reason`: the one among them that says why it ended, None where they
    are merely its last. `others`: how many more failed.
    """

    rank: int
    node: str
    at: str
    code: int | None
    cause: str
    words: tuple[str, ...]
    reason: str | None
    others: int

    @property
    def summary(self) -> str:
        """One line: why it ended, or what it said last; empty where it said nothing."""
        if not self.words:
            return ""
        return self.reason.strip() if self.reason is not None else f"its last line: {self.words[-1].strip()}"


def first_failure(root: Path) -> Failure | None:
    """The failure of the newest attempt that the others follow from; None where no rank failed."""
    start = newest_start(read_attempts(SlurmDir(root)))
    return None if start is None else failure_of(root, start)


def newest_start(records: Sequence[Start | End]) -> Start | None:
    return next((record for record in reversed(records) if isinstance(record, Start)), None)


def failure_of(root: Path, start: Start) -> Failure | None:
    """The same of a given attempt."""
    ranks = read_ranks(SlurmDir(root), start.job, start.restart)
    failed = [each for each in ranks if each.code not in (0, None)]
    # A rank that ends because it was told to has not failed.
    failed = [each for each in failed if not (each.stopped and each.code in _IN_ORDER)]
    if not failed:
        return None
    endings = [(_blame(root, start, each), each) for each in failed]
    (kind, _, _), worst = min(endings, key=lambda each: each[0])
    silent = [each for each in ranks if each.code is None]
    if kind == _LOST_PEER and silent and _is_over(root, start):
        # They have lost a peer that could not even say that it ended.
        return _told(root, start, silent[0], len(failed) + len(silent) - 1)
    return _told(root, start, worst, len(failed) - 1)


def _told(root: Path, start: Start, rank: RankRecord, others: int) -> Failure:
    cause = _SILENT if rank.code is None else _LATE if rank.stopped and rank.code == -9 else logtail.cause(rank.code)
    words, reason = _words(_last_units(root, start, rank), rank.code)
    shown = tuple(line for line in words if line.strip())
    return Failure(rank.rank, rank.node, rank.ended or rank.started, rank.code, cause, shown, reason, others)


def _is_over(root: Path, start: Start) -> bool:
    return any(
        isinstance(each, End) and (each.job, each.restart) == (start.job, start.restart)
        for each in read_attempts(SlurmDir(root))
    )


def _blame(root: Path, start: Start, rank: RankRecord) -> tuple[int, float, int]:
    """The smaller, the more it explains."""
    assert rank.code is not None
    if rank.stopped:
        kind = 3
    elif rank.code in logtail.SPOKEN:
        kind = 1
    else:
        kind = _LOST_PEER if rank.code != -9 and _is_consequence(_last_units(root, start, rank)) else 0
    return kind, _ended(rank), rank.rank


def _ended(rank: RankRecord) -> float:
    with contextlib.suppress(ValueError):
        return seconds(rank.ended or rank.started)
    return float("inf")


def _is_consequence(units: Sequence[Unit]) -> bool:
    words = next((unit.lines for unit in reversed(units) if unit.is_traceback), None)
    last = words[-1] if words else "\n".join(line for unit in units[-_LINES:] for line in unit.lines)
    return bool(_CONSEQUENCE.search(last)) and not _OWN.search(last)


def _last_units(root: Path, start: Start, rank: RankRecord) -> list[Unit]:
    """The last lines that a rank wrote in an attempt."""
    path = RunDir(root).logs / f"rank{rank.rank}.log"
    begun, ended = _time(start.at) - _LEEWAY, _time(rank.ended) + _LEEWAY if rank.ended else float("inf")
    offset = max(last_lines(path, _MOST_LINES), since(path, begun))
    units = LogReader(path, rank.rank, offset).units(final=True)
    return [unit for unit in units if unit.at is None or begun <= unit.at <= ended]


def _time(at: str) -> float:
    try:
        return seconds(at)
    except ValueError:
        return 0.0


def _words(units: Sequence[Unit], code: int | None) -> tuple[list[str], str | None]:
    """The lines to show, and the one that says why the rank ended."""
    last = [line for unit in units[-_LINES:] for line in unit.lines][-_LINES:]
    if code in logtail.SPOKEN:
        said = [line for unit in units for line in unit.lines if line.startswith("sft-dist:")]
        return said[-3:] or last, said[-1] if said else None
    number = next((n for n in range(len(units) - 1, -1, -1) if units[n].is_traceback), None)
    # Who is killed, or leaves no word, prints no traceback: one in its log is of something that it got over.
    if number is None or code is None or code < 0:
        return last, None
    block = units[number].lines
    # The rest of a message of several lines stands in lines of its own.
    rest = [line for unit in units[number + 1 : number + 4] for line in unit.lines]
    shown = [block[0], "  ...", *block[-_LINES + 2 :]] if len(block) > _LINES else block
    return [*shown, *rest[:3]], block[-1]
