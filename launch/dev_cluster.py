"""`sft-dist dev-cluster`: a Slurm of several nodes on this machine, for trying things out: up, down, status."""

from __future__ import annotations

import contextlib
import os
import stat
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from sft_dist.errors import EXIT_DONE, EXIT_USER, UserError


def up(nodes: int, gpus: int, cpus: int | None, folder: str | None, foreground: bool) -> int:
    """Start a cluster; what a shell has to know goes to stdout, the rest to stderr.

    It is up until `down`, or in the foreground for as long as this process lives. Raises :class:`UserError`.
    """
    from slurm.dev_cluster import DevCluster, programs

    programs.find()
    register = _register()
    alive = _alive(_known(register))
    at = Path(folder).resolve() if folder else register.parent / "cluster"
    if at in alive or (alive and folder is None):
        there = at if at in alive else alive[-1]
        raise UserError(f"{there}: a dev-cluster is up there already; `sft-dist dev-cluster down` ends it")
    began = time.monotonic()
    cluster = DevCluster(nodes, gpus, cpus, at)
    cluster.start()
    try:
        _remember(register, [*alive, at])
        _say(f"{cluster.shape} up in {time.monotonic() - began:.1f} s, in {at}")
        _say("partitions: main, urgent (its jobs preempt the others), graceful (30 s of grace), short (1 minute)")
        _say(f"submit to it by `--cluster {cluster.profile}`")
        _say("Ctrl-C ends it" if foreground else f"`sft-dist dev-cluster down --folder {at}` ends it")
        print(f"export SLURM_CONF={cluster.environment['SLURM_CONF']}", flush=True)
        if foreground:
            with contextlib.suppress(KeyboardInterrupt):
                cluster.wait()
        else:
            cluster.keep()
    finally:
        # A cluster that is kept is no longer this one's to stop.
        cluster.stop()
    return EXIT_DONE


def down(folder: str | None) -> int:
    """End a cluster and everything that runs in it; 0 as well where there is none."""
    from slurm.dev_cluster.control import end

    known = [Path(folder).resolve()] if folder else _known(_register())
    alive = _one_of(_alive(known))
    ended = [at for at in ([alive] if alive else known) if end(at)]
    for at in ended:
        _say(f"{at}: ended, with all that ran in it")
    if not ended:
        _say(_nothing(folder))
    return EXIT_DONE


def status(folder: str | None) -> int:
    """Show which daemons are alive and what the nodes do; exit code 2 where there is no cluster."""
    from launch.slurm.commands import ask
    from slurm.dev_cluster.control import daemons

    at = _one_of(_alive([Path(folder).resolve()] if folder else _known(_register())))
    if at is None:
        _say(_nothing(folder))
        return EXIT_USER
    found = daemons(at)
    dead = [name for name, pid in found.items() if pid is None]
    print(f"{at}: {len(found) - len(dead)} of {len(found)} daemons alive{', dead: ' if dead else ''}{' '.join(dead)}")
    print(f"export SLURM_CONF={at / 'slurm.conf'}")
    if "slurmctld" not in dead:
        conf = {"SLURM_CONF": str(at / "slurm.conf")}
        nodes = "--format=%.6N %.12T %.13C %.8G %E"
        jobs = "--format=%.8i %.9P %.20j %.10T %.10M %.6D %R"
        print("\n" + ask(["sinfo", "--Node", "--partition=main", nodes], environment=conf).rstrip())
        print("\n" + ask(["squeue", jobs], environment=conf).rstrip())
    return EXIT_DONE


def _register() -> Path:
    """The file that remembers where this user's clusters are. Raises :class:`UserError` if it is another's."""
    home = Path(tempfile.gettempdir()) / f"sft-dist-dev-cluster-{os.getuid()}"
    try:
        home.mkdir(mode=0o700, exist_ok=True)
        found = home.lstat()
    except OSError as error:
        raise UserError(f"{home}: {error.strerror}; set TMPDIR to a folder of your own") from error
    # The name can be guessed by other users of the machine.
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or stat.S_IMODE(found.st_mode) & 0o077:
        raise UserError(f"{home}: is not a private folder of yours; remove it or set TMPDIR to a folder of your own")
    return home.resolve() / "known"


def _known(register: Path) -> list[Path]:
    """Folders of clusters that were started by hand, the last one last."""
    with contextlib.suppress(OSError):
        return [Path(line) for line in register.read_text().splitlines() if line]
    return []


def _remember(register: Path, folders: Sequence[Path]) -> None:
    from sft_dist.rundir import write_text

    write_text(register, "".join(f"{folder}\n" for folder in folders))


def _alive(folders: Sequence[Path]) -> list[Path]:
    from slurm.dev_cluster.control import holder

    return [folder for folder in folders if holder(folder) is not None]


def _one_of(alive: Sequence[Path]) -> Path | None:
    if len(alive) > 1:
        raise UserError(f"--folder: several dev-clusters are up; name one of {', '.join(map(str, alive))}")
    return alive[0] if alive else None


def _nothing(folder: str | None) -> str:
    return f"no dev-cluster is up{f' in {folder}' if folder else ''}; `sft-dist dev-cluster up` starts one"


def _say(line: str) -> None:
    print(f"sft-dist: {line}", file=sys.stderr, flush=True)
