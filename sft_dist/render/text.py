"""Texts of strangers made safe and legible: what would not be seen, or would act on a terminal, gets a name."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

# Control characters but for newline and tab, line separators, bidirectional and zero-width controls, tags,
# surrogates. The joiners U+200C and U+200D stay: emoji and several scripts are written with them.
HIDDEN = (
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u00ad\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff"
    "\ud800-\udfff\U000e0000-\U000e007f]"
)
_HIDDEN = re.compile(HIDDEN)
_BLANK_ENDS = re.compile(r"[ \t]+$", re.MULTILINE)


def named(character: str) -> str:
    """A character by its code point: the escape character is `⟪U+001B⟫`."""
    return f"⟪U+{ord(character):04X}⟫"


def reveal(text: str) -> str:
    """The text with every hidden character named, safe to write to a terminal, a page or a UTF-8 file."""
    return _HIDDEN.sub(lambda match: named(match[0]), text)


def prose(text: str) -> str:
    """A text to be read, not inspected: as :func:`reveal`, with plain newlines and no blanks at its ends."""
    return reveal(_BLANK_ENDS.sub("", text.replace("\r\n", "\n")).strip("\n"))


def tolerate_encoding(console: Console) -> None:
    """Let a stream that is not UTF-8 write what it lacks as escapes, where it would raise."""
    reconfigure = getattr(console.file, "reconfigure", None)
    if reconfigure is not None and not console.encoding.startswith("utf"):
        reconfigure(errors="backslashreplace")
