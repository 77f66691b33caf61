"""Training speed, memory and MFU on one GPU: this project beside TRL's trainer, padded and packed.

    python -m tests.benchmarks.gpu_sft [--models opt-1.3b llama-7b] [--steps N] [--json FILE] [--table FILE]

prints the table of docs/benchmarks.md. OPT-1.3B and Llama 7B have their shapes and random weights, so that nothing is
read from a network; without a GPU the built-in SmolLM2-135M is trained, by the same code. Each measurement is a process
of its own, and the steps that compile are not counted. One that fails is told in the table and ends no other.
"""

from __future__ import annotations

import argparse
import json
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from tests.benchmarks.sft_cells import CASES, ON_A_GPU, ON_A_PROCESSOR, Case, Way, case_of, table

_PACKAGES = ("torch", "transformers", "trl", "accelerate", "peft", "flash-attn")


def cell(name: str, case: Case, way: Way) -> dict[str, Any]:
    """One measurement in a process of its own: its settings, and its figures or its fault."""
    told = {"model": name, "way": way.value, "settings": asdict(case)}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "found.json"
        words = [sys.executable, "-m", "tests.benchmarks.sft_measure", name, way.name, str(case.steps), str(file)]
        done = subprocess.run(words, stderr=subprocess.PIPE, text=True, check=False)
        if file.exists():
            return told | json.loads(file.read_text(encoding="utf-8"))
    print(done.stderr[-4000:], file=sys.stderr)
    return told | {"fault": fault(done.returncode, done.stderr)}


def fault(code: int, stderr: str) -> str:
    """Why a process ended without a result, short enough for a table."""
    if code < 0:
        name = signal.Signals(-code).name
        return f"ended by {name} (out of memory?)" if name == "SIGKILL" else f"ended by {name}"
    # Bars of progress are lines as well.
    lines = [line.strip() for line in stderr.replace("\r", "\n").splitlines() if "Error" in line]
    return (lines[-1] if lines else f"exit code {code}").replace("|", "/")[:120]


def versions() -> dict[str, str]:
    found = {}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def main(words: Sequence[str] | None = None) -> None:
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser()
    parser.add_argument("--models", nargs="+", choices=list(CASES), default=ON_A_GPU if cuda else ON_A_PROCESSOR)
    # Compilation takes longer on a processor than all else here.
    usual = [way.name.lower() for way in Way if cuda or way is not Way.COMPILED]
    parser.add_argument("--ways", nargs="+", choices=[way.name.lower() for way in Way], default=usual)
    parser.add_argument("--steps", type=int, help="optimizer steps on the clock")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--table", type=Path)
    options = parser.parse_args(words)
    cells: list[dict[str, Any]] = []
    for name in options.models:
        for way in options.ways:
            cells.append(cell(name, case_of(name, options.steps), Way[way.upper()]))
            whole = {"versions": versions(), "device": cells[0].get("device"), "cells": cells}
            # After each, so that a call that is cut short leaves what it has measured.
            if options.json:
                options.json.write_text(json.dumps(whole, indent=2) + "\n", encoding="utf-8")
            if options.table:
                options.table.write_text(table(cells, cuda) + "\n", encoding="utf-8")
    print(f"\n{cells[0].get('device')}; {', '.join(f'{name} {number}' for name, number in versions().items())}\n")
    print(table(cells, cuda))


if __name__ == "__main__":
    main()
