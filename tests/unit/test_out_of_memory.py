"""Memory that runs out before the first step is done would at every start: it is the user's to mend."""

from __future__ import annotations

import pytest
import torch

from sft_dist.errors import UserError
from sft_dist.worker import refuse_if_too_large

OUT = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\n GPU 0 has a total capacity of 79 GiB")


def test_memory_that_runs_out_in_the_first_step_is_one_line_with_what_to_lower() -> None:
    with pytest.raises(UserError) as error:
        refuse_if_too_large(OUT, 0)
    said = str(error.value)
    assert "\n" not in said and said.startswith("train.per_device_train_batch_size: out of memory in the first step (")
    assert "Tried to allocate 2.00 GiB. GPU 0" in said and "train.gradient_checkpointing=true" in said
    assert error.value.__cause__ is OUT


def test_a_processor_without_memory_is_told_alike() -> None:
    with pytest.raises(UserError, match="out of memory in the first step"):
        refuse_if_too_large(RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: 9 bytes"), 0)


@pytest.mark.parametrize(("error", "steps"), [(OUT, 1), (RuntimeError("shape mismatch"), 0)])
def test_anything_else_is_left_as_it_is(error: RuntimeError, steps: int) -> None:
    refuse_if_too_large(error, steps)
