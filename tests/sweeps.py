"""Sweeps for tests, and a stand-in for the training of a trial that is done at once."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from launch.processes import Ending
from sft_dist.config import Recipe
from tests.recipes import write_conversations, write_recipe

GRID = {"train.learning_rate": [1e-5, 1e-4, 1e-3], "train.weight_decay": [0.0, 0.1]}


def write_sweep(folder: Path, **keys: Any) -> Path:
    """A sweep over a recipe beside it, whose model and data pass every check."""
    folder.mkdir(parents=True, exist_ok=True)
    model = folder / "model"
    model.mkdir(exist_ok=True)
    (model / "config.json").write_text(json.dumps({"architectures": ["LlamaForCausalLM"], "model_type": "llama",
                                                   "max_position_embeddings": 512}))  # fmt: skip
    (model / "tokenizer.json").write_text("{}")
    (model / "model.safetensors").write_bytes(b"")
    data = {"dataset_name": str(write_conversations(folder / "train.jsonl", 9)), "test_split_size": 3}
    train = {"max_length": 256, "report_to": []}
    write_recipe(folder / "recipe.yaml", model={"model_name_or_path": str(model)}, data=data, train=train,
                 output={"output_dir": "nowhere"})  # fmt: skip
    held = {"recipe": "recipe.yaml", "output_dir": str(folder / "sweep"), "parameters": GRID} | keys
    file = folder / "sweep.yaml"
    file.write_text(yaml.safe_dump({key: value for key, value in held.items() if value is not None}, sort_keys=False))
    return file


def loss_of(recipe: Recipe) -> float:
    """A held-out loss that is least at a learning rate of 1e-4, without weight decay."""
    return abs(recipe.train.learning_rate - 1e-4) * 1000 + recipe.train.weight_decay + 1


def finish(recipe: Recipe, loss: float | None = None, logged: tuple[float, ...] = ()) -> None:
    """Leave what a run leaves at its end."""
    root = Path(recipe.output.output_dir)
    (root / "model").mkdir()
    (root / "model" / "config.json").write_text("{}")
    loss = loss_of(recipe) if loss is None else loss
    rows = [{"step": step, "eval_loss": value, "loss": value} for step, value in enumerate(logged, 1)]
    (root / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step": 9, "eval_lo')
    summary = {"after": {"loss": loss, "perplexity": 2.0}, "steps": 7, "seconds": 3.0, "tokens_per_second": 1234.5}
    (root / "summary.json").write_text(json.dumps(summary))


class Trainings:
    """Stands in for :func:`launch.local.run`: each call is noted, and ends as `behave` says, else well."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.seen: list[Recipe] = []
        self.behave: Callable[[Recipe], Ending | None] = lambda _: None
        monkeypatch.setattr("launch.local.run", self)
        monkeypatch.delenv("WANDB_RUN_GROUP", raising=False)

    def __call__(self, _: Path, recipe: Recipe, *, quiet: bool = False) -> Ending:
        assert quiet
        self.seen.append(recipe)
        ending = self.behave(recipe)
        if ending is None:
            finish(recipe)
        return ending or Ending(0, stopped=False)

    def names(self) -> list[str]:
        """The folders of the calls since the last look."""
        names = [Path(recipe.output.output_dir).name for recipe in self.seen]
        self.seen.clear()
        return names
