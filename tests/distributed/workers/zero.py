"""Trains the model of `tests.orders` under DeepSpeed, without a trainer; FOLDER/STAGE.pt holds norms and weights."""

from __future__ import annotations

import sys
from pathlib import Path

import deepspeed
import torch
from torch import distributed

from sft_dist.process import end_process, leave_process_group, settle_accelerator
from tests import orders

settle_accelerator()
deepspeed.init_distributed("gloo", verbose=False)
rank = distributed.get_rank()
for stage in (1, 2, 3):
    network = orders.model()
    engine, *_ = deepspeed.initialize(
        model=network,
        optimizer=torch.optim.AdamW(network.parameters(), lr=1e-2, weight_decay=0.0),
        config={
            "train_micro_batch_size_per_gpu": orders.ROWS,
            "gradient_accumulation_steps": orders.MICRO_BATCHES,
            # The default is 1.0.
            "gradient_clipping": 0.0,
            # ZeRO-3's own linear layer sums the gradient of a bias in an order of its own.
            "zero_optimization": {"stage": stage, "memory_efficient_linear": False},
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
        },
    )
    norms = []
    for batch in orders.steps():
        tokens = orders.trained_tokens(batch)
        for number in range(orders.MICRO_BATCHES):
            engine.set_gradient_accumulation_boundary(number == orders.MICRO_BATCHES - 1)
            loss = orders.loss_sum(engine, orders.micro_batch(batch, rank, number)) / tokens
            # DeepSpeed averages over ranks what is to be summed.
            engine.backward(loss * orders.RANKS, scale_wrt_gas=False)
        engine.step()
        norms.append(float(engine.get_global_grad_norm()))
    with deepspeed.zero.GatheredParameters(list(network.parameters()), enabled=stage == 3):
        weights = {name: weight.detach().clone() for name, weight in network.named_parameters()}
    if rank == 0:
        torch.save({"norms": norms, "weights": weights}, Path(sys.argv[1]) / f"{stage}.pt")
    engine.destroy()
leave_process_group()
end_process(0)
