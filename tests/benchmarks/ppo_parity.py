"""How far PPO's rollouts and losses on two processes are from those on one, under every strategy.

`python -m tests.benchmarks.ppo_parity` prints the table of docs/parity.md.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from tests.ppo_runs import CASES, job, rollouts_of, small_recipe
from tests.ranks import do_runs
from tests.recipes import records

STRATEGIES = ("ddp", "zero1", "zero2", "zero3", "fsdp2")
_ROLLOUT = (("score", "scores"), ("log_probs", "log-probabilities"), ("values", "values"), ("returns", "returns"))


def main() -> None:
    """Run and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="where the runs go")
    folder = parser.parse_args().folder or Path(tempfile.mkdtemp(prefix="ppo-parity-"))
    folder.mkdir(parents=True, exist_ok=True)
    recipe = small_recipe(folder)
    for strategy in ("single", *STRATEGIES):
        jobs = [job(folder, recipe, f"{strategy}-{name}", *words) for name, words in CASES.items()]
        do_runs(folder, strategy, 1 if strategy == "single" else 2, jobs)
    names = [heading for _, heading in _ROLLOUT]
    print(f"| case | strategy | other tokens | {' | '.join(names)} | losses | gradient norms |")
    print("|---" * (len(names) + 5) + "|")
    for case in CASES:
        for strategy in STRATEGIES:
            print(row(case, strategy, folder / f"single-{case}", folder / f"{strategy}-{case}"))


def row(case: str, strategy: str, one: Path, other: Path) -> str:
    """Largest differences: of a rollout's numbers as they are, of losses and norms relative to one or more."""
    pairs = list(zip(rollouts_of(one), rollouts_of(other), strict=True))
    tokens = sum(a != b for x, y in pairs for a, b in zip(x.responses, y.responses, strict=True))
    cells = [
        f"{max((getattr(x, name) - getattr(y, name)).abs().max().item() for x, y in pairs):.0e}" for name, _ in _ROLLOUT
    ]
    steps = list(zip(records(one), records(other), strict=True))
    cells += [f"{max(abs(a[n] - b[n]) / max(abs(a[n]), 1) for a, b in steps):.0e}" for n in ("loss", "grad_norm")]
    return f"| {case} | {strategy} | {tokens} | {' | '.join(cells)} |"


if __name__ == "__main__":
    main()
