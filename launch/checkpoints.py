"""`sft-dist checkpoints RUN`: the checkpoints of a run, and whether they are sound."""

from __future__ import annotations

import sys

from sft_dist.errors import EXIT_DONE


def show(name: str, *, contents: bool, as_json: bool) -> int:
    """Print the listing. Returns the exit code. Raises :class:`sft_dist.errors.UserError` for what is no run."""
    from sft_dist.checkpoints.listing import list_checkpoints
    from sft_dist.render import checkpoints as rendered

    listing = list_checkpoints(name, contents=contents)
    if as_json:
        import json

        print(json.dumps(rendered.to_json(listing), indent=2))
        return EXIT_DONE
    from rich.console import Console

    rendered.to_terminal(listing, Console(width=None if sys.stdout.isatty() else 80))
    return EXIT_DONE
