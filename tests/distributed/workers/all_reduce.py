"""Adds up the ranks over gloo, as a worker of a run would; FOLDER/sum<RANK> holds the result and who it is."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch
from accelerate import PartialState

from sft_dist.process import end_process, leave_process_group

state = PartialState(cpu=not torch.cuda.is_available())
total = torch.tensor([float(state.process_index)], device=state.device)
torch.distributed.all_reduce(total)
told = {
    "sum": total.item(),
    "processes": state.num_processes,
    "local": state.local_process_index,
    "OMP_NUM_THREADS": os.environ["OMP_NUM_THREADS"],
}
(Path(sys.argv[1]) / f"sum{state.process_index}").write_text(json.dumps(told))
leave_process_group()
end_process(0)
