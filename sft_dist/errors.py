"""The errors a user can mend, and the exit codes every command shares.

Nothing here imports torch: the control plane raises the same errors as the workers.
"""

from __future__ import annotations

EXIT_DONE = 0
EXIT_BUG = 1
EXIT_USER = 2
EXIT_RESUMABLE = 75  # EX_TEMPFAIL of sysexits.h: stopped, but it can go on


class UserError(Exception):
    """Something the user can mend: shown as one line, without a traceback, with exit code 2.

    The message names the file (or record, or command-line word), the key, what is wrong and the mend.
    """


class RecipeError(UserError):
    """A recipe that cannot be run, found while reading it."""


class DataError(UserError):
    """Data that cannot be used; the message carries the file and the record number."""
