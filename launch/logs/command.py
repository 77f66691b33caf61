"""`sft-dist logs RUN`: the first error, then the ranks' logs as one, and what comes while it is watched."""

from __future__ import annotations

import re
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from datetime import datetime
from pathlib import Path

from launch.logs.failure import first_failure
from launch.logs.merging import Folding, Said, folded, merged
from launch.logs.places import JOB, events, job_logs, over, rank_logs, run_folder
from launch.logs.printing import Printer, ReaderGoneError, close_quietly, is_coloured
from launch.logs.reading import LogReader, Unit, last_lines, since
from launch.slurm.records import SlurmDir, read_attempts
from sft_dist.errors import EXIT_DONE, UserError

LINES = 100
_POLL_SECONDS = 0.5
# Slurm is asked no more often whether a job is still there that has left no word of its end.
_ASK_SECONDS = 30.0
_UNIT_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400}


def show(
    name: str,
    *,
    ranks: Sequence[str] = (),
    follow: bool = False,
    since_text: str | None = None,
    lines: str | None = None,
) -> int:
    """Print the logs of a run. Returns the exit code. Raises :class:`UserError` for words that make no sense."""
    root = run_folder(name)
    wanted = _ranks(ranks)
    begin = _since(since_text, time.time())
    count = _count(lines, begin)
    known = rank_logs(root)
    missing = sorted(wanted - known.keys())
    if missing and not follow:
        raise UserError(f"--rank: {root} has no log of rank {missing[0]}; there {_there(known)}")
    printer = Printer([rank for rank in known if not wanted or rank in wanted], is_coloured())
    try:
        if (failure := first_failure(root)) is not None:
            printer.failure(failure)
        if follow:
            _follow(root, wanted, begin, count, printer)
        else:
            _print_all(root, wanted, begin, count, printer)
        printer.flush()
    except ReaderGoneError:
        close_quietly()
    return EXIT_DONE


def _print_all(root: Path, wanted: set[int], begin: float, count: int | None, printer: Printer) -> None:
    _note_if_empty(root, printer)
    readers, is_cut = _readers(root, wanted, begin, count)
    units = merged([*(reader.units(final=True) for reader in readers), _events(root, wanted)])
    said = folded(unit for unit in units if unit.at is None or unit.at >= begin)
    shown = said if count is None else _last_of_each_kind(said, count)
    if count is not None and is_cut:
        printer.note(f"--- the last {count} lines; --lines all shows all of them ---")
    for each in shown:
        printer.said(each)


def _note_if_empty(root: Path, printer: Printer) -> None:
    if not rank_logs(root) and not job_logs(root):
        printer.note(f"{root} has no logs yet: rank 0 of a local run has the terminal" if not _on_slurm(root) else
                     f"{root} has no logs yet: its job has not begun; `sft-dist status {root}` says why")  # fmt: skip


def _last_of_each_kind(said: Iterable[Said], count: int) -> Iterator[Said]:
    """The last lines of each log without times, and of all the others together."""
    timed: deque[Said] = deque(maxlen=count)
    for each in said:
        if each.at is None:
            yield each
        else:
            timed.append(each)
    yield from timed


def _follow(root: Path, wanted: set[int], begin: float, count: int | None, printer: Printer) -> None:
    """What there is, and then what comes, until the run is over."""
    _note_if_empty(root, printer)
    readers, _ = _readers(root, wanted, begin, count)
    by_path = {reader.path: reader for reader in readers}
    folding = Folding()
    told = 0
    is_first, asked = True, time.monotonic()
    while True:
        is_over = over(root)
        if time.monotonic() - asked >= _ASK_SECONDS:
            asked = time.monotonic()
            is_over = is_over or _job_is_gone(root)
        for path, source in _paths(root, wanted).items():
            by_path.setdefault(path, LogReader(path, source))
        seen = folding.count
        new = list(_events(root, wanted))
        units = merged([*(r.units(final=is_over) for r in by_path.values()), iter(new[told:])])
        told = len(new)
        shown = _unfolded(units, folding, begin)
        for each in _last_of_each_kind(shown, count) if is_first and count is not None else shown:
            printer.said(each)
        # What was read a poll ago has had the time to be said by others, too.
        for each in folding.rest() if is_over else folding.up_to(seen):
            printer.said(each)
        printer.flush()
        is_first = False
        if is_over:
            break
        # A thousand logs are a thousand files to open, on a file system that others use, too.
        time.sleep(_POLL_SECONDS * (1 + len(by_path) / 200))
    _say_end(root, printer)


def _unfolded(units: Iterable[Unit], folding: Folding, begin: float) -> Iterator[Said]:
    for unit in units:
        if unit.at is None or unit.at >= begin:
            yield from folding.add(unit)


def _say_end(root: Path, printer: Printer) -> None:
    printer.line("")
    if (failure := first_failure(root)) is not None:
        printer.failure(failure)
    printer.note(f"--- the run has ended; `sft-dist status {root}` says how ---")


def _readers(root: Path, wanted: set[int], begin: float, count: int | None) -> tuple[list[LogReader], bool]:
    """A reader of each log from where it is needed on, and whether something is left out before."""
    readers, is_cut = [], False
    for path, source in _paths(root, wanted).items():
        offset = since(path, begin) if begin > 0 else 0
        if count is not None:
            last = last_lines(path, count)
            is_cut |= last > offset
            offset = max(offset, last)
        readers.append(LogReader(path, source, offset))
    return readers, is_cut


def _paths(root: Path, wanted: set[int]) -> dict[Path, int]:
    """The logs that are wanted, each with its source; the job's own output where no rank is asked for."""
    found = {} if wanted else dict.fromkeys(job_logs(root), JOB)
    return found | {path: rank for rank, path in rank_logs(root).items() if not wanted or rank in wanted}


def _events(root: Path, wanted: set[int]) -> Iterator[Unit]:
    return iter(()) if wanted else events(read_attempts(SlurmDir(root)))


def _on_slurm(root: Path) -> bool:
    return SlurmDir(root).submission.exists()


def _job_is_gone(root: Path) -> bool:
    """Whether Slurm knows nothing more of the run's job, or that it has ended."""
    from launch.slurm import queue
    from launch.slurm.records import read_submission

    submission = read_submission(SlurmDir(root))
    if submission is None or submission.job_id is None:
        return False
    found = queue.answer(submission.job_id)
    return not found.is_down and (found.job is None or found.job.has_ended)


def _ranks(words: Sequence[str]) -> set[int]:
    found: set[int] = set()
    for word in (part for text in words for part in text.split(",")):
        match = re.fullmatch(r"(\d{1,6})(?:-(\d{1,6}))?", word.strip())
        if match is None or (match[2] and int(match[2]) < int(match[1])):
            raise UserError(f"--rank: {word!r} is no rank; write 3, 0-7 or 0,3")
        found.update(range(int(match[1]), int(match[2] or match[1]) + 1))
    return found


def _since(text: str | None, now: float) -> float:
    """Seconds since the epoch."""
    if text is None:
        return 0.0
    if (match := re.fullmatch(r"(\d{1,9}(?:\.\d+)?)\s*([smhd])", text.strip())) is not None:
        return now - float(match[1]) * _UNIT_SECONDS[match[2]]
    try:
        return datetime.fromisoformat(text.strip()).timestamp()
    except (ValueError, OverflowError, OSError):
        raise UserError(
            f"--since: {text!r} is no time; write 90s, 10m, 2h, 1d, or a time such as 2026-11-25T17:01"
        ) from None


def _count(text: str | None, begin: float) -> int | None:
    """None: all of them, which a beginning in time asks for."""
    if text is None:
        return None if begin > 0 else LINES
    if text == "all":
        return None
    if not text.isdecimal() or not 0 < int(text) < 10**9:
        raise UserError(f"--lines: {text!r} is no number of lines; write 1 or more, or all")
    return int(text)


def _there(known: dict[int, Path]) -> str:
    from launch.logs.printing import stretches

    return f"are those of ranks {stretches(known)}" if known else "are none yet"
