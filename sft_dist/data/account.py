"""What became of the records of a split, and the lines that tell people. Free of torch."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from sft_dist.errors import DataError

# Left-out records that are named; the others are counted only, so that an account stays small.
NAMED = 100
# Characters of a line about one record; a column's name or a template's complaint may be of any length.
_LONGEST_LINE = 500


@dataclass
class Account:
    """Counts of records, rows and tokens. `bad` and `untrained` name the first `NAMED` of those they are about.

    Each record is counted once among `bad_count`, `duplicates`, `untrained_count`, `too_long`, `too_short_response`
    and `too_long_response`, or has become rows: one, or several where it is one of `split`. `encoder` is what
    turned text into ids.
    """

    records: int = 0
    bad: list[str] = field(default_factory=list)
    bad_count: int = 0
    untrained: list[str] = field(default_factory=list)
    untrained_count: int = 0
    too_long: int = 0
    too_short_response: int = 0
    too_long_response: int = 0
    duplicates: int = 0
    truncated: int = 0
    split: int = 0
    rows: int = 0
    tokens: int = 0
    trained_tokens: int = 0
    format: str = ""
    encoder: str = ""

    def note_bad(self, line: str, most: int) -> None:
        """Count a bad record; :class:`DataError` when there are more than `most`."""
        line = one_line(line)
        self.bad_count += 1
        if len(self.bad) < NAMED:
            self.bad.append(line)
        if self.bad_count <= most:
            return
        if most == 0:
            raise DataError(f"{line}; mend it, or skip so many by data.max_bad_records")
        raise DataError(f"{line}; it is bad record number {self.bad_count}, and data.max_bad_records is {most}")

    def note_untrained(self, wheres: Iterable[str]) -> None:
        """Count records in which nothing is trained."""
        for where in wheres:
            self.untrained_count += 1
            if len(self.untrained) < NAMED:
                self.untrained.append(where)


def one_line(text: str) -> str:
    """A text of any origin as one printable line of bounded length."""
    start = text[:_LONGEST_LINE]
    line = "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in start)
    return line if len(text) <= _LONGEST_LINE else f"{line}…"


def dropped(account: Account) -> list[str]:
    """What was left out and why, a phrase for each reason that there was."""
    reasons = (
        (account.bad_count, "bad"),
        (account.duplicates, "equal to an earlier one"),
        (account.too_long, "longer than train.max_length"),
        (account.untrained_count, "without a trained token"),
        (account.too_short_response, "below data.min_response_length"),
        (account.too_long_response, "above data.max_response_length"),
    )
    return [f"{count:,} {reason}" for count, reason in reasons if count]


def summary_lines(name: str, account: Account) -> list[str]:
    """What became of a split's records, in one line, and a second one where some were left out or cut."""
    share = account.trained_tokens / max(account.tokens, 1)
    read = f"{account.rows:,} rows of {account.records:,} records ({account.format})"
    lines = [f"{name}: {read}, {account.tokens:,} tokens, {account.trained_tokens:,} trained ({share:.0%})"]
    notes = [f"{account.truncated:,} truncated"] if account.truncated else []
    notes += [f"{account.split:,} split into several rows"] if account.split else []
    left_out = dropped(account)
    notes += [f"left out: {', '.join(left_out)}"] if left_out else []
    # The names alone are of no interest to people, for the ids are the same.
    notes += [f"ids by {account.encoder}"] if " " in account.encoder else []
    if notes:
        lines.append(f"  {'; '.join(notes)}")
    return lines
