"""One process of a verification: `python -m sft_dist.verify.worker STRATEGY FOLDER`, each case a whole run.

All cases of a strategy share the processes: starting them takes longer than a case. The one process of `single` also
does them with accumulated micro-batches.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import product
from pathlib import Path

from sft_dist.errors import UserError
from sft_dist.process import end_process, guarded, leave_process_group, settle_accelerator
from sft_dist.recipe import load_recipe
from sft_dist.verify.cases import ACCUMULATED, CASES, SINGLE, Plan, micro_batch, run_folder


def main(words: list[str]) -> int:
    """Run the cases. Returns the exit code."""
    strategy, folder = words[0], Path(words[1])

    def work() -> None:
        settle_accelerator()
        plan = Plan.read(folder)
        variants = (SINGLE, ACCUMULATED) if strategy == SINGLE else (strategy,)
        for variant, shape, name in product(variants, plan.shapes, plan.cases):
            with forgotten():
                _run(variant, folder / shape, name)
        leave_process_group()

    return guarded(work)


def _run(strategy: str, folder: Path, name: str) -> None:
    from sft_dist import worker

    case = next(case for case in CASES if case.name == name)
    size = int(os.environ.get("WORLD_SIZE", "1"))
    run = run_folder(folder, strategy, name)
    rows = 1 if strategy == ACCUMULATED else micro_batch(size)
    recipe = load_recipe(
        folder / f"{name}.yaml",
        [
            *case.overrides,
            f"train.per_device_train_batch_size={rows}",
            f"parallel.strategy={SINGLE if strategy == ACCUMULATED else strategy}",
            f"parallel.processes={size}",
            f"output.output_dir={run}",
        ],
    )
    try:
        worker.run(recipe, folder / f"{name}.yaml", ["sft-dist", "verify"])
    except Exception as error:
        if size > 1 and not isinstance(error, UserError):
            # The other ranks wait for this one: only an end of the process frees them.
            raise
        run.mkdir(parents=True, exist_ok=True)
        (run / "failed.json").write_text(json.dumps({"why": f"{type(error).__name__}: {error}"}))
        if not isinstance(error, UserError):
            traceback.print_exc()


@contextmanager
def forgotten() -> Iterator[None]:
    """One of several runs in a process: accelerate and DeepSpeed begin anew after it; torch's process group stays."""
    launched = dict(os.environ)
    yield
    # Libraries keep what they were told for the life of a process.
    os.environ.clear()
    os.environ.update(launched)
    from accelerate.state import AcceleratorState, GradientState

    if "deepspeed" in sys.modules:
        from deepspeed.utils import groups

        groups._ZERO_PARAM_INTRA_PARALLEL_GROUP = None

    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    gc.collect()


if __name__ == "__main__":
    end_process(main(sys.argv[1:]))
