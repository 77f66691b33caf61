"""A small disk of its own for a run, which can be filled and made read-only while the run writes to it."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

_MARK = "SFT_DIST_CHAOS_MOUNTS"
_CHUNKS = (1 << 20, 1 << 12, 1)


def with_mounts_of_our_own(words: Sequence[str]) -> None:
    """Start this program again where mounting is allowed and nobody else sees it. Returns there."""
    if os.environ.get(_MARK) == str(os.getpid()):
        return
    os.environ[_MARK] = str(os.getpid())
    # Both exec, and so the process number stays.
    os.execvp("unshare", ["unshare", "--mount", "--map-root-user", sys.executable, *words])


class Disk:
    """The run's folder `run` on a disk of so many megabytes.

    Its checkpoints are mounted once more over themselves: a mount is not made read-only while a file of it is open
    to be written, as the ranks' logs are.
    """

    def __init__(self, run: Path, megabytes: int = 48) -> None:
        self.run = run
        self._filler = run / "filler"
        self.checkpoints = run / "checkpoints"
        run.mkdir(parents=True)
        _mount("-t", "tmpfs", "-o", f"size={megabytes}m,mode=700", "disk", str(run))
        self.checkpoints.mkdir(mode=0o700)
        _mount("--bind", str(self.checkpoints), str(self.checkpoints))

    def fill(self) -> None:
        """Take what is free now."""
        with open(self._filler, "ab", buffering=0) as file:
            for size in _CHUNKS:
                try:
                    while True:
                        file.write(bytes(size))
                except OSError as error:
                    if error.errno != errno.ENOSPC:
                        raise

    def free(self) -> None:
        """Give it back."""
        self._filler.unlink()

    def protect(self, seconds: float = 20.0) -> bool:
        """Make the checkpoints read-only, between two writes to them; False where there is no such moment."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if not _tried("-o", "remount,bind,ro", str(self.checkpoints)):
                return True
            time.sleep(0.005)
        return False

    def release(self) -> None:
        """Make them writable again."""
        _mount("-o", "remount,bind,rw", str(self.checkpoints))

    def keep(self, folder: Path) -> None:
        """Copy everything to a folder that outlives the disk."""
        shutil.copytree(self.run, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns("filler"))

    def remove(self) -> None:
        """Unmount it, with whatever is there."""
        for folder in (self.checkpoints, self.run):
            subprocess.run(["umount", "--lazy", str(folder)], check=True)


def _tried(*words: str) -> str:
    """What `mount` complains of, or nothing."""
    return subprocess.run(["mount", *words], capture_output=True, text=True, check=False).stderr


def _mount(*words: str) -> None:
    subprocess.run(["mount", *words], check=True)
