"""Checkpoints are pickles; nothing in one is run, whoever wrote it."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint import metadata

from sft_dist.errors import UserError
from sft_dist.export.dcp import distributed_tensors
from sft_dist.export.zero import zero_tensors


class Trap:
    """Makes a file when it is read without care."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.file,))


class Evaluated(Trap):
    """The same through a builtin."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (eval, (f"open({str(self.file)!r}, 'w')",))


def one_rank(folder: Path, **extra: Any) -> Path:
    """A ZeRO-2 checkpoint of one process and one weight."""
    (folder / "global_step1").mkdir(parents=True)
    (folder / "latest").write_text("global_step1\n")
    weight = torch.arange(6.0)
    models = {"module": {}, "buffer_names": [], "param_shapes": [{"w": torch.Size([2, 3])}], "shared_params": {}}
    optimizer = {"zero_stage": 2, "partition_count": 1, "single_partition_of_fp32_groups": [weight], **extra}
    torch.save(models, folder / "global_step1" / "mp_rank_00_model_states.pt")
    torch.save({"optimizer_state_dict": optimizer},
               folder / "global_step1" / "zero_pp_rank_0_mp_rank_00_optim_states.pt")  # fmt: skip
    return folder


def test_a_checkpoint_of_one_process(tmp_path: Path) -> None:
    tensors = zero_tensors(one_rank(tmp_path / "checkpoint-1"))
    assert list(tensors) == ["w"] and tensors.read("w").tolist() == [[0, 1, 2], [3, 4, 5]]


@pytest.mark.parametrize("kind", [Trap, Evaluated])
def test_a_trap_in_a_zero_checkpoint(tmp_path: Path, kind: type[Trap]) -> None:
    folder = one_rank(tmp_path / "checkpoint-1", loss_scaler=kind(tmp_path / "sprung"))
    with pytest.raises(UserError, match="optim_states") as caught:
        zero_tensors(folder)
    assert "\n" not in str(caught.value) and not (tmp_path / "sprung").exists()


@pytest.mark.parametrize("tag", ["../elsewhere", "", "global_step9"])
def test_latest_names_a_folder_of_the_checkpoint(tmp_path: Path, tag: str) -> None:
    folder = one_rank(tmp_path / "checkpoint-1")
    (folder / "latest").write_text(tag)
    with pytest.raises(UserError, match="latest names is missing"):
        zero_tensors(folder)


@pytest.mark.parametrize("kind", [Trap, Evaluated])
def test_a_trap_in_the_description_of_an_fsdp2_checkpoint(tmp_path: Path, kind: type[Trap]) -> None:
    described = metadata.Metadata(state_dict_metadata={}, planner_data=kind(tmp_path / "sprung"))
    (tmp_path / ".metadata").write_bytes(pickle.dumps(described))
    with pytest.raises(UserError, match="no part of a checkpoint's description") as caught:
        distributed_tensors(tmp_path)
    assert "\n" not in str(caught.value) and not (tmp_path / "sprung").exists()


def test_a_dtype_is_the_only_thing_of_torch_itself(tmp_path: Path) -> None:
    (tmp_path / ".metadata").write_bytes(b"ctorch\nload\n(S'x'\ntR.")
    with pytest.raises(UserError, match=r"torch\.load"):
        distributed_tensors(tmp_path)
