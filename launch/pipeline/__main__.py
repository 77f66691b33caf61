"""`python -m launch.pipeline OUTPUT STAGE`: one stage of a pipeline that was started, as a job of a cluster runs it."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from launch import logtail
from launch.pipeline import spec
from launch.pipeline.resolve import resolve
from launch.pipeline.runner import LocalRunner
from sft_dist.errors import EXIT_USER, UserError
from sft_dist.rundir import command_line


def main(words: Sequence[str]) -> int:
    """Run one stage on this machine, if it is not done. Returns its exit code."""
    try:
        output, name = words
        pipeline = resolve(spec.find(output))
        if name not in pipeline.stages:
            raise UserError(f"{output} has no stage {name}; it has {', '.join(pipeline.stages)}")
        runner = LocalRunner(pipeline, command_line(), 0)
        runner.start(pipeline.stages[name], [])
        return runner.finish()
    except ValueError:
        logtail.say([f"{logtail.PREFIX} usage: python -m launch.pipeline OUTPUT STAGE"])
    except UserError as error:
        logtail.say(f"{logtail.PREFIX} {line}" for line in str(error).splitlines())
    return EXIT_USER


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
