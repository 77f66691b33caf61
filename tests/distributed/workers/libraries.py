"""Asks libraries whether they still do what is worked round here: OUT, in one process of two."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from torch.distributed.tensor.debug import CommDebugMode
from transformers import AutoModelForCausalLM, LlamaConfig

from sft_dist import fsdp2
from sft_dist.process import end_process, leave_process_group, quiet_libraries


def gathers(checkpointing: dict[str, Any] | None, outside: bool) -> int:
    """All-gathers of one forward and backward pass of two layers."""
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
                         num_attention_heads=2, num_key_value_heads=2)  # fmt: skip
    model = AutoModelForCausalLM.from_config(config)
    if outside:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    fsdp2.shard(model, fsdp2.make_mesh(2, 2, False), False, checkpointing)
    model.train()
    ids = torch.arange(16)[None]
    with CommDebugMode() as seen:
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    counts = {str(op): count for op, count in seen.get_comm_counts().items()}
    return sum(count for op, count in counts.items() if "gather" in op)


def main() -> None:
    quiet_libraries()
    from accelerate import Accelerator

    told: dict[str, Any] = {"kind": str(Accelerator(cpu=True).distributed_type.value)}
    told["gathers"] = gathers({"use_reentrant": False}, outside=False)
    told["gathers_outside"] = gathers(None, outside=True)
    told["gathers_kept"] = gathers(None, outside=False)
    (Path(sys.argv[1]) / f"told{os.environ['RANK']}.json").write_text(json.dumps(told))
    leave_process_group()


main()
end_process(0)
