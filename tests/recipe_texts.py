"""A small recipe as text, and what is made of such a text."""

from __future__ import annotations

import contextlib
import tempfile
from pathlib import Path
from textwrap import dedent

import pytest

from sft_dist.config import Recipe
from sft_dist.errors import RecipeError
from sft_dist.recipe import load_recipe

MINIMAL = """\
model:
  model_name_or_path: facebook/opt-1.3b
data:
  dataset_name: train.jsonl
output:
  output_dir: runs/one
"""


def load(text: str, *overrides: str) -> Recipe:
    """The recipe of a text that stands in `r.yaml`."""
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        Path("r.yaml").write_text(dedent(text), encoding="utf-8")
        return load_recipe("r.yaml", overrides)


def faults(text: str, *overrides: str) -> list[str]:
    """The lines by which a text is refused."""
    with pytest.raises(RecipeError) as caught:
        load(text, *overrides)
    return str(caught.value).split("\n")


def section(name: str, text: str) -> str:
    """The minimal recipe with keys added to a section; a section that it lacks begins on line 7."""
    lines = "".join(f"  {line}\n" for line in text.split("\n"))
    if f"{name}:\n" not in MINIMAL:
        return f"{MINIMAL}{name}:\n{lines}"
    return MINIMAL.replace(f"{name}:\n", f"{name}:\n{lines}")


def train(text: str) -> str:
    """The minimal recipe with a `train` section, whose keys begin on line 8."""
    return section("train", text)
