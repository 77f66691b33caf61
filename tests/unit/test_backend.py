"""What the launcher asks for, what the recipe fills in, and where the two contradict."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from launch.environment import worker_environments
from sft_dist.backend import STRATEGIES, Backend, Sizes, deepspeed_config, settle
from sft_dist.config import Recipe
from sft_dist.errors import UserError

SIZES = Sizes(accumulation=4, world=2, local_world=2, hidden=64)


def recipe(train: dict[str, Any] | None = None, **parallel: Any) -> Recipe:
    return Recipe.model_validate(
        {
            "model": {"model_name_or_path": "m"},
            "data": {"dataset_name": "d"},
            "train": train or {},
            "parallel": parallel,
            "output": {"output_dir": "o"},
        }
    )


def launched(strategy: str, processes: int = 2) -> dict[str, str]:
    return worker_environments(strategy, processes, master_port=1, omp_num_threads=1, base={})[0]


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_each_file_of_ds_configs_makes_the_strategy_of_its_name(strategy: str) -> None:
    backend = settle(recipe(strategy=strategy), launched(strategy))
    assert backend == STRATEGIES[strategy]
    assert settle(recipe(), launched(strategy)) == backend


def test_one_process_is_plain() -> None:
    assert settle(recipe(strategy="single"), launched("single", 1)) == Backend()
    assert settle(recipe(), {}) == Backend()


@pytest.mark.parametrize(
    ("wanted", "strategy", "said"),
    [
        ("zero2", "zero3", "parallel.strategy: the recipe says zero2, the launcher's file makes it zero3"),
        ("fsdp2", "ddp", "the recipe says fsdp2, the launcher's file makes it ddp; launch with ds_configs/fsdp2.yaml"),
        ("zero3_hpz", "zero3", "the recipe says zero3_hpz"),
        ("single", "ddp", "the recipe says single, the launcher started more than that"),
    ],
)
def test_a_launcher_that_does_other_than_the_recipe_says_is_refused(wanted: str, strategy: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        settle(recipe(strategy=wanted), launched(strategy))


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ({"ACCELERATE_MIXED_PRECISION": "fp16"}, "mixed_precision: fp16 contradicts train.bf16=None"),
        ({"ACCELERATE_GRADIENT_CLIPPING": "0.5"}, r"gradient_clipping: 0.5 contradicts train.max_grad_norm=1.0"),
        ({"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "8"}, "contradicts train.gradient_accumulation_steps=1"),
        ({"ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"}, "the recipe says zero2, the launcher's file makes it zero3"),
    ],
)
def test_a_file_edited_by_hand_against_the_recipe_is_refused(variables: dict[str, str], said: str) -> None:
    with pytest.raises(UserError, match=said):
        settle(recipe(strategy="zero2"), launched("zero2") | variables)


@pytest.mark.parametrize(
    ("own", "said"),
    [
        ({"gradient_clipping": 3}, "deepspeed_config_file.gradient_clipping: 3 contradicts train.max_grad_norm"),
        ({"train_micro_batch_size_per_gpu": 3}, "contradicts train.per_device_train_batch_size=8"),
        ({"train_batch_size": 3}, "contradicts parallel.global_batch_size=16"),
        ({"fp16": {"enabled": True}}, "deepspeed_config_file.fp16"),
        ({"optimizer": {"type": "Adam"}}, "deepspeed_config_file.optimizer: Adam contradicts train.optim=adamw_torch"),
        ({"zero_optimization": {"stage": 3}}, "the recipe says zero2"),
        ([], "holds no JSON object"),
    ],
)
def test_a_deepspeed_file_of_the_user_s_own_may_not_contradict_the_recipe(tmp_path: Path, own: Any, said: str) -> None:
    file = tmp_path / "own.json"
    file.write_text(json.dumps(own))
    with pytest.raises(UserError, match=said):
        settle(recipe(strategy="zero2"), launched("zero2") | {"ACCELERATE_DEEPSPEED_CONFIG_FILE": str(file)})


def test_settings_of_the_user_s_own_file_are_laid_over_ours(tmp_path: Path) -> None:
    file = tmp_path / "own.json"
    own = {"zero_optimization": {"stage": "auto", "reduce_bucket_size": 77}, "wall_clock_breakdown": True}
    file.write_text(json.dumps(own | {"zero_optimization": {"stage": 2, "reduce_bucket_size": 77}}))
    environment = launched("zero2") | {"ACCELERATE_DEEPSPEED_CONFIG_FILE": str(file)}
    backend = settle(recipe(strategy="zero2"), environment)
    assert "ACCELERATE_DEEPSPEED_CONFIG_FILE" not in environment
    made = deepspeed_config(backend, recipe(), SIZES, bf16=False, cuda=False)
    assert made["zero_optimization"]["reduce_bucket_size"] == 77
    assert made["wall_clock_breakdown"] is True


def test_fsdp1_is_refused() -> None:
    with pytest.raises(UserError, match="FSDP1 is deprecated"):
        settle(recipe(), launched("fsdp2") | {"FSDP_VERSION": "1"})


def test_deepspeed_s_settings_follow_from_the_recipe() -> None:
    asked = recipe({"per_device_train_batch_size": 3, "max_grad_norm": 0.5})
    made = deepspeed_config(STRATEGIES["zero3"], asked, SIZES, bf16=True, cuda=True)
    assert made["train_batch_size"] == 3 * 4 * 2
    assert made["train_micro_batch_size_per_gpu"] == 3
    assert made["gradient_accumulation_steps"] == 4
    assert made["gradient_clipping"] == 0.5
    assert made["bf16"] == {"enabled": True}
    assert made["communication_data_type"] == "fp32"
    zero = made["zero_optimization"]
    assert (zero["stage"], zero["overlap_comm"]) == (3, True)
    assert zero["reduce_bucket_size"] == 64 * 64
    assert zero["stage3_param_persistence_threshold"] == 640
    assert "offload_param" not in zero
    assert "auto" not in json.dumps(made)


def test_offloading_goes_to_memory_or_to_the_disk_of_the_recipe() -> None:
    offload = STRATEGIES["zero3_offload"]
    memory = deepspeed_config(offload, recipe(), SIZES, bf16=False, cuda=True)["zero_optimization"]
    assert memory["offload_param"] == memory["offload_optimizer"] == {"device": "cpu", "pin_memory": True}
    disk = recipe(strategy="zero3_offload", offload_nvme_path="/fast")
    zero = deepspeed_config(offload, disk, SIZES, bf16=False, cuda=False)["zero_optimization"]
    assert zero["offload_param"] == {"device": "nvme", "nvme_path": "/fast", "pin_memory": False}
    only = deepspeed_config(STRATEGIES["zero2_offload"], recipe(), SIZES, bf16=False, cuda=False)["zero_optimization"]
    assert "offload_optimizer" in only
    assert "offload_param" not in only


def test_hierarchical_partitioning_is_over_the_processes_of_a_node() -> None:
    sizes = Sizes(accumulation=1, world=16, local_world=8, hidden=64)
    made = deepspeed_config(STRATEGIES["zero3_hpz"], recipe(), sizes, bf16=False, cuda=True)
    assert made["zero_optimization"]["zero_hpz_partition_size"] == 8
