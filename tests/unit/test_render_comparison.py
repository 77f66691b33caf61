"""A comparison tells a stranger what training changed, at any width, on paper and in a file."""

from __future__ import annotations

import io
import math
import re
from dataclasses import replace
from html.parser import HTMLParser

import pytest
from rich.cells import cell_len
from rich.console import Console

from sft_dist.render.comparison import Answer, Comparison, Figure, Measure, to_html, to_terminal
from sft_dist.render.curve import Curve, learning_curve_svg

BEFORE = Measure(perplexity=12.3412, loss=2.51294, tokens=12345, records=200)
AFTER = Measure(perplexity=8.2063, loss=2.10490, tokens=12345, records=200)
CODE = "Call `reverse`:\n\n```python\nxs.reverse()\n```\nIn place."
ANSWERS = (
    Answer((("system", "Be brief."), ("user", "Reverse a list?")), "Slice it.", "No. <b>x</b> [red]y[/red]", CODE),
    Answer((("user", "用中文解释生成器 👩‍💻"),), "一种迭代器。", "生成器是什么。" * 30, "按需产生值 🎉 " + "y" * 200),
    Answer((("user", "Why? " * 200),), "So.", "", "\n".join(f"line {n}" for n in range(40))),
    Answer((("user", "fourth question"),), "r", "b", "a"),
)
FACTS = (("processes", "2"), ("tokens/s", "372"), ("answers", "runs/" + "long-name/" * 12 + "comparison.html"))
WHOLE = Comparison("my-run", "a-model", "some-data", BEFORE, AFTER, ANSWERS, FACTS)


def shown(comparison: Comparison = WHOLE, width: int = 100, max_answers: int = 3) -> str:
    stream = io.StringIO()
    to_terminal(comparison, Console(file=stream, width=width, _environ={}), max_answers)
    return stream.getvalue()


class Tags(HTMLParser):
    def __init__(self, page: str) -> None:
        super().__init__()
        self.names: set[str] = set()
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.names.add(tag)


def with_(answers: tuple[Answer, ...]) -> Comparison:
    return replace(WHOLE, answers=answers)


def test_perplexity_before_and_after_and_what_that_is() -> None:
    (row,) = [line for line in shown().splitlines() if "perplexity" in line]
    assert re.findall(r"[-\w.%]+", row) == ["perplexity", "12.34", "8.21", "-33.5%", "better"]
    assert "12,345 response tokens of 200 held-out records" in shown()


def test_a_model_that_got_worse_is_said_to_be_worse() -> None:
    assert "+50.4% worse" in shown(replace(WHOLE, before=AFTER, after=BEFORE))
    assert "worse" in to_html(replace(WHOLE, before=AFTER, after=BEFORE))


def test_no_change_is_neither() -> None:
    output = shown(replace(WHOLE, after=replace(BEFORE, perplexity=BEFORE.perplexity + 1e-6)))
    assert "0.0%" in output
    assert not re.search("better$|worse", output, re.MULTILINE)


@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_a_perplexity_that_is_no_number_is_shown_as_such(value: float) -> None:
    broken = replace(BEFORE, perplexity=value, loss=value)
    for one in (
        replace(WHOLE, before=broken),
        replace(WHOLE, after=broken),
        replace(WHOLE, before=broken, after=broken),
    ):
        for output in (shown(one), to_html(one)):
            assert ("∞" if math.isinf(value) else "NaN") in output
            assert not re.search(r"\d%.*(better|worse)", output)


def test_other_figures_stand_before_and_after_with_what_that_is() -> None:
    figures = (Figure("margin", 0.0, 0.33, "higher"), Figure("a <loss>", 0.6, 0.7, "lower"), Figure("KL", None, 0.01))
    told = replace(WHOLE, lead=Figure("ranked right", 0.5, 0.75, "higher"), figures=figures)
    rows = {line.split("│")[1].strip(): line for line in shown(told).splitlines() if line.count("│") == 5}
    assert "perplexity" not in rows and "Lower is better" not in shown(told)
    assert rows["ranked right"].split() == [
        "│",
        "ranked",
        "right",
        "│",
        "0.500",
        "│",
        "0.750",
        "│",
        "+0.250",
        "better",
        "│",
    ]
    assert "+0.330 better" in rows["margin"] and "+0.100 worse" in rows["a <loss>"]
    assert rows["KL"].split() == ["│", "KL", "│", "│", "0.010", "│", "│"]
    page = to_html(told)
    assert "<h2>Held out: ranked right</h2>" in page and "Held-out perplexity" not in page
    assert '<td>a &lt;loss&gt;</td><td>0.600</td><td>0.700</td><td class="bad">+0.100 worse</td>' in page
    assert "<td>KL</td><td></td><td>0.010</td><td></td>" in page


def test_measurements_over_different_tokens_are_not_passed_off_as_comparable() -> None:
    output = shown(replace(WHOLE, before=replace(BEFORE, tokens=9)), width=200)
    assert "over 9 response tokens of 200 held-out records: the two do not compare" in output


@pytest.mark.parametrize("width", [80, 100, 140])
def test_columns_line_up_and_stay_within_the_width(width: int) -> None:
    lines = shown(width=width).splitlines()
    answers = lines[lines.index("Answer 1 of 4, after 1 earlier turn") :]
    assert {cell_len(line) for line in answers if line.startswith(("╭", "├", "│", "╰"))} == {width}
    facts = {f"{name:<9}  {value}" for name, value in FACTS}
    assert all(cell_len(line) <= width for line in lines if line not in facts)


def test_before_and_after_stand_side_by_side() -> None:
    (row,) = [line for line in shown().splitlines() if "<b>x</b>" in line]
    assert row.index("No. <b>x</b> [red]y[/red]") < 50 < row.index("Call `reverse`:")


def test_on_a_narrow_terminal_they_stand_one_below_the_other() -> None:
    output = shown(width=40).partition("Answer 1")[2]
    assert output.index("No. <b>x</b> [red]y[/red]") < output.index("│ after") < output.index("Call `reverse`:")


def test_long_answers_are_cut_to_twelve_lines_and_the_place_of_the_whole_is_told() -> None:
    output = shown(with_((ANSWERS[2],)))
    assert "line 10" in output
    assert "line 11" not in output
    assert "…" in output
    assert "Whole answers: see `answers` below." in output
    assert FACTS[2][1] in output.splitlines()[-1]


def test_an_answer_of_twelve_lines_is_not_cut() -> None:
    twelve = "\n".join(f"line {n}" for n in range(1, 13))
    output = shown(with_((replace(ANSWERS[3], after=twelve),)))
    assert "line 12" in output
    assert "…" not in output


def test_a_huge_answer_is_cut_without_being_laid_out_whole() -> None:
    assert len(shown(with_((replace(ANSWERS[3], after="word " * 2_000_000),)))) < 10_000


def test_answers_that_are_not_shown_are_counted() -> None:
    assert "1 more answer." in shown()
    assert "fourth question" not in shown()
    assert "fourth question" in shown(max_answers=4)
    assert "more answer" not in shown(max_answers=4)


def test_only_the_last_turn_of_a_prompt_is_shown_and_the_others_are_counted() -> None:
    assert "Answer 1 of 4, after 1 earlier turn\nuser: Reverse a list?\n" in shown()


def test_an_empty_answer_is_said_to_be_empty() -> None:
    assert "(empty)" in shown()
    assert '<p class="none">empty</p>' in to_html(WHOLE)


def test_nothing_measured_and_nothing_answered() -> None:
    nothing = Comparison("t", "m", "d", None, None, (), ())
    assert "not measured" in shown(nothing)
    assert "Not measured." in to_html(nothing)
    assert "No prompts were answered." in to_html(nothing)


def test_one_model_alone_is_not_called_after() -> None:
    alone = replace(WHOLE, before=None, answers=tuple(replace(answer, before=None) for answer in ANSWERS))
    output = shown(alone)
    assert "8.21" in output
    assert "line 3" in output
    assert not re.search(r"\b(before|after|change)\b(?! \d)", output)
    assert ">before<" not in to_html(alone)
    assert ">after<" not in to_html(alone)


def test_before_alone_is_before() -> None:
    alone = replace(
        WHOLE, after=None, answers=(replace(ANSWERS[0], after=None), replace(ANSWERS[0], before=None, after=None))
    )
    assert "12.34" in shown(alone)
    assert "(not answered)" in shown(alone)
    assert ">before<" in to_html(alone)


@pytest.mark.parametrize("width", [1, 2, 5, 9, 17, 59, 60, 61, 500])
def test_any_width_will_do(width: int) -> None:
    assert "372" in shown(width=width)
    shown(replace(WHOLE, before=None, facts=()), width=width)


def test_the_terminal_obeys_nothing_in_a_text() -> None:
    evil = Answer((("us\x1ber", "\x1b[2Jq"),), "", "\x1b]0;x\x07", ":smile: [/] \u202e")
    output = shown(replace(WHOLE, title="t\x1b", answers=(evil,), facts=(("\x1bk", "v\x1b"),)))
    assert not {"\x1b", "\x07", "\u202e"} & set(output)
    assert ":smile: [/]" in output


def test_a_page_shows_every_answer_whole_with_prompt_and_reference() -> None:
    page = to_html(WHOLE)
    for text in ("line 39", "Be brief.", "Slice it.", "fourth question", "12.34", "8.21", "-33.5%", "372", FACTS[2][1]):
        assert text in page


def test_code_between_fences_is_monospaced_on_a_page() -> None:
    assert '<pre class="code"><code>xs.reverse()</code></pre><p class="prose">In place.</p>' in to_html(WHOLE)


def test_code_whose_fence_was_never_closed_is_code_to_the_end() -> None:
    cut = with_((replace(ANSWERS[3], after="So:\n````\n```\n<i>\n  deep"),))
    assert '<pre class="code"><code>```\n&lt;i&gt;\n  deep</code></pre>' in to_html(cut)


def test_a_page_holds_no_markup_of_the_texts() -> None:
    evil = "</p></pre><script>x</script><img src=x>\n```<b>\n</code><script>\n```"
    curve = Curve(((1, 2.0), (2, 1.0)))
    page = to_html(
        Comparison(
            evil, evil, evil, BEFORE, AFTER, (Answer(((evil, evil),), evil, evil, evil),), ((evil, evil),), curve
        )
    )
    assert not {"script", "img", "b"} & Tags(page).names
    assert not re.search(r"(?i)<script|<link|@import|url\(|https?:", page)


def test_the_learning_curve_is_on_the_page_when_there_is_one() -> None:
    assert "<svg" not in to_html(WHOLE)
    page = to_html(replace(WHOLE, curve=Curve(((1, 2.5), (2, 2.0)), ((2, 2.2),))))
    for text in ("<polyline", "optimizer step", "loss (nats per token)", ">training<", ">held out<"):
        assert text in page


@pytest.mark.parametrize(
    "points",
    [
        [(0, 2.0)],
        [(0, 2.0), (10, 2.0)],
        [(5, 0.0), (5, 0.0)],
        [(1, 1e-9), (2, 2e-9)],
        [(1, 1e9), (10**9, 3e9)],
        [(1, math.nan), (2, 1.0), (3, math.inf)],
        [(n, 3.0 - n * 1e-5) for n in range(50_000)],
    ],
)
def test_every_point_of_a_curve_lies_inside_its_axes(points: list[tuple[int, float]]) -> None:
    svg = learning_curve_svg(points)
    places = re.findall(r"(-?[\d.]+),(-?[\d.]+)", "".join(re.findall(r'points="(.*?)"', svg)))
    places += re.findall(r'cx="(-?[\d.]+)" cy="(-?[\d.]+)"', svg)
    assert places
    assert all(58 <= float(x) <= 704 and 34 <= float(y) <= 254 for x, y in places)
    assert len(svg) < 40_000
    labels = re.findall(r'text-anchor="end"[^>]*>([^<]+)<', svg)
    assert len(labels) == len(set(labels)) >= 2


def test_a_curve_of_many_points_keeps_its_spikes() -> None:
    points = [(n, 9.0 if n == 33_333 else 1.0) for n in range(50_000)]
    heights = re.findall(r",([\d.]+)", re.findall(r'points="(.*?)"', learning_curve_svg(points))[0])
    assert len(set(heights)) == 2


def test_no_point_is_no_curve() -> None:
    assert learning_curve_svg([]) == ""
    assert learning_curve_svg([(1, math.nan)], [(2, math.inf)]) == ""
    assert "<svg" not in to_html(replace(WHOLE, curve=Curve(())))


def test_the_same_comparison_gives_the_same_output() -> None:
    assert to_html(WHOLE) == to_html(WHOLE)
    assert shown() == shown()
