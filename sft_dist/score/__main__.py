"""`python -m sft_dist.score MODEL FILE`: rewards of a reward model for the records of a file."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from sft_dist.config import DataSection
from sft_dist.process import guarded


def main(words: list[str]) -> int:
    """The command. Returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m sft_dist.score")
    parser.add_argument("model")
    parser.add_argument("file")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--split", default="train")
    parser.add_argument("--format", default="auto")
    parser.add_argument("--formatting")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--max-bad-records", type=int, default=0)
    options = parser.parse_args(words)

    def work() -> None:
        from sft_dist.score.command import score

        data = DataSection(dataset_name=options.file, format=options.format, formatting=options.formatting,
                           max_bad_records=options.max_bad_records)  # fmt: skip
        score(options.model, data, options.split, options.output, options.batch_size, options.dtype)

    return guarded(work)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
