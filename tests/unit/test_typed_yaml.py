"""A YAML file into a typed tree, and its faults in one line each."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import Field

from launch.typed_yaml import read_typed
from sft_dist.config_base import Section
from sft_dist.errors import UserError


class Leaf(Section):
    size: int = 1
    names: list[str] = Field(default_factory=list)


class Tree(Section):
    title: str
    leaf: Leaf = Field(default_factory=Leaf)
    rate: float | None = None


def read(folder: Path, text: str | bytes, *overrides: str) -> Tree:
    (folder / "t.yaml").write_bytes(text if isinstance(text, bytes) else text.encode())
    return read_typed(folder / "t.yaml", Tree, "a tree", overrides)


def test_overrides_go_on_top_of_the_file(tmp_path: Path) -> None:
    tree = read(tmp_path, "title: a\nleaf: {size: 2}\n", "leaf.size=3", "leaf.names=[x, y]", "rate=1e-3")
    assert tree == Tree(title="a", leaf=Leaf(size=3, names=["x", "y"]), rate=1e-3)
    # A section that is no section yet becomes one.
    assert read(tmp_path, "title: a\nleaf: null\n", "leaf.size=4").leaf.size == 4
    assert read(tmp_path, "title: no\n").title == "no"
    assert read(tmp_path, b"\xef\xbb\xbftitle: a\n").title == "a"


@pytest.mark.parametrize(
    ("text", "overrides", "said"),
    [
        ("title: a\nleef: 1\n", (), ["t.yaml:2: leef: no such key, did you mean leaf"]),
        ("title: a\nleaf: {sise: 1}\n", (), ["t.yaml:2: leaf.sise: no such key, did you mean size"]),
        ("leaf: {size: x}\nrate: fast\n", (), ["title: is missing", "t.yaml:1: leaf.size: should be a valid integer",
                                               "t.yaml:2: rate: should be a valid number"]),
        ("title: a\nleaf:\n  names:\n  - x\n  - 3\n", (), ["t.yaml:3: leaf.names.1: should be a valid string"]),
        ("title: a\n", ("leaf.size=x",), ["command line: leaf.size: should be a valid integer"]),
        ("title: a\n", ("leaf", "a..b=1"), ["leaf: not of the form key=value", "a..b=1: not of the form key=value"]),
        ("title: a\ntitle: b\n", (), ["t.yaml:2: title"]),
        ("title: [a\n", (), ["t.yaml:"]),
        ("title: &x a\nrate: *x\n", (), ["t.yaml:"]),
        (b"title: \xff\n", (), ["not UTF-8 (byte 7); save the file as UTF-8"]),
        ("x" * 300_000, (), ["larger than 256 kB; name a tree"]),
        ("- a\n", (), ["holds no keys; name a tree"]),
    ],
)  # fmt: skip
def test_every_fault_is_a_line(tmp_path: Path, text: str | bytes, overrides: tuple[str, ...], said: list[str]) -> None:
    with pytest.raises(UserError) as error:
        read(tmp_path, text, *overrides)
    lines = str(error.value).splitlines()
    assert len(lines) == len(said), lines
    for line, words in zip(lines, said, strict=True):
        assert words in line


def test_what_is_no_file_is_one_line(tmp_path: Path) -> None:
    for name in ("nothing.yaml", "."):
        with pytest.raises(UserError, match=r"cannot be read: .*; name a tree"):
            read_typed(tmp_path / name, Tree, "a tree")
