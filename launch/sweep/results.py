"""What a sweep came to: `results.json`, `results.csv` and `results.svg` in its folder, and the table."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from launch.sweep import metric
from launch.sweep.space import Choices, Range, short_names
from launch.sweep.study import Study
from launch.sweep.trials import Trial
from sft_dist.errors import UserError
from sft_dist.render.sweep import Row, SweepReport, Varied
from sft_dist.rundir import RunDir, write_text


def collect(study: Study, trials: Sequence[Trial], ranked: bool = True) -> SweepReport:
    """The trials with their numbers; `ranked`: the best first, and last those that are not done, in their order."""
    greater = study.greater_is_better
    rows = [_row(study, trial, greater) for trial in trials]
    if ranked:
        rows.sort(key=lambda row: (row.metric is None, (-1 if greater else 1) * (row.metric or 0.0)))
    return SweepReport(
        name=study.name,
        metric=study.settings.metric,
        greater_is_better=greater,
        varied=tuple(_varied(study)),
        rows=tuple(rows),
    )


def write(report: SweepReport, root: Path) -> list[Path]:
    """Write the three files, each complete or as it was. Raises :class:`UserError`."""
    from sft_dist.render.sweep_picture import sweep_svg

    texts = {"results.json": json.dumps(as_json(report), indent=2, ensure_ascii=False) + "\n",
             "results.csv": as_csv(report), "results.svg": sweep_svg(report)}  # fmt: skip
    try:
        for name, text in texts.items():
            write_text(root / name, text)
    except OSError as error:
        raise UserError(f"output_dir: {root} cannot be written: {error.strerror}; free space, then `sft-dist sweep "
                        "SWEEP.yaml --report`") from error  # fmt: skip
    return [root / name for name in texts]


def as_json(report: SweepReport) -> dict[str, Any]:
    """The table with all that is known; null for what is not there."""
    return {
        "sweep": report.name,
        "metric": report.metric,
        "greater_is_better": report.greater_is_better,
        "parameters": [varied.key for varied in report.varied],
        "trials": [
            {
                "trial": row.name,
                "settings": dict(row.settings),
                report.metric: row.metric,
                "state": row.state,
                "reason": row.reason,
                "said": row.said,
                "tokens_per_second": row.tokens_per_second,
                "steps": row.steps,
                "seconds": row.seconds,
                "folder": row.folder,
            }
            for row in report.rows
        ],
    }


def as_csv(report: SweepReport) -> str:
    """The same as a table, with a column for each varied key; empty for what is not there."""
    keys = [varied.key for varied in report.varied]
    file = io.StringIO()
    table = csv.writer(file, lineterminator="\n")
    table.writerow(
        ["trial", *keys, report.metric, "state", "reason", "tokens_per_second", "steps", "seconds", "folder"]
    )
    for row in report.rows:
        values = [_cell(row.settings[key]) for key in keys]
        table.writerow([row.name, *values, row.metric, row.state, row.reason, row.tokens_per_second, row.steps,
                        row.seconds, row.folder])  # fmt: skip
    return file.getvalue()


def _cell(value: Any) -> Any:
    return value if isinstance(value, int | float | str) and not isinstance(value, bool) else json.dumps(value)


def _row(study: Study, trial: Trial, greater: bool) -> Row:
    run = RunDir(trial.folder)
    held = metric.summary(run) if trial.state == "done" else {}
    value = None
    reason = trial.reason
    if trial.state == "done":
        value = metric.read(run, study.settings.metric, study.settings.metric_value, greater)
        reason = f"no {study.settings.metric}" if value is None else None
    steps = held.get("steps")
    return Row(
        name=trial.name,
        settings=trial.settings,
        metric=value,
        state=trial.state,
        reason=reason,
        tokens_per_second=metric.number(held.get("tokens_per_second")),
        steps=steps if isinstance(steps, int) else metric.last_step(run),
        seconds=trial.seconds,
        folder=str(trial.folder),
        said=trial.said if trial.state == "failed" else None,
    )


def _varied(study: Study) -> list[Varied]:
    names = short_names(tuple(study.parameters))
    found = []
    for key, each in study.parameters.items():
        listed = each.values if isinstance(each, Choices) else None
        found.append(Varied(key, names[key], listed, isinstance(each, Range) and each.log))
    return found
