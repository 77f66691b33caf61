"""A preview shows what is trained, hides nothing, and obeys no text it shows."""

from __future__ import annotations

import html
import io
import re
import subprocess
import sys
from html.parser import HTMLParser

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from sft_dist.render.preview import PreviewRecord, PreviewSummary, TokenSpan, to_html, to_terminal

SUMMARY = PreviewSummary("a-model", "the tokenizer's own chat template", "some-data (train)", 1)


def record(*spans: tuple[str, bool], tokens: int = 120, trained: int = 48, truncated: bool = False) -> PreviewRecord:
    return PreviewRecord(
        "train.jsonl record 7", tuple(TokenSpan(*span) for span in spans), tokens, trained, truncated, "messages"
    )


CHAT = record(
    ("<|im_start|>user\nWhy [bold red]so[/]?<|im_end|>\n<|im_start|>assistant\n", False),
    (" Because:\n\n\tx = 1  \n<|im_end|>", True),
    ("\n", False),
)


def shown(
    *records: PreviewRecord,
    width: int = 100,
    colour: bool = False,
    no_color: bool = False,
    like: PreviewSummary = SUMMARY,
) -> str:
    stream = io.StringIO()
    console = Console(
        file=stream,
        width=width,
        force_terminal=colour,
        color_system="truecolor" if colour else None,
        no_color=no_color,
        _environ={},
    )
    to_terminal(records, like, console)
    return stream.getvalue()


def read_back(output: str) -> list[str]:
    """What stands between the brackets of the records, with the marks taken out again."""
    _, _, body = output.partition("legend")
    found = re.findall(r"⟦(.*?)⟧", body.partition("\n")[2], re.DOTALL)
    plain = [text.replace("↵\n", "\n").replace("⇥   ", "\t") for text in found]
    return [re.sub(r"⟪U\+([0-9A-F]+)⟫", lambda m: chr(int(m[1], 16)), text) for text in plain]


class Page(HTMLParser):
    """Tags and texts of a page; `trained` is the text inside the marks, without what is only drawn."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.trained = ""
        self._open: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self._open.append(f"{tag} {dict(attrs).get('class')}")

    def handle_endtag(self, tag: str) -> None:
        while self._open and not self._open.pop().startswith(tag + " "):
            pass

    def handle_data(self, data: str) -> None:
        if "mark trained" in self._open and self._open[-1] != "span ws":
            self.trained += data


def test_without_colour_the_trained_text_stands_in_brackets() -> None:
    assert read_back(shown(CHAT)) == [CHAT.spans[1].text]


def test_no_color_on_a_terminal_gives_the_brackets_too() -> None:
    output = shown(CHAT, colour=True, no_color=True)
    assert read_back(output) == [CHAT.spans[1].text]
    assert "\x1b" not in output


@given(st.lists(st.text(st.sampled_from("ab \n\t\r⟦⟧⟪⟫↵⇥·\\[]<|>U+\x1b\u202e\ud83d生😀")), min_size=1, max_size=4))
def test_any_trained_text_is_read_back_exactly(texts: list[str]) -> None:
    spans = [pair for text in texts for pair in ((text, True), ("⟦ not this ⟧ \n", False))]
    # A newline's mark and the newline are one; a mark that the text holds itself stands before them.
    assert read_back(shown(record(*spans), width=20)) == texts


def test_with_colour_the_trained_text_is_on_green_and_the_rest_is_not() -> None:
    output = shown(record(("asked", False), ("answered", True)), colour=True)
    body = output[output.index("train.jsonl") :]
    assert re.search(r"\x1b\[[0-9;]*48;2;20;105;47manswered", body)
    assert re.search(r"(?<!m)asked", body)
    assert "⟦" not in output


def test_with_colour_blanks_at_the_edges_of_trained_lines_can_be_seen() -> None:
    output = re.sub(r"\x1b\[[0-9;]*m", "", shown(CHAT, colour=True))
    assert "·Because:↵\n" in output
    assert "⇥   x = 1··↵\n" in output


@pytest.mark.parametrize("colour", [False, True])
def test_a_terminal_obeys_nothing_in_a_text(colour: bool) -> None:
    output = shown(record(("\x1b]0;owned\x07\x9b2J", False), ("\x1b[2J\u202e", True)), colour=colour)
    assert "⟪U+001B⟫" in output
    assert "⟪U+202E⟫" in output
    assert not {"\x07", "\x9b", "\u202e"} & set(output)
    assert not re.search(r"\x1b(?!\[[0-9;]*m)", output)


@pytest.mark.parametrize("colour", [False, True])
def test_markup_of_the_terminal_library_is_only_text(colour: bool) -> None:
    assert "[bold red]so[/]?" in shown(CHAT, colour=colour)
    assert ":smile: [/] [link=x]" in shown(record((":smile: [/] [link=x]", True)), colour=colour)


@pytest.mark.parametrize("colour", [False, True])
def test_each_record_is_headed_by_its_place_and_counts(colour: bool) -> None:
    output = re.sub(r"\x1b\[[0-9;]*m", "", shown(record(("a", True), truncated=True), colour=colour))
    assert "[1/1] train.jsonl record 7  messages  120 tokens  48 trained (40%)  truncated\n" in output
    assert "template  the tokenizer's own chat template\n" in output
    assert "1 record, 120 tokens, 48 trained (40%), 1 truncated" in output


def test_a_little_is_not_nothing_and_almost_all_is_not_all() -> None:
    assert "1 trained (<1%)" in shown(record(("a", True), tokens=1000, trained=1))
    assert "999 trained (99%)" in shown(record(("a", True), tokens=1000, trained=999))
    assert "0 trained (0%)" in shown(record(("a", False), tokens=0, trained=0))


def test_the_tokenizers_own_special_tokens_are_dimmed() -> None:
    special = PreviewSummary("m", "t", "d", 1, special_tokens=("[SEP]", "", " "))
    output = shown(record(("one[SEP]two <|im_start|>", False)), colour=True, like=special)
    assert "\x1b[2m[SEP]\x1b[0m" in output
    assert "\x1b[2m<|im_start|>" not in output.partition("train.jsonl")[2]


def test_where_rows_are_cut_is_told() -> None:
    cut = PreviewSummary("m", "t", "d", 1, max_length=1024)
    assert "truncated at 1,024 tokens" in shown(record(("a", True), truncated=True), like=cut)


@pytest.mark.parametrize("colour", [False, True])
@pytest.mark.parametrize("width", [1, 2, 7, 41, 300])
def test_any_width_will_do(width: int, colour: bool) -> None:
    wide = record(("用中文解释👩‍💻" * 9, False), ("x" * 500 + " \n\n", True), ("", True))
    for records in ([wide, CHAT], [record()], []):
        assert "legend" in shown(*records, width=width, colour=colour).replace("\n", "")


def test_a_stream_that_is_not_utf8_gets_escapes() -> None:
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding="latin-1")
    to_terminal([record(("é生", True))], SUMMARY, Console(file=stream, width=100, _environ={}))
    stream.flush()
    assert "\\u27e6é\\u751f\\u27e7" in raw.getvalue().decode("latin-1")


def test_a_page_holds_every_text_and_no_markup_of_theirs() -> None:
    evil = record(("<script>alert(1)</script>&amp;", False), ('</mark><img src="x" onerror="y">', True))
    page = to_html([evil], PreviewSummary("<m>", "<t>", "</title><script>", 1))
    assert html.escape("<script>alert(1)</script>&amp;") in page
    assert not {"script", "img", "link", "m", "t"} & set(Page(page).tags)
    assert Page(page).trained == evil.spans[1].text


def test_the_trained_text_of_a_page_can_be_copied_from_it() -> None:
    assert Page(to_html([CHAT], SUMMARY)).trained == CHAT.spans[1].text


def test_a_page_tells_the_counts() -> None:
    page = to_html([record(("a", True), truncated=True)], SUMMARY)
    for text in ("train.jsonl record 7", "120 tokens", "48 trained (40%)", "truncated", "a-model", "some-data (train)"):
        assert text in page


def test_a_page_needs_nothing_from_elsewhere() -> None:
    page = to_html([CHAT], SUMMARY)
    assert "prefers-color-scheme: dark" in page
    assert not re.search(r"(?i)<script|<link|@import|url\(|https?:|src=", page)


def test_a_page_can_be_written_as_utf8_whatever_it_shows() -> None:
    page = to_html([record(("\ud83d\x00", True))], SUMMARY)
    assert "⟪U+D83D⟫" in page.encode("utf-8").decode("utf-8")
    assert "\x00" not in page


def test_no_records_are_said_to_be_none() -> None:
    assert "No records to show." in to_html([], SUMMARY)


def test_the_same_records_give_the_same_output() -> None:
    assert to_html([CHAT], SUMMARY) == to_html([CHAT], SUMMARY)
    assert shown(CHAT, colour=True) == shown(CHAT, colour=True)


def test_importing_the_views_loads_neither_torch_nor_rich() -> None:
    program = (
        "import sys, sft_dist.render.preview, sft_dist.render.comparison\n"
        "print(sorted({'torch', 'transformers', 'rich', 'numpy'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
