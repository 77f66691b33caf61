"""The table and the picture of a sweep."""

from __future__ import annotations

import io
import itertools
import xml.etree.ElementTree as ElementTree
from typing import Any

import pytest
from rich.console import Console

from sft_dist.render.axis import LogAxis
from sft_dist.render.sweep import Row, SweepReport, Varied, edge_lines, to_terminal
from sft_dist.render.sweep_picture import sweep_svg

SVG = "{http://www.w3.org/2000/svg}"


def report(varied: Varied, values: list[Any], metrics: list[float | None], greater: bool = False) -> SweepReport:
    """A trial for each value; those without a metric have failed."""
    rows = [
        Row(f"trial-{n:03}", {varied.key: one}, metric, "done" if metric is not None else "failed",
            None if metric is not None else "out of memory", 10.0, 5, 70.0, "x")
        for n, (one, metric) in enumerate(zip(values, metrics, strict=True))
    ]  # fmt: skip
    rows.sort(key=lambda row: (row.metric is None, (-1 if greater else 1) * (row.metric or 0)))
    return SweepReport("study", "eval_loss", greater, (varied,), tuple(rows))


def listed(key: str, *values: Any) -> Varied:
    return Varied(key, key.rpartition(".")[2], values, log=False)


def picture(of: SweepReport) -> ElementTree.Element:
    return ElementTree.fromstring(sweep_svg(of))


def places(root: ElementTree.Element, style: str) -> list[float]:
    """Horizontal places of the dots of a style."""
    return sorted(float(dot.attrib["cx"]) for dot in root.iter(f"{SVG}circle") if dot.attrib["class"] == style)


def texts(root: ElementTree.Element) -> list[str]:
    return ["".join(text.itertext()) for text in root.iter(f"{SVG}text")]


def test_values_over_decades_are_equal_factors_apart() -> None:
    rates = [1e-5, 1e-4, 1e-3, 1e-2]
    root = picture(report(listed("train.learning_rate", *rates), rates, [3.0, 2.0, 1.0, 4.0]))
    xs = sorted([*places(root, "dot"), *places(root, "best")])
    gaps = [b - a for a, b in itertools.pairwise(xs)]
    assert max(gaps) - min(gaps) < 0.2 and len(xs) == 4
    assert {"1e-05", "0.0001", "0.001", "0.01", "train.learning_rate"} <= set(texts(root))


def test_values_of_one_decade_are_where_they_are() -> None:
    sizes = [1, 2, 4]
    root = picture(report(listed("a.b", *sizes), sizes, [3.0, 2.0, 1.0]))
    one, two, four = sorted([*places(root, "dot"), *places(root, "best")])
    assert (four - one) / (two - one) == pytest.approx(3, abs=0.01)


def test_a_range_has_an_axis_that_can_be_read() -> None:
    values = [0.0031, 0.044, 0.0976]
    root = picture(report(Varied("train.weight_decay", "weight_decay", None, log=False), values, [1.0, 2.0, 3.0]))
    assert {"0.00", "0.05", "0.10"} <= set(texts(root))


def test_the_best_has_a_ring_and_failed_trials_are_crosses() -> None:
    root = picture(report(listed("a.b", 1, 2, 3), [1, 2, 3], [3.0, 1.0, None]))
    rings = [dot for dot in root.iter(f"{SVG}circle") if dot.attrib["class"] == "ring"]
    assert len(rings) == 1 and float(rings[0].attrib["cx"]) == places(root, "best")[0]
    crosses = [path for path in root.iter(f"{SVG}path") if path.attrib["class"] == "cross"]
    assert len(crosses) == 1 and "".join(crosses[0].itertext()) == "trial-002: b 3: failed: out of memory"


def test_words_are_set_side_by_side_and_harmless() -> None:
    names = ["python-docs", "<b>&\x1b[31m.jsonl", True]
    root = picture(report(listed("data.dataset_name", *names), names, [1.0, 2.0, 3.0]))
    xs = sorted([*places(root, "dot"), *places(root, "best")])
    assert xs[1] - xs[0] == pytest.approx(xs[2] - xs[1], abs=0.2)
    assert not list(root.iter(f"{SVG}polyline")), "words have no order that a line could follow"
    assert "\x1b" not in sweep_svg(report(listed("data.dataset_name", *names), names, [1.0, 2.0, 3.0]))


def test_a_picture_without_a_number_is_still_one() -> None:
    assert "no trial is done yet" in texts(picture(report(listed("a.b", 1, 2), [1, 2], [None, None])))
    assert picture(report(listed("a.b", 5), [5], [0.0])) is not None


def test_the_axis_of_factors_has_ticks_within_it() -> None:
    for low, high in ((1e-6, 1e-3), (4, 64), (3, 7), (5, 5), (1e-9, 1e9)):
        axis = LogAxis.over_factors(low, high, 0, 100)
        assert 1 <= len(axis.ticks) <= 12
        assert all(-1e-6 <= axis.at(tick) <= 100 + 1e-6 for tick in axis.ticks)


def test_the_table_says_where_the_best_lies_at_the_edge() -> None:
    varied = listed("train.learning_rate", 1e-5, 1e-4, 1e-3)
    rates = [1e-5, 1e-4, 1e-3]
    assert edge_lines(report(varied, rates, [3.0, 2.0, 1.0])) == [
        "learning_rate: the best, 0.001, is the largest of 3; a better one may lie above"]  # fmt: skip
    (line,) = edge_lines(report(varied, rates, [3.0, 4.0, 5.0]))
    assert line.endswith("the best, 1e-05, is the smallest of 3; a better one may lie below")
    assert edge_lines(report(varied, rates, [3.0, 1.0, 2.0])) == []
    assert edge_lines(report(listed("a.b", 1, 2), [1, 2], [1.0, 2.0])) == [], "of two, one is always at an edge"


def test_no_value_is_cut_where_the_table_goes_to_a_file() -> None:
    names = [f"folder/{'long' * 4}-{n}.jsonl" for n in range(3)]
    varied = tuple(Varied(f"data.key_{n}", f"a_very_long_name_of_a_key_{n}", tuple(names), log=False) for n in range(5))
    rows = [
        Row(f"trial-{n:03}", {v.key: names[n] for v in varied}, 1.0, "done", None, 1.0, 1, 1.0, "x") for n in range(3)
    ]
    file = io.StringIO()
    to_terminal(SweepReport("s", "eval_loss", False, varied, tuple(rows)), Console(file=file, width=80))
    lines = [line for line in file.getvalue().splitlines() if line.lstrip("* ").startswith("trial-")]
    assert len(lines) == 3 and all(line.count(f"-{n}.jsonl") == 5 for n, line in enumerate(lines))
