"""Strategies that cannot work here, each found by `check` and told in one line."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

from launch import check
from launch.devices import Gpu
from sft_dist.errors import UserError
from sft_dist.recipe import load_recipe
from tests import tiny
from tests.recipes import ROOT, write_recipe

H100 = Gpu(0, "H100", (9, 0), 80 * 2**30)
V100 = Gpu(0, "V100", (7, 0), 32 * 2**30)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_model(tmp_path_factory.mktemp("model"))


def faults(folder: Path, model: Path, *overrides: str) -> list[str]:
    (folder / "good.jsonl").write_text("{}\n")
    recipe = write_recipe(
        folder / "recipe.yaml",
        model={"model_name_or_path": str(model)},
        data={"dataset_name": str(folder / "good.jsonl")},
        train={"max_length": 64},
        output={"output_dir": str(folder / "run")},
    )
    try:
        found = check.findings(load_recipe(recipe, list(overrides)))
    except UserError as error:
        return str(error).splitlines()
    return [finding.text for finding in found if finding.level == "fault"]


def only(found: list[str]) -> str:
    assert len(found) == 1, found
    return found[0]


@pytest.mark.parametrize(
    ("gpus", "overrides", "said"),
    [
        (2, ["parallel.processes=3"], "parallel.processes: 3 is more than the 2 GPUs that can be seen here"),
        (1, ["parallel.strategy=zero3_hpz"], "parallel.strategy: zero3_hpz shards over the processes of a node"),
        (1, ["parallel.strategy=fsdp2_hybrid"], "and there is one; take single, or set parallel.processes"),
        (4, ["parallel.global_batch_size=40", "parallel.strategy=fsdp2"], "make it a multiple of 32"),
    ],
)
def test_processes_that_are_not_there(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch, gpus: int, overrides: list[str], said: str
) -> None:
    monkeypatch.setattr("launch.devices.gpus", lambda: [H100] * gpus)
    found = faults(tmp_path, model, *overrides)
    assert found
    assert all(said in line for line in found)


def test_a_file_of_ds_configs_that_was_edited_into_another_strategy(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    edited = tmp_path / "zero2.yaml"
    edited.write_text((ROOT / "ds_configs" / "zero2.yaml").read_text().replace("zero_stage: 2", "zero_stage: 3"))
    for module in ("launch.environment", "launch.check"):
        monkeypatch.setattr(f"{module}.config_path", lambda _: edited)
    line = only(faults(tmp_path, model, "parallel.strategy=zero2"))
    assert line.startswith(f"{edited}: parallel.strategy: the recipe says zero2, the launcher's file makes it zero3")


def test_an_offload_folder_that_cannot_be_used(tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    none = tmp_path / "none"
    line = only(faults(tmp_path, model, "parallel.strategy=zero3_offload", f"parallel.offload_nvme_path={none}"))
    assert line == f"parallel.offload_nvme_path: no such folder: {none}; make it, or leave the key out"
    monkeypatch.setattr("os.access", lambda path, _: str(path) != str(tmp_path))
    said = faults(tmp_path, model, "parallel.strategy=zero3_offload", f"parallel.offload_nvme_path={tmp_path}")
    assert f"parallel.offload_nvme_path: {tmp_path} cannot be written to; name a folder of yours" in said
    line = only(faults(tmp_path, model, f"parallel.offload_nvme_path={tmp_path}"))
    assert "parallel.offload_nvme_path: is for parallel.strategy=zero3_offload only" in line


@pytest.mark.parametrize(
    ("package", "overrides", "said"),
    [
        ("deepspeed", ["parallel.strategy=zero3"], "parallel.strategy: zero3: the package deepspeed is missing; run: "),
        (
            "bitsandbytes",
            ["peft.use_peft=true", "peft.load_in_4bit=true"],
            "peft.load_in_4bit: the package bitsandbytes is missing; run: ",
        ),
    ],
)
def test_a_package_that_is_missing(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch, package: str, overrides: list[str], said: str
) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *rest: None if name == package else real(name, *rest))
    assert only(faults(tmp_path, model, *overrides)).startswith(said)


def test_precision_that_the_gpus_lack(tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("launch.devices.gpus", lambda: [V100])
    line = only(faults(tmp_path, model, "train.bf16=true"))
    assert line.startswith("train.bf16: GPU 0 (V100) has compute capability 7.0, bf16 needs 8.0")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"num_local_experts": 8}, "its experts are no linear layers"),
        ({"quantization_config": {"quant_method": "awq"}}, "its weights are quantised by awq already"),
    ],
)
def test_a_model_that_bitsandbytes_cannot_take(tmp_path: Path, model: Path, change: dict[str, Any], said: str) -> None:
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(model, copy)
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | change))
    line = only(faults(tmp_path, copy, "peft.use_peft=true", "peft.load_in_4bit=true"))
    assert line.startswith(f"peft.load_in_4bit: {copy}: ")
    assert said in line


def test_an_optimizer_that_needs_whole_matrices_is_refused_over_shards(tmp_path: Path, model: Path) -> None:
    line = only(faults(tmp_path, model, "train.optim=adafactor", "parallel.strategy=fsdp2"))
    assert "train.optim: adafactor factors whole matrices, fsdp2 gives it shards; take adamw_torch, or" in line
