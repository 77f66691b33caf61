"""Numbers in words, the same in the terminal and on the page."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from sft_dist.render.comparison import Measure

T = TypeVar("T")


def number(value: float, digits: int = 2) -> str:
    """A loss or a perplexity, with `digits` after the point where it is below a thousand."""
    if not math.isfinite(value):
        return "NaN" if math.isnan(value) else "∞" if value > 0 else "-∞"
    if abs(value) >= 1e6:
        return f"{value:.2e}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.{digits}f}"


def change(before: float, after: float) -> tuple[str, str]:
    """The relative change of a perplexity, such as `-33.5%`, and what that is: `better`, `worse` or nothing.

    The percentage is empty where there is none to tell, as from infinity.
    """
    verdict = "better" if after < before else "worse" if after > before else ""
    if not (math.isfinite(before) and math.isfinite(after)) or before == 0:
        return "", verdict
    text = f"{(after - before) / abs(before):+.1%}"
    return ("0.0%", "") if text in ("+0.0%", "-0.0%") else (text, verdict)


def difference(before: float, after: float) -> str:
    """The difference of two losses, signed; empty where one is not finite."""
    return f"{after - before:+.3f}" if math.isfinite(before) and math.isfinite(after) else ""


def count(amount: int, noun: str) -> str:
    """`1 record`, `1,200 records`."""
    return f"{amount:,} {noun}" + ("" if amount == 1 else "s")


def duration(seconds: float) -> str:
    """`48 s`, `5 min 3 s`, `2 h 10 min`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def share(part: int, whole: int) -> str:
    """A share in whole percent that is 0% or 100% only where it is exactly that."""
    if not 0 < part < whole:
        return "100%" if 0 < whole <= part else "0%"
    percent = 100 * part / whole
    return "<1%" if percent < 1 else f"{min(round(percent), 99)}%"


def sides(before: T | None, after: T | None, alone: str) -> list[tuple[str, T]]:
    """What there is to show, each with its heading; `alone` heads a value that has no `before` to stand against."""
    shown = [("before", before)] if before is not None else []
    if after is not None:
        shown.append(("after" if shown else alone, after))
    return shown


def measured_on(before: Measure | None, after: Measure | None, lower_is_better: bool = True) -> str:
    """What the measurements are over, in a sentence; a difference between the two is said."""
    first, last = before or after, after or before
    if first is None or last is None:
        return ""
    text = f"Over {_over(last)}." + " Lower is better." * lower_is_better
    if (first.tokens, first.records) != (last.tokens, last.records):
        text += f" Before, it was over {_over(first)}: the two do not compare."
    return text


def _over(measure: Measure) -> str:
    return f"{count(measure.tokens, 'response token')} of {count(measure.records, 'held-out record')}"
