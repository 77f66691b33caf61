"""The folder of a run: claiming it, and what is written beside the output so that it can be repeated."""

from __future__ import annotations

import functools
import json
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from sft_dist.config import OutputSection, Recipe
from sft_dist.errors import UserError
from sft_dist.identity import refuse_other_run
from sft_dist.recipe import dump_recipe

STACK = (
    "sft-dist", "torch", "transformers", "trl", "accelerate", "deepspeed", "peft", "bitsandbytes",
    "datasets", "tokenizers", "safetensors", "wandb", "submitit", "numpy",
)  # fmt: skip
# What a run writes; anything else in the folder is the user's own and is never removed.
_OURS = ("recipe.yaml", "environment.json", "summary.json", "metrics.jsonl", "events.jsonl", "tracker.json", "model",
         "model.unfinished", "merged", "checkpoints", "eval", "rollouts", "logs", "wandb", "tensorboard",
         "slurm")  # fmt: skip
SECRET = re.compile(r"(?i)(key|token|secret|password)")


@dataclass(frozen=True)
class RunDir:
    """Names of the things in a run's folder."""

    root: Path

    @property
    def recipe(self) -> Path:
        return self.root / "recipe.yaml"

    @property
    def model(self) -> Path:
        return self.root / "model"

    @property
    def checkpoints(self) -> Path:
        return self.root / "checkpoints"

    @property
    def evaluation(self) -> Path:
        return self.root / "eval"

    @property
    def before(self) -> Path:
        return self.evaluation / "before.json"

    @property
    def answers(self) -> Path:
        return self.evaluation / "answers.jsonl"

    @property
    def rewards(self) -> Path:
        """The rewards of all held-out pairs, a line of JSON each."""
        return self.evaluation / "rewards.jsonl"

    @property
    def comparison(self) -> Path:
        return self.evaluation / "comparison.html"

    @property
    def rollouts(self) -> Path:
        """Of PPO: numbers and samples of each rollout."""
        return self.root / "rollouts"

    @property
    def logs(self) -> Path:
        return self.root / "logs"

    @property
    def metrics(self) -> Path:
        return self.root / "metrics.jsonl"

    @property
    def events(self) -> Path:
        """Steps whose numbers were wrong, a line of JSON each."""
        return self.root / "events.jsonl"

    @property
    def tracker(self) -> Path:
        return self.root / "tracker.json"

    @property
    def summary(self) -> Path:
        return self.root / "summary.json"


def occupied(output: OutputSection) -> str | None:
    """Why the output folder cannot be used, in one line, or None when it can."""
    root = Path(output.output_dir)
    if root.exists() and not root.is_dir():
        return f"output.output_dir: {root} is a file; name a folder"
    held = root / "recipe.yaml"
    if held.exists() and not (output.overwrite or output.resume):
        return (
            f"output.output_dir: {root} holds another run; "
            "set output.resume=true to go on, output.overwrite=true to replace it, or name another folder"
        )
    if output.resume and not held.exists():
        return f"output.resume: {root} holds no run to go on with; leave it out, or mend output.output_dir"
    return None


def claim(recipe: Recipe, command: Sequence[str]) -> RunDir:
    """Make the run's folder its own: refuse a foreign one, clear or keep an earlier run, write the record.

    Done once per start, by one process, which holds the run's lock. Raises :class:`UserError`.
    """
    fault = occupied(recipe.output)
    if fault:
        raise UserError(fault)
    if recipe.output.resume:
        refuse_other_run(Path(recipe.output.output_dir), recipe)
    run = RunDir(Path(recipe.output.output_dir))
    try:
        run.root.mkdir(parents=True, exist_ok=True, mode=0o700)
        if recipe.output.overwrite:
            clear(run.root)
        for folder in (run.logs, run.evaluation, run.checkpoints):
            folder.mkdir(exist_ok=True, mode=0o700)
        write_text(run.root / "environment.json", json.dumps(environment(command), indent=2) + "\n")
        write_text(run.recipe, dump_recipe(recipe))
    except OSError as error:
        raise UserError(
            f"output.output_dir: {run.root} cannot be written: {error.strerror}; name a folder of yours"
        ) from error
    return run


def clear(root: Path) -> None:
    """Remove what an earlier run left, and nothing else."""
    for name in _OURS:
        path = root / name
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path.exists() or path.is_symlink():
            path.unlink()


def write_text(path: Path, text: str) -> None:
    """Write a file that is complete or absent, readable by its owner only."""
    unfinished = path.with_name(path.name + ".unfinished")
    descriptor = os.open(unfinished, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(unfinished, path)


def environment(command: Sequence[str]) -> dict[str, Any]:
    """Versions of the stack, the git commit and the command line, without secrets."""
    return {
        "command": without_secrets(command),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "versions": versions(),
        "git": _git(Path(__file__).resolve().parent),
        "variables": settings(os.environ),
    }


def settings(variables: Mapping[str, str]) -> dict[str, str]:
    """Environment variables that bear on the run; those that may be secrets are left out."""
    wanted = ("CUDA_", "NCCL_", "GLOO_", "OMP_", "TORCH", "ACCELERATE_", "HF_", "WANDB_", "PYTORCH_", "SFT_DIST_")
    return {k: v for k, v in sorted(variables.items()) if k.startswith(wanted) and not SECRET.search(k)}


def without_secrets(command: Sequence[str]) -> list[str]:
    """A command line whose words of the form `...KEY=value` have lost the value."""
    return [
        f"{word.split('=', 1)[0]}=***" if "=" in word and SECRET.search(word.split("=", 1)[0].split(".")[-1]) else word
        for word in command
    ]


@functools.cache
def versions() -> dict[str, str | None]:
    """Versions of the stack."""
    return {name: _version(name) for name in STACK}


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


@functools.cache
def _git(folder: Path) -> dict[str, Any] | None:
    """Commit of the code, and whether it was changed since; None outside a checkout."""

    def ask(*words: str) -> str | None:
        try:
            done = subprocess.run(
                ["git", "-C", str(folder), *words], capture_output=True, text=True, timeout=10, check=False
            )
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    commit = ask("rev-parse", "HEAD")
    if commit is None:
        return None
    return {"commit": commit, "changed": bool(ask("status", "--porcelain"))}


def command_line() -> list[str]:
    """The command that this process was started with."""
    return [Path(sys.argv[0]).name, *sys.argv[1:]]
