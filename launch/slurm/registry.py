"""The runs that this user has submitted, remembered on this machine: `$XDG_STATE_HOME/sft-dist/runs.jsonl`.

It is a help and no authority: what a run is stands in its own folder. A folder that is gone may be on a file system
that is not mounted here, so nothing is dropped unless it is asked for.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

from launch.line_files import add_line
from launch.slurm.records import make_folder, now
from sft_dist.rundir import write_text


def path() -> Path:
    """The file, which need not exist."""
    base = os.environ.get("XDG_STATE_HOME") or "~/.local/state"
    return Path(base).expanduser() / "sft-dist" / "runs.jsonl"


def add(root: Path) -> None:
    """Remember a run's folder as the newest. Raises :class:`OSError`; whoever has submitted goes on without."""
    file = path()
    make_folder(file.parent)
    # One write at the end of the file, for others submit as well.
    add_line(file, json.dumps({"run": str(root.absolute()), "added": now()}))


def read() -> list[Path]:
    """The folders, the newest last, each once; nothing where there is no file or it cannot be read."""
    return list(_held())


def forget_gone() -> list[Path]:
    """Drop the folders that do not exist, and say which. Raises :class:`OSError`."""
    held = _held()
    gone = [root for root in held if not root.is_dir()]
    if gone:
        write_text(path(), "".join(line + "\n" for root, line in held.items() if root not in gone))
    return gone


def _held() -> dict[Path, str]:
    try:
        lines = path().read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return {}
    found: dict[Path, str] = {}
    for line in lines:
        root = _root(line)
        if root is not None:
            # The last mention counts.
            found.pop(root, None)
            found[root] = line
    return found


def _root(line: str) -> Path | None:
    try:
        root = json.loads(line)["run"]
    except (ValueError, LookupError, TypeError):
        return None
    return Path(root) if isinstance(root, str) and os.path.isabs(root) else None
