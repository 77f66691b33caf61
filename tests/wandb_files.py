"""What W&B has on the disk, read in full."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from wandb.proto.wandb_internal_pb2 import Record

from sft_dist.wandb_log import _payloads


def handed_over(log: Path) -> tuple[str, list[dict[str, Any]]]:
    """The id of the run in a `.wandb` file and its rows of values, each with `_step`."""
    with open(log, "rb") as file:
        held = [Record.FromString(payload) for payload in _payloads(file)]
    ids = {record.run.run_id for record in held if record.HasField("run")}
    rows = [
        {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
        for record in held
        if record.HasField("history")
    ]
    # Of a process that was killed there may be nothing yet.
    assert len(ids) == 1 or not (ids or rows)
    return next(iter(ids), ""), rows
