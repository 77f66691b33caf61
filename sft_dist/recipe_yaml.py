"""Recipe text into nodes that know the line they stand on, and a resolved recipe back into text.

Plain words mean what YAML 1.2 says they mean: `1e-5` is a number and `no` is a word. PyYAML reads YAML 1.1, where
`1e-5` is text, `no` is false, `010` is eight, and of two equal keys the last one silently wins.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import yaml

# Places are line numbers; these two sort before and after all lines.
NO_LINE = 0
COMMAND_LINE = sys.maxsize
# Depth and number of values that no recipe reaches; aliases can make a small file explode.
_DEEPEST = 20
_MOST = 100_000

_NULL = re.compile(r"(?:~|null|Null|NULL)?")
_BOOL = re.compile(r"true|True|TRUE|false|False|FALSE")
_INT = re.compile(r"[-+]?[0-9]+(?:_[0-9]+)*|0o[0-7]+|0x[0-9a-fA-F]+")
_FLOAT = re.compile(
    r"[-+]?(?:\.[0-9]+|[0-9]+(?:_[0-9]+)*(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)"
)
_NOT_TEXT = re.compile("[\0\ud800-\udfff]")
# All that str.splitlines takes for the end of a line, and what a terminal or an encoder may not bear.
_NOT_IN_A_LINE = re.compile("[\0-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")


class LineOf(int):
    """A line of a file that is not the one being read, such as of a pipeline that sets keys of a recipe."""

    file: str

    def __new__(cls, line: int, file: str) -> LineOf:
        """The number of a line, and the name of its file."""
        place = super().__new__(cls, line)
        place.file = file
        return place


@dataclass(frozen=True, slots=True)
class Fault:
    """What is wrong with one key (`""`: with the file), and where."""

    place: int
    key: str
    text: str

    def line(self, file: str) -> str:
        """The message, always one line."""
        file = self.place.file if isinstance(self.place, LineOf) else file
        where = "command line" if self.place == COMMAND_LINE else f"{file}:{self.place}" if self.place else file
        # A key with a blank at an end would not be seen for what it is.
        key = self.key if self.key == self.key.strip() else repr(self.key)
        words = [where, key, self.text] if key else [where, self.text]
        return _NOT_IN_A_LINE.sub(lambda m: m[0].encode("unicode_escape").decode(), ": ".join(words))


@dataclass(slots=True)
class Scalar:
    """A single value, and the text it was read from."""

    place: int
    value: bool | int | float | str | None
    text: str


@dataclass(slots=True)
class Items:
    """A list."""

    place: int
    items: list[Node]


@dataclass(slots=True)
class Keys:
    """A mapping. The place of each entry is that of its key."""

    place: int
    entries: dict[str, Node] = field(default_factory=dict)


Node: TypeAlias = Scalar | Items | Keys


def read(text: str, key: str = "", place: int | None = None) -> tuple[Node | None, list[Fault]]:
    """The nodes of a YAML text, None where it holds nothing or cannot be read, and its faults.

    `key` is what the faults name, `place` stands for the lines where the text is not that of a file.
    """
    try:
        loader = _Loader(text)
        root = loader.get_single_node()
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        return None, [_broken(place or line, key, f"the character U+{error.character:04X} is not allowed")]
    except yaml.MarkedYAMLError as error:
        # What is never closed is found at the end of the file, but stands where it was opened.
        mark = (error.context_mark if re.search(_UNCLOSED, str(error.problem)) else None) or error.problem_mark
        return None, [_broken(place or (mark.line if mark else 0) + 1, key, _syntax(error))]
    except RecursionError:
        return None, [_broken(place or NO_LINE, key, "it is nested too deeply")]
    except (ValueError, OverflowError):
        # PyYAML lets through what `chr` and `int` say to numbers that are too large.
        return None, [_broken(place or loader.line + 1, key, "a number in an escape or a directive is too large")]
    if root is None:
        return None, []
    reader = _Reader(place)
    return reader.node(root, key, place or root.start_mark.line + 1, 0), reader.faults


def plain_value(text: str) -> bool | int | float | str | None:
    """What a word without quotes means."""
    if _NULL.fullmatch(text):
        return None
    if _BOOL.fullmatch(text):
        return text.lower() == "true"
    # Python refuses to convert thousands of digits; no setting needs a hundred.
    if len(text) > 100:
        return text
    if _INT.fullmatch(text):
        return int(text, 8 if text.startswith("0o") else 16 if text.startswith("0x") else 10)
    if _FLOAT.fullmatch(text):
        return float(re.sub(r"\.(?=[iInN])", "", text))
    return text


def is_text(text: str) -> bool:
    """Whether a string can stand in a file and name one: no NUL, no half of a surrogate pair."""
    return not _NOT_TEXT.search(text)


def write(values: Mapping[str, Any]) -> str:
    """YAML of plain values, in their order, that reads the same under YAML 1.1 and 1.2."""
    return yaml.dump(dict(values), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=sys.maxsize)


_PLAIN = "!plain"
_STR = "tag:yaml.org,2002:str"
_KNOWN_TAGS = (_PLAIN, _STR, "tag:yaml.org,2002:map", "tag:yaml.org,2002:seq")


class _Loader(yaml.SafeLoader):
    """Composes nodes; every plain scalar gets the tag `_PLAIN`, and its meaning from :func:`plain_value`."""

    yaml_implicit_resolvers = {_first: [(_PLAIN, re.compile(""))] for _first in (None,)}  # noqa: RUF012


class _Dumper(yaml.SafeDumper):
    """Puts in quotes whatever either version of YAML would take for something else than text."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _text_node(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    # PyYAML folds a line break outside double quotes, and some it then reads as a space.
    return dumper.represent_scalar(_STR, text, style='"' if _NOT_IN_A_LINE.search(text) else None)


_Dumper.add_representer(str, _text_node)
for _pattern in (_NULL, _BOOL, _INT, _FLOAT):
    _Dumper.add_implicit_resolver(_PLAIN, re.compile(f"(?:{_pattern.pattern})\\Z"), None)


class _Reader:
    """PyYAML's nodes into ours. Collects the faults that need no knowledge of the settings."""

    def __init__(self, place: int | None) -> None:
        self.place = place
        self.faults: list[Fault] = []
        self._count = 0

    def node(self, raw: yaml.Node, key: str, place: int, depth: int) -> Node | None:
        """The node, or None with a fault noted."""
        self._count += 1
        if depth > _DEEPEST or self._count > _MOST:
            # Said once, however often an alias repeats it.
            if self._count <= 2 * _MOST:
                self._count = 2 * _MOST
                self._note(
                    place, ".".join(key.split(".")[:2]), "nested too deeply, or too many values; write it out shorter"
                )
            return None
        if raw.tag not in _KNOWN_TAGS:
            tag = raw.tag.replace("tag:yaml.org,2002:", "!!")
            self._note(place, key, f"the tag {tag} is not read; leave it out")
            return None
        if isinstance(raw, yaml.MappingNode):
            return self._keys(raw, key, place, depth)
        if isinstance(raw, yaml.SequenceNode):
            found = [self.node(item, key, place, depth + 1) for item in raw.value]
            return Items(place, [item for item in found if item is not None])
        if not is_text(raw.value):
            self._note(place, key, "holds a character that no text can have; leave it out")
            return None
        return Scalar(place, plain_value(raw.value) if raw.tag == _PLAIN else raw.value, raw.value)

    def _keys(self, raw: yaml.MappingNode, key: str, place: int, depth: int) -> Keys:
        out = Keys(place)
        lines: dict[str, int] = {}
        for name, value in raw.value:
            line = self.place or name.start_mark.line + 1
            if not isinstance(name, yaml.ScalarNode) or name.tag not in (_PLAIN, _STR) or not is_text(name.value):
                self._note(line, key, "a key must be a plain word")
                continue
            dotted = f"{key}.{name.value}" if key else name.value
            if name.value == "<<" and name.tag == _PLAIN:
                self._note(line, dotted, "merge keys are not read; write the keys out")
            elif name.value in lines:
                where = "" if self.place else f", on lines {lines[name.value]} and {line}"
                self._note(line, dotted, f"given twice{where}; keep one")
            else:
                lines[name.value] = line
                node = self.node(value, dotted, line, depth + 1)
                if node is not None:
                    out.entries[name.value] = node
        return out

    def _note(self, place: int, key: str, text: str) -> None:
        self.faults.append(Fault(place, key, text))


def _broken(place: int, key: str, text: str) -> Fault:
    return Fault(place, key, f"not valid YAML: {text}")


_UNCLOSED = r"unexpected end of stream|'<stream end>'|expected ',' or '.'"
_SYNTAX = (
    (_UNCLOSED, "a quote or a bracket is not closed, or a comma is missing"),
    (r"'\\t' that cannot start", "a tab stands here; indent with spaces"),
    (r"found character (.+) that cannot start", r"a value cannot begin with \1; put it in quotes"),
    ("mapping values are not allowed", "a ':' where no key can stand; mend the indentation or quote the value"),
    ("could not find expected ':'", "a line that is neither a key with ':' nor a value; mend it"),
    ("but found '<block|expected <block end>", "the indentation does not fit the lines above; mend it"),
    ("another document", "a second document begins ('---'); a recipe is one"),
    (r"found undefined alias (.+)", r"no anchor \1 above; put a value that begins with '*' in quotes"),
)


def _syntax(error: yaml.MarkedYAMLError) -> str:
    problem = str(error.problem or error.context or "it cannot be read")
    for pattern, words in _SYNTAX:
        if found := re.search(pattern, problem):
            return found.expand(words)
    return problem
