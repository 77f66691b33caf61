"""The work of `sft-dist score`: a line of JSON for each record, and what they come to."""

from __future__ import annotations

import itertools
import json
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from sft_dist.config import DataSection, ModelSection
from sft_dist.data.files import RawRecord
from sft_dist.data.sources import open_source
from sft_dist.data.template import load_template
from sft_dist.errors import DataError, UserError
from sft_dist.render.wording import count
from sft_dist.reward_model import RewardModel, load_reward_model
from sft_dist.score.records import Asked, Asker

# Records whose rows are sorted by length together.
_AT_ONCE = 512


@dataclass
class Tally:
    """What was scored. `right`: pairs whose chosen side has the higher reward; `ties`: those of equal rewards."""

    records: int = 0
    faults: int = 0
    rewards: int = 0
    total: float = 0.0
    pairs: int = 0
    right: int = 0
    ties: int = 0

    def lines(self) -> list[str]:
        """For people."""
        mean = f", mean {self.total / self.rewards:.4f}" if self.rewards else ""
        told = [f"{count(self.records, 'record')}, {count(self.rewards, 'reward')}{mean}"]
        if self.faults:
            told.append(f"without a reward for a fault: {self.faults:,}")
        if self.pairs:
            ties = f" ({count(self.ties, 'tie')})" if self.ties else ""
            told.append(f"accuracy: {self.right / self.pairs:.1%} of {count(self.pairs, 'pair')}{ties}")
        return told


def score(model: str, data: DataSection, split: str, output: Path | None, batch_size: int, dtype: str) -> None:
    """Give a reward for each record of a split, as JSON on standard output or in a file, in their order.

    A line has `where` and `reward`; of a pair `chosen_reward`, `rejected_reward` and `margin`; of a record with a
    fault, of which there may be `data.max_bad_records`, `fault`. Raises :class:`UserError`.
    """
    # Before the model, which takes long to load.
    records = open_source(data, split, "FILE").raw()
    first = next(records, None)
    if first is None:
        raise DataError(f"FILE: {data.dataset_name} holds no record; give data")
    tally = Tally()
    with _opened(output) as file:
        judge = load_reward_model(model, ModelSection(model_name_or_path=model, dtype=dtype))
        template = load_template(judge.tokenizer, data)
        asker = Asker(template, judge.limit, "" if data.format == "auto" else data.format, data.formatting)
        for batch in _batches(itertools.chain([first], records)):
            for line in _lines(asker(batch), judge, batch_size, data.max_bad_records, tally):
                file.write(json.dumps(line, ensure_ascii=False) + "\n")
            file.flush()
    print(*tally.lines(), sep="\n", file=sys.stderr)


def _batches(records: Iterator[RawRecord]) -> Iterator[list[RawRecord]]:
    while batch := list(itertools.islice(records, _AT_ONCE)):
        yield batch


def _lines(
    asked: Sequence[Asked], judge: RewardModel, batch_size: int, most_faults: int, tally: Tally
) -> Iterator[dict[str, Any]]:
    for one in asked:
        if one.fault is not None:
            tally.faults += 1
            _refuse(one, tally.faults, most_faults)
            print(f"sft-dist: {one.where}: {one.fault}", file=sys.stderr)
    rewards = iter(judge.rewards([row.tolist() for one in asked for row in one.rows], batch_size))
    for one in asked:
        tally.records += 1
        found = [next(rewards) for _ in one.rows]
        tally.rewards += len(found)
        tally.total += sum(found)
        if one.fault is not None:
            yield {"where": one.where, "fault": one.fault}
        elif len(found) == 1:
            yield {"where": one.where, "reward": found[0]}
        else:
            chosen, rejected = found
            tally.pairs += 1
            tally.right += chosen > rejected
            tally.ties += chosen == rejected
            yield {"where": one.where, "chosen_reward": chosen, "rejected_reward": rejected,
                   "margin": chosen - rejected}  # fmt: skip


def _refuse(one: Asked, number: int, most: int) -> None:
    if most == 0:
        raise DataError(f"{one.where}: {one.fault}; mend it, or skip so many by --max-bad-records")
    if number > most:
        raise DataError(f"{one.where}: {one.fault}; it is bad record number {number}, and --max-bad-records is {most}")


@contextmanager
def _opened(output: Path | None) -> Iterator[TextIO]:
    """Standard output, or a file that gets its name when it is whole."""
    if output is None:
        try:
            yield sys.stdout
        except BrokenPipeError:
            # Who reads has seen enough; Python would say so once more at its end.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return
    unfinished = output.with_name(output.name + ".unfinished")
    try:
        with open(unfinished, "w", encoding="utf-8") as file:
            yield file
        os.replace(unfinished, output)
    except OSError as error:
        raise UserError(f"--output: {output} cannot be written: {error.strerror or error}; name another") from error
    finally:
        unfinished.unlink(missing_ok=True)
