"""The tables of the profile's keys in docs/slurm.md: `python -m launch.slurm.profile_docs` writes them anew."""

from __future__ import annotations

import sys
from pathlib import Path

from launch.slurm.profile import ContainerSection, Profile, RequeueSection
from sft_dist.config_base import Section
from sft_dist.recipe_docs import table

DOCUMENT_FILE = Path("docs/slurm.md")
_BEGIN = "<!-- Written by `python -m launch.slurm.profile_docs` from launch/slurm/profile.py; change it there. -->\n"
_END = "<!-- To here. -->\n"
_BELOW: dict[str, type[Section]] = {"requeue": RequeueSection, "container": ContainerSection}


def tables() -> str:
    """A Markdown table of each section of the profile: key, default, meaning."""
    top = {name: field for name, field in Profile.model_fields.items() if name not in _BELOW}
    parts = [table("", "", top)]
    for name, kind in _BELOW.items():
        parts.append(table("", " ".join((kind.__doc__ or "").split()), {
            f"{name}.{key}": field for key, field in kind.model_fields.items()
        }))  # fmt: skip
    return "\n".join(parts)


def document(text: str) -> str:
    """The documentation with its tables as they have to be. Raises :class:`ValueError` where it marks no place."""
    before, rest = text.split(_BEGIN)
    _, after = rest.split(_END)
    return f"{before}{_BEGIN}{tables()}{_END}{after}"


def main() -> int:
    """Write the tables into the documentation of this checkout."""
    path = Path(__file__).resolve().parents[2] / DOCUMENT_FILE
    path.write_text(document(path.read_text(encoding="utf-8")), encoding="utf-8")
    print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
