"""`train.torch_compile` reaches TRL's configuration, and is refused where the launcher shards."""

from __future__ import annotations

from pathlib import Path

import pytest

from sft_dist.backend import STRATEGIES
from sft_dist.config import Recipe
from sft_dist.errors import UserError
from sft_dist.rundir import RunDir
from sft_dist.trainers.sft import sft_config
from sft_dist.world import World


def config_of(folder: Path, strategy: str) -> object:
    recipe = Recipe.model_validate(
        {
            "model": {"model_name_or_path": "some/model"},
            "data": {"dataset_name": "python-docs"},
            "train": {"torch_compile": True},
            "output": {"output_dir": str(folder)},
        }
    )
    return sft_config(recipe, RunDir(folder), World(0, 1, 0, 1), False, False, STRATEGIES[strategy], 8)


def test_a_strategy_that_the_launcher_chose_may_refuse_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # transformers tells accelerate by the environment.
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "no")
    assert config_of(tmp_path, "ddp").torch_compile  # type: ignore[attr-defined]
    with pytest.raises(UserError, match=r"train\.torch_compile: cannot stand with zero2 so far; leave it out"):
        config_of(tmp_path, "zero2")
