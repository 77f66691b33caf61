"""Proof that a run never loses work: `python -m tests.distributed.chaos --strikes 100 --seed 0`.

Real runs are started by the real command, struck at random moments, and started again until they are done. Their
weights and records must then be those of a run that was left in peace.
"""

from __future__ import annotations

import argparse
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from tests.distributed.chaos.campaign import Campaign, Struck
from tests.distributed.chaos.disk import with_mounts_of_our_own
from tests.distributed.chaos.plan import KINDS

_COLUMNS = "{:26} {:>7} {:>9} {:>17} {:>24}"


def table(runs: Sequence[Struck]) -> list[str]:
    """Lines of text: a strike, how often, survived, with the final weights, and the steps done again."""
    found = [
        (verdict.strike.kind, verdict.survived, run.survived, verdict.redone or 0)
        for run in runs
        for verdict in run.verdicts
    ]
    lines = [_COLUMNS.format("strike", "strikes", "survived", "weights the same", "steps done twice (most)")]
    for kind in [*KINDS, "all"]:
        mine = [row for row in found if kind in (row[0], "all")]
        twice = [row[3] for row in mine]
        lines.append(
            _COLUMNS.format(kind, len(mine), sum(row[1] for row in mine), sum(row[2] for row in mine),
                            f"{sum(twice)} ({max(twice, default=0)})")
        )  # fmt: skip
    return lines


def main(words: Sequence[str]) -> int:
    """Returns the exit code: 1 if anything did not survive."""
    parser = argparse.ArgumentParser(prog="python -m tests.distributed.chaos", description=__doc__)
    parser.add_argument("--strikes", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--strategies", default="ddp,zero1,zero2,zero3,fsdp2")
    parser.add_argument("--each", type=int, default=10, help="strikes at a run")
    parser.add_argument("--only", type=int, metavar="RUN", help="the run of this number alone")
    parser.add_argument("--folder", type=Path, help="for runs and logs (a temporary one)")
    options = parser.parse_args(words)
    # A background job of a shell ignores it, and would hand that down to the runs.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    folder = options.folder or Path(tempfile.mkdtemp(prefix="sft-dist-chaos-"))
    folder.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    campaign = Campaign(folder, options.seed, options.strategies.split(","), options.each, _say)
    runs: list[Struck] = []
    try:
        for run in campaign.runs(options.strikes, options.only):
            runs.append(run)
    finally:
        _say("\n" + "\n".join(table(runs)))
    survived = all(run.survived for run in runs)
    starts, late = sum(run.starts for run in runs), sum(len(run.late) for run in runs)
    _say(
        f"\n{len(runs)} runs in {starts} starts, {late} strikes too late, {time.monotonic() - began:.0f} s, seed "
        f"{options.seed}: {'all survived' if survived else f'NOT ALL SURVIVED, see {folder}'}"
    )
    if survived and options.folder is None:
        shutil.rmtree(folder)
    return 0 if survived else 1


def _say(line: str) -> None:
    print(line, flush=True)


if __name__ == "__main__":
    with_mounts_of_our_own(["-m", "tests.distributed.chaos", *sys.argv[1:]])
    sys.exit(main(sys.argv[1:]))
