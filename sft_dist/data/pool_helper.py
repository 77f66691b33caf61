"""`python -m sft_dist.data.pool_helper TASKS ANSWERS`: a process that makes blocks of batches for another (see pool).

The arguments are two pipes by number. It ends when the pipe of tasks does, whatever it is doing then.
"""

from __future__ import annotations

import os
import pickle
import queue
import signal
import sys
import threading
import traceback
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sft_dist.data.work import MakesBlocks


def main(tasks: Connection, answers: Connection) -> None:
    # The interrupt of a terminal goes to all of its processes; the one that gave us work ends us.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    inbox: queue.SimpleQueue[bytes] = queue.SimpleQueue()
    threading.Thread(target=_read, args=(tasks, inbox), daemon=True).start()
    try:
        work: MakesBlocks = pickle.loads(inbox.get())
        _answer(answers, None)
        while True:
            number, batch, form = pickle.loads(inbox.get())
            _answer(answers, (number, work(batch, form)))
    except Exception as error:
        from sft_dist.data.encoder import EncoderDiffers
        from sft_dist.errors import UserError

        _answer(answers, error if isinstance(error, EncoderDiffers | UserError) else traceback.format_exc())


def _read(tasks: Connection, inbox: queue.SimpleQueue[bytes]) -> None:
    """Take in tasks while others are worked on, so that who sends them never waits."""
    while True:
        try:
            inbox.put(tasks.recv_bytes())
        except (EOFError, OSError):
            os._exit(0)


def _answer(answers: Connection, what: Any) -> None:
    try:
        answers.send_bytes(pickle.dumps(what, pickle.HIGHEST_PROTOCOL))
    except OSError:
        os._exit(0)


if __name__ == "__main__":
    main(Connection(int(sys.argv[1]), writable=False), Connection(int(sys.argv[2]), readable=False))
