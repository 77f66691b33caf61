"""What the job of a stage does around its ranks: `python -m launch.pipeline.hook OUTPUT STAGE begin|end`.

It runs on the job's first node, before each attempt and after the last, and does what :mod:`launch.pipeline.work` does
around a stage on one machine.
"""

from __future__ import annotations

import sys
from datetime import UTC, datetime

from launch.pipeline import spec, state, work
from launch.pipeline.resolve import resolve
from launch.pipeline.stage import Pipeline, Stage
from launch.pipeline.state import Record
from sft_dist.errors import EXIT_BUG, EXIT_DONE, EXIT_USER, UserError

# Nobody waits behind the job's own process, and what it says goes to the job's log.
_ORDERS = work.Orders(command=(), tries=0, heard=lambda: False, say=print)


def main(words: list[str]) -> int:
    """Returns the exit code: 0, or 2 with a line on stderr that is also in the stage's record."""
    root, name, event = words
    try:
        pipeline = resolve(spec.find(root))
        if name not in pipeline.stages:
            raise UserError(f"{pipeline.file}: has no stage {name} any more; end this job")
    except UserError as error:
        print(f"sft-dist: {error}", file=sys.stderr)
        return EXIT_USER
    stage = pipeline.stages[name]
    try:
        outcome = begin(stage, pipeline) if event == "begin" else end(stage)
    except UserError as error:
        outcome = work.Outcome(EXIT_USER, reason=str(error).splitlines()[0])
    if outcome.code != EXIT_DONE:
        print(f"sft-dist: {name}: {outcome.reason}", file=sys.stderr)
    if event == "end" or outcome.code != EXIT_DONE:
        _ended(stage, pipeline, outcome)
    return outcome.code


def begin(stage: Stage, pipeline: Pipeline) -> work.Outcome:
    """Note what the stage is made from, and merge what an earlier job trained.

    Raises :class:`UserError` where its inputs, or what is asked for, are not those of its folder.
    """
    stamps = {name: stamp for name, stamp in state.stamps_now(stage, pipeline).items() if stamp is not None}
    missing = [name for name in stage.needs if name not in stamps]
    if missing:
        raise UserError(f"{missing[0]} is not done; start the pipeline again")
    if other := state.differences_of(stage):
        raise UserError(f"the pipeline asks for another recipe by now: {other[0]}; start the pipeline again")
    before = state.read_record(pipeline.dir, stage.name)
    changed = [name for name in stage.needs if before is None or before.inputs.get(name) != stamps[name]]
    if changed and not state.is_only_claimed(stage, before):
        raise UserError(f"{changed[0]} was run again after this stage had begun; start the pipeline again")
    record = Record(inputs=stamps, started=state.now(), seconds=before.seconds if before else 0.0)
    state.write_record(pipeline.dir, stage.name, record)
    return work.merge(stage, _ORDERS) if state.is_unmerged(stage) else work.Outcome(EXIT_DONE)


def end(stage: Stage) -> work.Outcome:
    """Merge the adapter, where one is to be merged, and look whether all is there."""
    if state.is_unmerged(stage):
        outcome = work.merge(stage, _ORDERS)
        if outcome.code != EXIT_DONE:
            return outcome
    if not state.is_complete(stage):
        return work.Outcome(EXIT_BUG, reason="it ended well, but left no complete model")
    return work.Outcome(EXIT_DONE)


def _ended(stage: Stage, pipeline: Pipeline, outcome: work.Outcome) -> None:
    record = state.read_record(pipeline.dir, stage.name) or Record(inputs={}, started=state.now())
    took = (datetime.now(UTC) - datetime.fromisoformat(record.started)).total_seconds()
    ended = {"ended": state.now(), "code": outcome.code, "reason": outcome.reason or None,
             "seconds": record.seconds + max(0.0, took)}  # fmt: skip
    state.write_record(pipeline.dir, stage.name, record.model_copy(update=ended))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
