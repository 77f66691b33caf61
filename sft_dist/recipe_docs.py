"""What the typed tree says of itself: the JSON Schema for editors and the tables of the documentation."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from pydantic.fields import FieldInfo

from sft_dist.config import Recipe
from sft_dist.recipe_names import SECTIONS, sections_below
from sft_dist.recipe_values import kinds

SCHEMA_FILE = Path("launch/recipes/recipe.schema.json")
DOCUMENT_FILE = Path("docs/recipe.md")
_HEAD = """\
<!-- Written by `python -m sft_dist.recipe --write .` from sft_dist/config.py; change it there. -->
# The recipe

A recipe is a YAML file of the sections below. `section.key=value` on the command line overrides it, the value read as
YAML; `section.key=null` goes back to the default, or unsets a key that can be unset. Keys of `train` have the names
and meanings of TRL's `SFTConfig`, those of `model`, `peft` and `data` of its `ModelConfig` and `ScriptArguments`.
Paths are relative to the current directory; a leading `~` is the home directory.

Words mean what they mean in YAML 1.2: `1e-5` is a number, `no` is a word. A key that is not below is refused.
"""


def json_schema() -> dict[str, Any]:
    """The JSON Schema (draft 2020-12) of recipes, for editors."""
    schema = _tidy(Recipe.model_json_schema())
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema, "title": "sft-dist recipe"}


def _tidy(part: Any) -> Any:
    """Without titles, which repeat the names, and with descriptions on one line."""
    if isinstance(part, list):
        return [_tidy(item) for item in part]
    if not isinstance(part, dict):
        return part
    kept = {k: _tidy(v) for k, v in part.items() if not (k == "title" and isinstance(v, str))}
    if isinstance(kept.get("description"), str):
        kept["description"] = " ".join(kept["description"].split())
    return kept


def schema_text() -> str:
    """The text of the schema's file."""
    return json.dumps(json_schema(), indent=2, ensure_ascii=False) + "\n"


def document() -> str:
    """A Markdown table of each section: key, default, meaning."""
    stage = Recipe.model_fields["stage"]
    parts = [_HEAD, table("stage", "The top of the file.", {"stage": stage})]
    for name, kind in SECTIONS.items():
        parts.append(table(name, " ".join((kind.__doc__ or "").split()), kind.model_fields))
        for key, field in kind.model_fields.items():
            if below := sections_below(field.annotation):
                title = f"{name}.{key}.NAME"
                parts.append(table(title, " ".join((below.__doc__ or "").split()), below.model_fields))
    return "\n".join(parts)


def write_files(root: Path) -> list[Path]:
    """Write both files below the root of a checkout. Returns their paths."""
    texts = {root / SCHEMA_FILE: schema_text(), root / DOCUMENT_FILE: document()}
    for path, text in texts.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return list(texts)


def table(title: str, text: str, fields: dict[str, FieldInfo]) -> str:
    """A Markdown table of fields, under a heading and a text where there are any."""
    head = [*([f"## {title}", ""] if title else []), *([text, ""] if text else [])]
    rows = [*head, "| key | default | meaning |", "|---|---|---|"]
    for name, field in fields.items():
        cells = (f"`{name}`", _default(field), _meaning(field))
        rows.append(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |")
    return "\n".join([*rows, ""])


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True)
    return "unset" if value in (None, "") else f"`{value if isinstance(value, str) else json.dumps(value)}`"


def _meaning(field: FieldInfo) -> str:
    text = " ".join((field.description or "").split())
    choices = [w for kind in kinds(field.annotation) if get_origin(kind) is Literal for w in get_args(kind)]
    return text + (f" One of {', '.join(f'`{word}`' for word in choices)}." if len(choices) > 1 else "")
