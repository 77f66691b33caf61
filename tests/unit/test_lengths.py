"""The report of lengths: its figures, its histogram in the terminal and as a picture, and the command."""

from __future__ import annotations

import io
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from sft_dist.data.arrangement import Arrangement
from sft_dist.errors import UserError
from sft_dist.lengths import counted, report_of
from sft_dist.recipe import load_recipe
from sft_dist.render.lengths import Figures, LengthReport, Source, bin_edges, to_svg, to_terminal
from tests import tiny
from tests.recipes import ROOT, sft_dist, small_recipe

SOURCE = Source("a-model", "some-data (train)", 2048, (("packed", "12 rows"),))
DRAW = np.random.default_rng(0)
LENGTHS = np.clip(DRAW.lognormal(np.log(300), 0.8, 20_000), 1, 2048).astype(int)
REPORT = LengthReport.of(LENGTHS, LENGTHS // 2 + 1, SOURCE)


def shown(report: LengthReport, width: int = 80, colour: bool = False) -> str:
    file = io.StringIO()
    to_terminal(report, Console(file=file, width=width, force_terminal=colour, _environ={}))
    return file.getvalue()


def rows_of(lists: list[list[int]]) -> object:
    from datasets import Dataset

    trained = [sum(label != -100 for label in labels) for labels in lists]
    return Dataset.from_dict({"labels": lists, "length": list(map(len, lists)), "trained": trained})


def test_figures_are_those_of_the_rows() -> None:
    figures = Figures.of(np.arange(1, 201))
    assert figures == Figures(least=1, median=100.5, mean=100.5, p90=180, p99=198, most=200, total=20100)


@given(st.integers(1, 300_000), st.none() | st.integers(2, 200_000))
def test_every_row_has_a_bin_and_the_bins_end_at_the_limit(longest: int, limit: int | None) -> None:
    edges = bin_edges(longest, limit)
    assert edges[0] == 0
    assert edges[-1] >= longest
    assert list(edges) == sorted(set(edges))
    assert len(edges) <= 20
    if limit is not None and longest <= limit <= 4 * longest:
        assert edges[-1] == limit


def test_edges_are_round() -> None:
    assert bin_edges(2000, 2048) == tuple(range(0, 2049, 128))
    assert bin_edges(900, 1000) == tuple(range(0, 1001, 100))
    assert bin_edges(300, 8192)[:3] == (0, 20, 40)
    assert bin_edges(3, None) == (0, 1, 2, 3)


def test_a_row_at_the_limit_is_in_the_last_bin_and_counted() -> None:
    report = LengthReport.of([1, 16, 17, 256], [1, 1, 1, 255], Source("m", "d", 256))
    assert report.edges[:3] == (0, 16, 32)
    assert report.token_bins == (2, 1, *[0] * 13, 1)
    assert report.at_limit == 1
    assert "max_length is 256: 1 row (25%) is as long." in shown(report)


@pytest.mark.parametrize(("tokens", "trained"), [([], []), ([1, 2], [1])])
def test_a_report_of_no_rows_is_refused(tokens: list[int], trained: list[int]) -> None:
    with pytest.raises(ValueError, match="at least one"):
        LengthReport.of(tokens, trained, SOURCE)


def test_the_terminal_shows_every_figure_and_fits_80_columns() -> None:
    text = shown(REPORT)
    assert max(map(len, text.splitlines())) <= 80
    assert "\x1b" not in text
    for told in ("a-model", "some-data (train)", "12 rows", f"{REPORT.tokens.total:,}", f"{REPORT.trained.p99:,}"):
        assert told in text
    for bins in (REPORT.token_bins, REPORT.trained_bins):
        assert all(f" {rows:,}" in text for rows in bins if rows)


def test_bars_are_as_long_as_there_are_rows_and_a_single_row_shows() -> None:
    report = LengthReport.of([8] * 800 + [30] * 400 + [64], [60] * 1201, Source("m", "d", 64))
    lines = {line.split()[0]: line for line in shown(report).splitlines() if line.strip()}
    assert lines["5-8"].count("█") == pytest.approx(2 * lines["29-32"].count("█"), abs=1)
    assert lines["61-64"].split()[1:] == ["▏", "1"]


@pytest.mark.parametrize("width", [20, 60, 80, 200])
@pytest.mark.parametrize("colour", [False, True])
def test_any_width_will_do(width: int, colour: bool) -> None:
    assert "rows, by" in shown(REPORT, width, colour) or width == 20


def test_a_stream_that_is_not_utf8_gets_plain_bars() -> None:
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding="latin-1")
    to_terminal(REPORT, Console(file=stream, width=80, _environ={}))
    stream.flush()
    assert b"####" in raw.getvalue()
    assert b"\\u" not in raw.getvalue()


def test_the_picture_holds_both_histograms_and_the_limit() -> None:
    root = ET.fromstring(to_svg(REPORT))
    bars = [e.get("class") for e in root.iter("{http://www.w3.org/2000/svg}rect")]
    assert bars.count("all") == sum(1 for rows in REPORT.token_bins if rows)
    assert bars.count("trained") == sum(1 for rows in REPORT.trained_bins if rows)
    text = "".join(root.itertext())
    for told in ("Tokens per row", "some-data (train)", "max_length 2,048", "20,000 rows", "trained tokens", "1,024"):
        assert told in text
    assert "prefers-color-scheme: dark" in text
    assert bars[0] == "paper"


def test_the_picture_needs_nothing_from_elsewhere_and_holds_no_markup_of_theirs() -> None:
    svg = to_svg(LengthReport.of([1], [1], Source('<script x="y">', "a & b", 4)))
    assert "<script" not in svg
    ET.fromstring(svg)
    assert "url(" not in svg


def test_rows_are_counted_through_a_selection() -> None:
    rows = rows_of([[-100, 5, 6], [-100, -100, 7], [1], [-100, 2]])
    assert [part.tolist() for part in counted(rows)] == [[3, 3, 1, 2], [2, 1, 1, 1]]
    assert [part.tolist() for part in counted(rows.select([3, 0]))] == [[2, 3], [1, 2]]  # type: ignore[attr-defined]


def test_importing_the_view_loads_no_torch() -> None:
    program = "import sys, sft_dist.render.lengths; print(sorted({'torch', 'transformers', 'rich'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_the_report_is_that_of_the_rows_of_a_run(tmp_path: Path) -> None:
    file = small_recipe(tmp_path, tiny.save_model(tmp_path / "base"))
    recipe = load_recipe(str(file), ["data.packing=true", "train.max_length=128"])
    report = report_of(recipe, "train")
    assert (report.rows, report.tokens.most) == (45, 128)
    facts = dict(report.source.facts)
    assert f"{report.at_limit:,} cut to the limit" in facts["rows"]
    tokens, _ = counted(_prepared(recipe))
    arrangement = Arrangement(tokens, 128, recipe.train.seed)
    assert facts["packed"] == f"45 documents in {len(arrangement)} rows of 128 tokens, {arrangement.fill():.1%} full"
    held_out = report_of(recipe, "test")
    assert held_out.rows == 7
    assert "packed" not in dict(held_out.source.facts)


def _prepared(recipe: object) -> object:
    from sft_dist.data.prepare import prepare
    from sft_dist.data.template import load_template
    from sft_dist.data.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(recipe.model.model_name_or_path, recipe.model)  # type: ignore[attr-defined]
    return prepare(recipe, load_template(tokenizer, recipe.data), 128)[0].rows  # type: ignore[attr-defined, arg-type]


def test_a_stream_and_a_split_that_is_not_there_are_told_with_their_keys(tmp_path: Path) -> None:
    file = small_recipe(tmp_path, tiny.save_model(tmp_path / "base"))
    recipe = load_recipe(str(file), ["data.dataset_test_split=null"])
    with pytest.raises(UserError, match=r"data\.dataset_test_split: the recipe names no held-out split"):
        report_of(recipe, "test")
    stream = recipe.model_copy(update={"data": recipe.data.model_copy(update={"streaming": True})})
    with pytest.raises(UserError, match=r"data\.streaming: "):
        report_of(stream, "train")


def test_lengths_shows_how_long_the_rows_are_and_writes_the_picture(tmp_path: Path) -> None:
    file = small_recipe(tmp_path, tiny.save_model(tmp_path / "base"))
    done = sft_dist(tmp_path, "lengths", str(file), "train.max_length=128", "--image", str(tmp_path / "l.svg"))
    assert done.returncode == 0, done.stderr
    assert "tokens per row" in done.stdout
    assert "max_length is 128" in done.stdout
    ET.parse(tmp_path / "l.svg")
