"""What the reports of all stages tell of a run."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from sft_dist.data.account import Account
from sft_dist.data.rows import Prepared
from sft_dist.render.curve import Curve
from sft_dist.render.wording import duration
from sft_dist.rundir import RunDir
from sft_dist.trainers.ordered import Ordered


def summary_of(
    trainer: Ordered, train: Account, held_out: Prepared | None, before: Any, after: Any, seconds: float, **more: Any
) -> dict[str, Any]:
    """What `summary.json` holds. `before` and `after`: what was measured, each a dataclass or None."""
    losses = [h["loss"] for h in trainer.state.log_history if "loss" in h]
    return {
        "data": {"train": asdict(train), "held_out": asdict(held_out.account) if held_out else None},
        **more,
        "steps": trainer.state.global_step,
        "final_loss": losses[-1] if losses else None,
        "before": asdict(before) if before else None,
        "after": asdict(after) if after else None,
        "processes": trainer.args.world_size,
        "seconds": seconds,
        "peak_memory_gb": peak_gb(trainer),
        **trainer.throughput.overall(),
    }


def facts_of(trainer: Ordered, run: RunDir, seconds: float) -> list[tuple[str, str]]:
    """Processes, steps, time and places, for people. `seconds`: of the whole run."""
    overall = trainer.throughput.overall()
    return [
        ("processes", str(trainer.args.world_size)),
        ("optimizer steps", str(trainer.state.global_step)),
        ("tokens/s", f"{overall['tokens_per_second']:,.0f} ({overall['trained_tokens_per_second']:,.0f} trained)"),
        ("time", f"{duration(seconds)}, of which training {duration(trainer.throughput.seconds)}"),
        ("peak memory", f"{peak_gb(trainer):.1f} GB a process"),
        ("model", str(run.model)),
        ("log", str(run.metrics)),
    ]


def curve_of(trainer: Ordered) -> Curve:
    """The losses that were logged."""
    history = trainer.state.log_history
    return Curve(
        train=tuple((h["step"], h["loss"]) for h in history if "loss" in h),
        held_out=tuple((h["step"], h["eval_loss"]) for h in history if "eval_loss" in h),
    )


def peak_gb(trainer: Ordered) -> float:
    """The most memory that a process has held, as far as it was logged."""
    return max((h["peak_memory_gb"] for h in trainer.state.log_history if "peak_memory_gb" in h), default=0.0)
