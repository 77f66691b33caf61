"""`python -m sft_dist.export SOURCE --output DIR`: a plain model directory of whatever a training leaves."""

from __future__ import annotations

import argparse
import signal
import sys
from pathlib import Path
from types import FrameType

from sft_dist.process import guarded


def main(words: list[str]) -> int:
    """The command. Returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m sft_dist.export")
    parser.add_argument("source")
    parser.add_argument("--output", required=True)
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default=None)
    parser.add_argument("--base", default=None)
    parser.add_argument("--keep-adapter", action="store_true")
    parser.add_argument("--max-shard-size", default="5GB")
    options = parser.parse_args(words)

    def work() -> None:
        # A signal unwinds, so that the unfinished folder is removed.
        for number in (signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, _leave)
        _export(options)

    return guarded(work)


def _export(options: argparse.Namespace) -> None:
    import torch

    from sft_dist.export.command import Wishes, export
    from sft_dist.export.writer import size_of

    wishes = Wishes(
        dtype=getattr(torch, options.dtype) if options.dtype else None,
        base=options.base,
        keep_adapter=options.keep_adapter,
        file_bytes=size_of(options.max_shard_size),
    )
    export(options.source, Path(options.output).expanduser(), wishes)


def _leave(number: int, _: FrameType | None) -> None:
    raise SystemExit(128 + number)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
