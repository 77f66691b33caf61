"""Documentation text made readable: reStructuredText and plain docstrings to the Markdown of a chat.

A text is a list of blocks: paragraphs, lists, and fenced code. :func:`blocks` makes them, :func:`cut` shortens
them without breaking one in two.
"""

from __future__ import annotations

import ast
import inspect
import itertools
import re
import textwrap
import warnings

_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\ufeff\ufffe\uffff]")
_BULLET = re.compile(r"(?:[-*+o•] +|\(?\d{1,2}[.)] +)(?=\S)")
_FIELD = re.compile(r":(\w+)((?: +[^:\n]+)?):(?:\s+|$)(?!`)")
_DIRECTIVE = re.compile(r"\.\. +([\w-]+):: *(.*)")
_ASSIGNED_CALL = re.compile(r"\(?[\w, \[\]()]+\)? = [<>\w.]+\([^()]*\)")
_OWN_LINE = re.compile(r" *(?:[\w.]+\(.*?\) *-|(?:\[\*\] )?[\w.]+\(.*\)$|[A-Z]\w*: |>>>|\$ )")
_DEFINED = re.compile(
    r"(?:\[\*\] )?(\*{0,2}[A-Za-z_][\w.]*(?:\([^()]*\))?(?:, ?\*{0,2}[A-Za-z_][\w.]*){0,3}) *(?: --?|:) +(?=\S)"
)
_TABLE = re.compile(r"\S {3,}\S|-{3,}\+|={4,}|\|.*\||^ *[-+=*|]{5,}")
_OLD_QUOTE = re.compile(r"`([^`'\s][^`'\n]{0,40})'(?!\w)")
_UNDERLINE = re.compile(r"([=~*^#\"-])\1{2,}$")
_ROLE = re.compile(r":(?:py:|c:)?([a-z]+):`([^`]+)`")
_PLAIN_ROLES = frozenset({"ref", "doc", "term", "title", "emphasis", "strong"})
_NOTES = {
    "versionadded": "New in version",
    "versionchanged": "Changed in version",
    "deprecated": "Deprecated since version",
    "note": "Note:",
    "warning": "Warning:",
    "seealso": "See also:",
}
_CODE_DIRECTIVES = frozenset({"code-block", "code", "sourcecode", "doctest", "testcode", "highlight"})
_CODE_NODES = (
    *(ast.Call, ast.Assign, ast.Import, ast.ImportFrom, ast.FunctionDef, ast.ClassDef, ast.For, ast.While, ast.With),
    *(ast.If, ast.Try, ast.Return, ast.Subscript, ast.AugAssign, ast.AsyncFunctionDef, ast.Attribute, ast.BinOp),
)
_STATEMENTS = tuple(kind for kind in _CODE_NODES if issubclass(kind, ast.stmt))
_WIDTH = 45  # a line shorter than this, other than the last, was broken on purpose


def blocks(text: str) -> list[str]:
    """The Markdown blocks of a docstring: dedented, reflowed, roles and directives turned into words."""
    lines = inspect.cleandoc(_CONTROL.sub("", text.replace("\r\n", "\n"))).split("\n")
    found: list[str] = []
    at = 0
    literal: int | None = None  # indent of the paragraph that announced a literal block by its `::`
    while at < len(lines):
        line = lines[at]
        if not line.strip():
            at += 1
            continue
        indent = _indent(line)
        if line.lstrip().startswith(">>>"):
            end = _doctest_end(lines, at)
            found.append(_fence(lines[at:end], "python"))
            literal = None
        elif (literal is not None and indent > literal) or _code_follows(lines, at, found):
            end = _run_end(lines, at, indent)
            found.append(_fence(lines[at:end]))
            literal = None
        else:
            end = _paragraph_end(lines, at)
            literal = _announced(lines[at:end])
            found += _paragraph(lines[at:end])
        at = end
    return _merged([block for block in found if block.strip()])


def inline(text: str) -> str:
    """One paragraph's inline markup as Markdown: `:class:\\`Foo\\`` and double backquotes become single ones."""
    if text.count("`") == len(_OLD_QUOTE.findall(text)):
        text = _OLD_QUOTE.sub(r"`\1`", text)
    text = re.sub(r"``([^`\n]+?)''", r"`\1`", _ROLE.sub(_role, text))
    text = re.sub(r"``(.+?)``", lambda m: f"`{m[1]}`" if "`" not in m[1] else m[1], text)
    text = re.sub(r"`([^`<]+?)\s*<([^`>]+)>`__?", r"\1 (\2)", text)
    text = re.sub(r"`([^`]+)`__?(?!\w)", r"\1", text)
    text = re.sub(r"\\([*`_|])", r"\1", text)
    text = re.sub(r"(?<=[.!?:)]) {2,}(?=\S)", " ", text)
    return re.sub(r"\s*::$", ":", text).rstrip()


def split_blocks(text: str) -> list[str]:
    """The blocks of a text that :func:`blocks` made and a blank line joined; blank lines inside code stay."""
    found: list[str] = []
    fenced = False
    for part in text.split("\n\n"):
        if fenced:
            found[-1] += "\n\n" + part
        else:
            found.append(part)
        fenced ^= part.count("```") % 2 == 1
    return found


def is_code(block: str) -> bool:
    """Whether a block is fenced code."""
    return block.startswith("```")


def cut(parts: list[str], limit: int) -> list[str]:
    """The leading blocks that fit into `limit` characters; a first block that does not fit ends at a sentence."""
    kept: list[str] = []
    size = 0
    for part in parts:
        size += len(part) + 2
        if size > limit:
            break
        kept.append(part)
    if len(kept) < len(parts):
        while len(kept) > 1 and (kept[-1].endswith(":") or re.fullmatch(r"\*\*[^*]+\*\*", kept[-1])):
            kept.pop()
        if len(kept) == 1 and kept[0].endswith(":"):
            kept.append(_cut_block(parts[1], max(limit - len(kept[0]), 300)))
    return kept or [_cut_block(parts[0], limit)] if parts else []


def first_sentence(text: str) -> str:
    """The first sentence of a paragraph, whole when it has only one."""
    for match in re.finditer(r"[.!?](?=\s+[A-Z`(\[])", text):
        if not re.search(r"\b(?:e\.g|i\.e|etc|vs|cf|resp)\.$", text[: match.end()]):
            return text[: match.end()]
    return text


def is_python(code: str) -> bool:
    """Whether a text parses as Python and does something that prose does not."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            tree = ast.parse(code)
        except (SyntaxError, ValueError, RecursionError):
            return False
    return any(isinstance(node, _CODE_NODES) for node in ast.walk(tree))


def _is_program(code: str) -> bool:
    """Whether a paragraph without a mark is code all the same: nothing but statements, at least one a call."""
    if "(" not in code or not is_python(code):
        return False
    return all(
        isinstance(node, _STATEMENTS) or (isinstance(node, ast.Expr) and isinstance(node.value, ast.Call | ast.Await))
        for node in ast.parse(code).body
    )


def _cut_block(block: str, limit: int) -> str:
    if len(block) <= limit:
        return block
    if is_code(block):
        kept = block[:limit].rsplit("\n", 1)[0]
        return f"{kept}\n```"
    ends = [m.end() for m in re.finditer(r"[.!?](?=\s)", block[:limit])]
    return block[: ends[-1]] if ends else block[:limit].rsplit("\n" if "\n" in block[:limit] else " ", 1)[0]


def _merged(parts: list[str]) -> list[str]:
    """Blocks in which list items that blank lines stood between are one list."""
    out: list[str] = []
    for part in parts:
        if out and part.startswith("- ") and out[-1].startswith("- "):
            out[-1] += "\n" + part
        else:
            out.append(part)
    return out


def _indent(line: str) -> int:
    return len(line) - len(line.lstrip(" "))


def _role(match: re.Match[str]) -> str:
    role, target = match.groups()
    titled = re.fullmatch(r"(.+?)\s*<[^>]+>", target, re.DOTALL)
    name = titled[1] if titled else target
    if role in ("pep", "rfc"):
        return f"{role.upper()} {name}"
    if name.startswith("~"):
        name = name.rsplit(".", 1)[-1]
    name = name.lstrip("!~")
    return name if role in _PLAIN_ROLES else f"`{name}`"


def _fence(lines: list[str], language: str | None = None) -> str:
    code = textwrap.dedent("\n".join(line.rstrip() for line in lines)).strip("\n")
    if not code.strip():
        return ""
    if not language:
        code = _ROLE.sub(_role, code).replace("``", "`")
    if language is None:
        language = "python" if ">>>" in code or is_python(code) else ""
    return f"```{language}\n{code.replace('```', '')}\n```"


def _doctest_end(lines: list[str], at: int) -> int:
    """One past the doctest at `at`: its output ends at a blank line that no further prompt follows."""
    indent = _indent(lines[at])
    end = at
    while end < len(lines):
        if not lines[end].strip():
            after = next((i for i in range(end, len(lines)) if lines[i].strip()), None)
            if after is None or not lines[after].lstrip().startswith(">>>"):
                break
        elif _indent(lines[end]) < indent:
            break
        end += 1
    return end


def _run_end(lines: list[str], at: int, indent: int) -> int:
    end = at
    while end < len(lines) and (not lines[end].strip() or _indent(lines[end]) >= indent):
        end += 1
    return end


def _code_follows(lines: list[str], at: int, found: list[str]) -> bool:
    """Whether an indented run is code though nothing marks it: it parses, and the text before leads up to it."""
    indent = _indent(lines[at])
    if indent == 0 or (found and is_code(found[-1]) and not found[-1].startswith("```python")):
        return False
    run = textwrap.dedent("\n".join(lines[at : _run_end(lines, at, indent)]))
    return is_python(run)


def _paragraph_end(lines: list[str], at: int) -> int:
    end = at + 1
    directive = _DIRECTIVE.match(lines[at].lstrip())
    if directive:
        indent = _indent(lines[at])
        while end < len(lines) and (not lines[end].strip() or _indent(lines[end]) > indent):
            end += 1
        return end
    while end < len(lines) and lines[end].strip() and not lines[end].lstrip().startswith(">>>"):
        end += 1
    return end


def _announced(lines: list[str]) -> int | None:
    last = lines[-1].rstrip()
    if not last.endswith("::") or _DIRECTIVE.match(lines[0].lstrip()):
        return None
    return min(_indent(line) for line in lines)


def _paragraph(lines: list[str]) -> list[str]:
    lines = textwrap.dedent("\n".join(lines)).split("\n")
    if directive := _DIRECTIVE.match(lines[0]):
        return _directive(directive[1], directive[2], lines[1:])
    if lines[0].startswith(".. "):
        return []
    if len(lines) > 1 and _UNDERLINE.match(lines[0]) and not _UNDERLINE.match(lines[1]):
        lines = lines[1:]
    if len(lines) > 1 and _UNDERLINE.fullmatch(lines[1].strip()):
        title = [f"**{inline(lines[0].strip())}**"]
        return title + (_paragraph(lines[2:]) if lines[2:] else [])
    if all(_UNDERLINE.fullmatch(line.strip()) for line in lines):
        return []
    if (len(lines) == 1 and _ASSIGNED_CALL.fullmatch(lines[0].strip())) or _is_program("\n".join(lines)):
        return [_fence(lines, "python")]
    if split := _split_at_code(lines):
        return split
    if items := _items(lines):
        return items
    if items := _terms(lines):
        return items
    inner = lines[1:]
    if inner and not lines[0].startswith(" ") and all(line.startswith("  ") for line in inner):
        return _headed(lines[0], inner)
    if any(_TABLE.search(line.rstrip()) for line in lines):
        return [_fence(lines, "")]
    return [_prose(lines)]


def _split_at_code(lines: list[str]) -> list[str]:
    """A paragraph with code of more than one line right after a line that ends with a colon, in its parts."""
    for at in range(1, len(lines)):
        if not lines[at - 1].rstrip().endswith(":") or _indent(lines[at]) > _indent(lines[at - 1]):
            continue
        for end in range(len(lines), at + 1, -1):
            run = lines[at:end]
            if any(_indent(line) for line in run) and is_python(textwrap.dedent("\n".join(run))):
                after = _paragraph(lines[end:]) if end < len(lines) else []
                return [*_paragraph(lines[:at]), _fence(run, "python"), *after]
    return []


def _headed(head: str, inner: list[str]) -> list[str]:
    """A line with an indented body: a heading such as `Arguments:`, a term and its meaning, or a hanging indent."""
    if head.rstrip().endswith("::"):
        return [inline(head.strip()), _fence(inner)]
    if head.rstrip().endswith(":"):
        body = "\n".join(inner)
        return [inline(head), *([_fence(inner)] if is_python(textwrap.dedent(body)) else _paragraph(inner))]
    if any(_TABLE.search(line.strip()) for line in inner):
        return [inline(head), _fence(inner, "")]
    return [_prose([head, *(line.strip() for line in inner)])]


def _terms(lines: list[str]) -> list[str]:
    """A definition list, each term on a line of its own over its indented meaning, as Markdown bullets."""
    starts = [i for i, line in enumerate(lines) if not line.startswith(" ")]
    ends = [*starts[1:], len(lines)]
    if not all(re.fullmatch(r"[\w.*]+(?:\(.*\))?", lines[i].rstrip()) for i in starts):
        return []
    if not all(end > start + 1 for start, end in zip(starts, ends, strict=True)):
        return []
    items = [
        f"- `{lines[start].strip()}`: {_prose(lines[start + 1 : end], joined=True)}"
        for start, end in zip(starts, ends, strict=True)
    ]
    return ["\n".join(items)]


def _items(lines: list[str]) -> list[str]:
    """A list in any of the ways docstrings write one, as Markdown bullets; empty where the lines are none."""
    pattern = next((p for p in (_BULLET, _FIELD, _DEFINED) if p.match(lines[0])), None)
    if pattern is None:
        if len(lines) > 1 and lines[0].endswith(":") and (m := _DEFINED.match(lines[1])) and " -" in m[0]:
            return [inline(lines[0]), *(_items(lines[1:]) or [_prose(lines[1:])])]
        at = next((i for i, line in enumerate(lines) if i and re.match(r"[-*] +\S", line)), None)
        if at is None:
            return []
        return [_prose(lines[:at]), *_items(lines[at:])]
    starts = [i for i, line in enumerate(lines) if pattern.match(line)]
    if pattern is _DEFINED and not _is_definition(lines, starts):
        return []
    out: list[str] = []
    for start, end in zip(starts, [*starts[1:], len(lines)], strict=True):
        match = pattern.match(lines[start])
        assert match is not None
        text = _prose([lines[start][match.end() :], *(line.strip() for line in lines[start + 1 : end])], joined=True)
        out.append(_item(pattern, match, text))
    return ["\n".join(out)]


def _is_definition(lines: list[str], starts: list[int]) -> bool:
    """`x -- text` is a definition; `Note: text` is one only among others of its kind."""
    others = [line for i, line in enumerate(lines) if i not in starts]
    if any(not line.startswith(" ") for line in others):
        return False
    return len(starts) > 1 or " -" in lines[0][:40]


def _item(pattern: re.Pattern[str], match: re.Match[str], text: str) -> str:
    if pattern is _BULLET:
        mark = match[0].strip()
        if defined := _DEFINED.match(text):
            text = f"`{defined[1]}`: {text[defined.end() :]}" if " -" in defined[0] else text
        return f"{mark if mark[0].isdigit() else '-'} {text}"
    if pattern is _DEFINED:
        return f"- `{match[1]}`: {text}"
    kind, name = match[1], match[2].strip()
    if kind in ("return", "returns"):
        return f"Returns: {text}"
    if kind in ("type", "rtype"):
        return f"- type of `{name}`: {text}" if name else f"Return type: {text}"
    if kind in ("raise", "raises", "except"):
        return f"- raises `{name}`: {text}"
    return f"- `{name.rsplit(' ', 1)[-1] or kind}`: {text}"


def _directive(name: str, argument: str, lines: list[str]) -> list[str]:
    body = textwrap.dedent("\n".join(lines)).strip("\n")
    if name in _CODE_DIRECTIVES:
        return [_fence(body.split("\n"), "python" if argument in ("", "python", "python3", "pycon") else argument)]
    if name not in _NOTES:
        return []
    version = argument if name.startswith(("version", "deprecated")) else ""
    rest = body if version else f"{argument}\n{body}".strip()
    head = f"{_NOTES[name]} {version}".strip()
    inner = blocks(rest) if rest else []
    if not inner or is_code(inner[0]):
        return [f"{head}." if version else head, *inner]
    return [f"{head}{':' if version else ''} {inner[0]}", *inner[1:]]


def _prose(lines: list[str], joined: bool = False) -> str:
    """Lines as one paragraph, unless they were broken on purpose."""
    stripped = [line.strip() for line in lines if line.strip()]
    own = any(_OWN_LINE.match(line) for line in stripped[1:])
    if joined or (not own and all(len(line) >= _WIDTH for line in stripped[:-1])):
        return inline(re.sub(r"(?<=[a-z]-) (?=[a-z])", "", " ".join(stripped)))
    out = lines[0].rstrip() if lines else ""
    for before, line in itertools.pairwise(lines):
        tail, head = before.strip()[-1:], line.lstrip()[:1]
        short = len(before.strip()) < _WIDTH
        kept = _OWN_LINE.match(line) or (short and (tail in ".:;!?)" or not (head.islower() or tail in ",")))
        hanging = not short and line.lstrip()[:1].islower()
        kept = kept or (_indent(line) != _indent(before) and not hanging)
        out += f"\n{line.rstrip()}" if kept else f" {line.strip()}"
    return "\n".join(inline(line) for line in out.split("\n"))
