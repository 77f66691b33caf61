"""A worker that trains one model under ZeRO-1, 2, 3 and FSDP2, and leaves the checkpoints that a Trainer would."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from transformers import AutoModelForCausalLM, LlamaConfig

from sft_dist.process import end_process, leave_process_group


def model() -> Any:
    """A tied model none of whose sizes is a multiple of much, with a frozen weight."""
    torch.manual_seed(0)
    made = AutoModelForCausalLM.from_config(
        LlamaConfig(vocab_size=101, hidden_size=36, intermediate_size=51, num_hidden_layers=3, num_attention_heads=4,
                    num_key_value_heads=1, head_dim=10, tie_word_embeddings=True)
    )  # fmt: skip
    made.model.layers[1].mlp.up_proj.weight.requires_grad_(False)
    return made


def groups(made: Any) -> list[dict[str, Any]]:
    """With weight decay and without, as the Trainer divides them."""
    trained = [p for p in made.parameters() if p.requires_grad]
    return [{"params": [p for p in trained if p.ndim > 1], "weight_decay": 0.1},
            {"params": [p for p in trained if p.ndim == 1], "weight_decay": 0.0}]  # fmt: skip


def ids() -> torch.Tensor:
    """Other records on each rank."""
    return torch.randint(0, 101, (2, 12), generator=torch.Generator().manual_seed(dist.get_rank()))


def under_zero(folder: Path, stage: int) -> None:
    """Two steps and a checkpoint."""
    made = model()
    settings = {
        "train_micro_batch_size_per_gpu": 2,
        "zero_allow_untested_optimizer": True,
        # Several stretches a rank.
        "zero_optimization": {"stage": stage, "sub_group_size": 7000},
    }
    engine, *_ = deepspeed.initialize(
        model=made, optimizer=torch.optim.AdamW(groups(made), lr=1e-2), config=settings, dist_init_required=False
    )
    for _ in range(2):
        engine.backward(engine(input_ids=ids(), labels=ids()).loss)
        engine.step()
    engine.save_checkpoint(str(folder), tag="global_step2")
    made.config.save_pretrained(folder)


def under_fsdp2(folder: Path) -> None:
    """Two steps, a checkpoint, and the whole weights beside it."""
    from torch.distributed import checkpoint
    from torch.distributed.device_mesh import init_device_mesh

    made = model()
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in made.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(made, mesh=mesh)
    optimizer = torch.optim.AdamW(groups(made), lr=1e-2)
    for _ in range(2):
        made(input_ids=ids(), labels=ids()).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    checkpoint.save({"model": made.state_dict()}, checkpoint_id=str(folder / "pytorch_model_fsdp_0"))
    whole = {name: tensor.full_tensor() for name, tensor in made.state_dict().items()}
    if dist.get_rank() == 0:
        torch.save(whole, folder / "whole.pt")
        made.config.save_pretrained(folder)


if __name__ == "__main__":
    dist.init_process_group("gloo")
    deepspeed.init_distributed("gloo", auto_mpi_discovery=False)
    for number in (1, 2, 3):
        under_zero(Path(sys.argv[1]) / f"zero{number}", number)
    under_fsdp2(Path(sys.argv[1]) / "fsdp2")
    leave_process_group()
    end_process(0)
