"""`sft-dist checkpoints RUN`: the checkpoints of a run, and whether they are sound."""

from __future__ import annotations

import os
import sys

from sft_dist.errors import EXIT_DONE


def show(name: str, *, contents: bool, as_json: bool) -> int:
    """Print the listing. Returns the exit code. Raises :class:`sft_dist.errors.UserError` for what is no run."""
    from sft_dist.checkpoints.listing import list_checkpoints
    from sft_dist.render import checkpoints as rendered

    listing = list_checkpoints(name, contents=contents)
    if as_json:
        import json

        _print(json.dumps(rendered.to_json(listing), indent=2) + "\n")
        return EXIT_DONE
    from rich.console import Console

    from sft_dist.render.text import tolerate_encoding

    console = Console(width=None if sys.stdout.isatty() else 80)
    tolerate_encoding(console)
    with console.capture() as printed:
        rendered.to_terminal(listing, console)
    _print(printed.get())
    return EXIT_DONE


def _print(text: str) -> None:
    try:
        print(text, end="", flush=True)
    except BrokenPipeError:
        # Whoever reads, such as head, has seen enough; Python would complain once more at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
