"""How a process of the training plane starts and ends: quiet libraries, exit codes, no group left behind."""

from __future__ import annotations

import atexit
import errno
import logging
import os
import sys
import warnings
from collections.abc import Callable
from contextlib import suppress
from typing import NoReturn, TextIO

from sft_dist.errors import EXIT_DONE, EXIT_RESUMABLE, EXIT_USER, UserError
from sft_dist.stopping import Stopped


def guarded(work: Callable[[], None]) -> int:
    """Do a command's work and return its exit code; a fault of the user's is shown as one line on stderr.

    Anything else goes through, with its traceback: it is a bug.
    """
    quiet_libraries()
    # A run's files are its owner's.
    os.umask(0o077)
    try:
        work()
    except UserError as error:
        return user_fault(str(error))
    except Stopped as stop:
        print(f"sft-dist: {stop}", file=sys.stderr, flush=True)
        if not stop.agreed:
            # Others may be in a collective, for which the end of the interpreter would wait.
            sys.stdout.flush()
            os._exit(EXIT_RESUMABLE)
        leave_process_group()
        return EXIT_RESUMABLE
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        if disk_is_full(error):
            return user_fault(f"output.output_dir: no space left on the device ({error}); free some or name another")
        raise
    return EXIT_DONE


def user_fault(message: str) -> int:
    """Show what the user can mend, one line each, and return the exit code for it."""
    for line in message.splitlines():
        print(f"sft-dist: {line}", file=sys.stderr, flush=True)
    return EXIT_USER


def disk_is_full(error: BaseException) -> bool:
    """Whether an error, or one that led to it, is a full disk or an exceeded quota."""
    chain: BaseException | None = error
    while chain is not None:
        if getattr(chain, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "No space left on device" in str(chain):
            return True
        chain = chain.__cause__ or chain.__context__
    return False


def outlive_full_logs() -> None:
    """Lose what cannot be printed: a log often lies on the run's own disk, and must not end the run when that is full.

    Without it a line for people would, be it the one that says why a run stops and can go on.
    """
    sys.stdout, sys.stderr = _Lossy(sys.stdout), _Lossy(sys.stderr)


class _Lossy:
    """A stream of text whose lines are lost where they cannot be written."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        with suppress(OSError):
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with suppress(OSError):
            self._stream.flush()

    def __getattr__(self, name: str) -> object:
        return getattr(self._stream, name)


def quiet_libraries() -> None:
    """No telemetry from any library, and no chatter of theirs between a run's own lines."""
    os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
    os.environ["DO_NOT_TRACK"] = "1"
    os.environ["WANDB_ERROR_REPORTING"] = "false"
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    if not sys.stderr.isatty():
        # In a log a bar is a line of a thousand characters; transformers reads this one, too.
        os.environ.setdefault("TQDM_DISABLE", "1")
    # It looks for optional kernels at import and reports those it does not find.
    logging.getLogger("bitsandbytes").setLevel(logging.CRITICAL)
    # It warns of DeepSpeed's number of micro-batches, which is the recipe's.
    logging.getLogger("accelerate.accelerator").setLevel(logging.ERROR)
    # Names that transformers will rename one day: news for us, not for the user.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"(transformers|trl|accelerate|peft|torch)\..*")


def settle_accelerator() -> None:
    """Tell DeepSpeed that there is no GPU; it would otherwise guess, and warn in every process.

    On a processor it would also compile a shared-memory all-reduce, for inference, under a lock that stays for ever
    when the process that holds it is killed: every later start would wait for it.
    """
    import torch

    if torch.cuda.is_available():
        return
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    if os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true":
        import deepspeed.ops

        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def end_process(code: int) -> NoReturn:
    """End this process, when its work is done, without taking the interpreter down.

    Threads of torch, gloo's and autograd's, may have tensors or hooks to give back. The end of the interpreter stops a
    thread that wants it by force, which C++ answers with SIGABRT, and a run that was done would count as failed.
    """
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)


def leave_process_group() -> None:
    """Destroy the process group: a process that exits with one dies of SIGABRT now and then."""
    import torch.distributed

    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
