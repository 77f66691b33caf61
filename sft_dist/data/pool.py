"""Batches of records to blocks, in order, by this process and, where there is much to do, by others beside it.

The others are fresh interpreters, not forks: this process may hold threads, a CUDA context and locks. They start
after `PATIENCE` seconds of work, so that little data never waits for an interpreter, and this process works on until
they are there. Each reads batches from a pipe and writes blocks to another. When this process dies the pipe ends and
so do they; when one of them dies, its pipe ends, and that is one line.
"""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from multiprocessing.connection import Connection, wait
from typing import Any

from sft_dist.data.encoder import EncoderDiffers
from sft_dist.data.files import RawRecord
from sft_dist.data.work import Block, MakesBlocks
from sft_dist.errors import UserError

PATIENCE = 1.0  # seconds
BATCH = 512  # records
BATCH_CHARACTERS = 1 << 21
# Batches that a process is given at a time: the next lies ready when one is done.
_AHEAD = 2
# Unset `data.dataset_num_proc` starts no more: this process could not feed them.
MOST = 32
Batch = list[RawRecord]


def batches(records: Iterator[RawRecord]) -> Iterator[Batch]:
    """Records in batches that depend on nothing but the records, so that the rows do not either."""
    batch: Batch = []
    size = 0
    for record in records:
        batch.append(record)
        size += len(record.text) if record.text is not None else _characters(record.fields)
        if len(batch) >= BATCH or size >= BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _characters(value: Any) -> int:
    """About how long a record is."""
    if isinstance(value, str | bytes):
        return len(value)
    if isinstance(value, dict):
        return sum(map(_characters, value.values()))
    return sum(map(_characters, value)) if isinstance(value, list) else 8


def processes(asked: int | None) -> int:
    """How many processes prepare data: as many as the recipe asks for, or one for each core that is ours."""
    if asked is not None:
        return asked
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(cores, MOST)


class Blocks:
    """Iterates over (batch, its block), in order; to be closed, which ends the other processes.

    `form`, the format of the records, is empty until a block has found it; as long as it is, batches wait for the
    blocks before them. Raises what the records' source raises, behind all batches that came before;
    :class:`EncoderDiffers`; and :class:`UserError` when a process dies.
    """

    def __init__(self, records: Iterator[RawRecord], work: MakesBlocks, workers: int, form: str) -> None:
        self.form = form
        self._source = batches(records)
        self._work, self._workers = work, workers
        self._helpers: list[_Helper] = []
        self._began = time.monotonic()
        self._ended: BaseException | None = None
        # By number: batches that are under way, and blocks that wait for those before them.
        self._batches: dict[int, Batch] = {}
        self._blocks: dict[int, Block] = {}
        self._next_in, self._next_out = 0, 0

    def __enter__(self) -> Blocks:
        return self

    def __exit__(self, *_: object) -> None:
        for helper in self._helpers:
            helper.end()

    def __iter__(self) -> Iterator[tuple[Batch, Block]]:
        while True:
            while self._next_out in self._blocks:
                block = self._blocks.pop(self._next_out)
                self.form = self.form or block.form
                self._next_out += 1
                yield self._batches.pop(self._next_out - 1), block
            if not self._step():
                return

    def _step(self) -> bool:
        """Give out work and take in blocks, or do a batch here; False when all is done."""
        self._hire()
        ready = [helper for helper in self._helpers if helper.ready]
        for _ in range(_AHEAD):
            for helper in ready:
                # Results that wait for a slow batch are held in memory.
                if len(helper.given) < _AHEAD and self._next_in - self._next_out < 4 * len(ready):
                    self._give(helper)
        waiting = [helper for helper in self._helpers if helper.given or not helper.ready]
        here = not ready and self._take_batch()
        if here:
            number = self._next_in - 1
            self._blocks[number] = self._work(self._batches[number], self.form)
        elif not any(helper.given for helper in waiting):
            if self._ended is not None and not isinstance(self._ended, StopIteration):
                raise self._ended
            return False
        self._collect(waiting, 0.0 if here else None)
        return True

    def _hire(self) -> None:
        """Start the other processes when there is work for them, as it seems."""
        if self._helpers or self._workers < 2 or not self.form or self._ended is not None:
            return
        if time.monotonic() - self._began < PATIENCE:
            return
        try:
            packed = pickle.dumps(self._work)
        except Exception:  # a tokenizer of a model's own code, say
            self._workers = 1
            return
        for _ in range(self._workers):
            self._helpers.append(_Helper())
        for helper in self._helpers:
            helper.send(packed)

    def _take_batch(self) -> bool:
        if self._ended is None:
            try:
                self._batches[self._next_in] = next(self._source)
                self._next_in += 1
                return True
            except StopIteration as end:
                self._ended = end
            except UserError as error:
                self._ended = error
        return False

    def _give(self, helper: _Helper) -> None:
        if self._take_batch():
            number = self._next_in - 1
            helper.send((number, self._batches[number], self.form))
            helper.given.add(number)

    def _collect(self, helpers: Sequence[_Helper], timeout: float | None) -> None:
        by_pipe = {helper.answers: helper for helper in helpers}
        for pipe in wait(list(by_pipe), timeout):
            helper = by_pipe[pipe]  # type: ignore[index]
            answer = helper.receive()
            if answer is None:
                helper.ready = True
            else:
                number, block = answer
                helper.given.discard(number)
                self._blocks[number] = block


class _Helper:
    """Another process, with the numbers of the batches that it was given."""

    def __init__(self) -> None:
        self.ready = False
        self.given: set[int] = set()
        there, tasks = os.pipe()
        answers, back = os.pipe()
        environment = {
            **os.environ, "TOKENIZERS_PARALLELISM": "false", "RAYON_NUM_THREADS": "1", "OMP_NUM_THREADS": "1",
            "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": os.pathsep.join(p or os.getcwd() for p in sys.path),
        }  # fmt: skip
        try:
            self.process = subprocess.Popen(
                [sys.executable, "-P", "-m", "sft_dist.data.pool_helper", str(there), str(back)],
                pass_fds=(there, back), env=environment, stdin=subprocess.DEVNULL,
            )  # fmt: skip
        finally:
            os.close(there)
            os.close(back)
        self.tasks, self.answers = Connection(tasks, readable=False), Connection(answers, writable=False)

    def send(self, task: Any) -> None:
        try:
            self.tasks.send_bytes(task if isinstance(task, bytes) else pickle.dumps(task, pickle.HIGHEST_PROTOCOL))
        except OSError as error:
            raise self._dead() from error

    def receive(self) -> tuple[int, Block] | None:
        """A block with its number; None when the process is ready for work. Raises what the work raised."""
        try:
            answer = pickle.loads(self.answers.recv_bytes())
        except (EOFError, OSError) as error:
            raise self._dead() from error
        if isinstance(answer, EncoderDiffers | UserError):
            raise answer
        if isinstance(answer, str):
            raise RuntimeError(f"a process that prepares the data failed:\n{answer}")
        return answer  # type: ignore[no-any-return]

    def _dead(self) -> UserError:
        code = self.process.wait()
        name = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        why = "; most often the machine is out of memory" if code == -signal.SIGKILL else ""
        return UserError(
            f"data.dataset_num_proc: a process that prepares the data died ({name}{why}); nothing was kept, start "
            "again, with a lower data.dataset_num_proc if it is for memory"
        )

    def end(self) -> None:
        for pipe in (self.tasks, self.answers):
            with suppress(OSError):
                pipe.close()
        self.process.kill()
        self.process.wait()
