"""How long it takes to check, write and queue a sweep on Slurm: `python -m tests.benchmarks.slurm_submit [TRIALS]`.

The trials go to a cluster on this machine and wait there for a time that never comes; nothing is trained. Printed are
the seconds of the whole command, and of the same command once more, which finds all of them queued.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import yaml

from slurm.dev_cluster import DevCluster
from tests.sweeps import write_sweep


def main(trials: int) -> None:
    """Raises :class:`subprocess.CalledProcessError` where a command fails."""
    rates = [1e-6 * (number + 1) for number in range(trials)]
    with tempfile.TemporaryDirectory() as name, DevCluster(nodes=2, gpus=2) as cluster:
        folder = Path(name)
        file = write_sweep(folder, parameters={"train.learning_rate": rates})
        profile = folder / "cluster.yaml"
        profile.write_text(yaml.safe_dump({"partition": "main", "gpus_per_node": 2, "time": "0:10:00",
                                           "sbatch": {"begin": "now+1hour"}}))  # fmt: skip
        command = [sys.executable, "-m", "launch.cli", "sweep", str(file), "--cluster", str(profile), "--at-once", "4"]
        environment = {**os.environ, **cluster.environment}
        for what in ("first", "again"):
            began = time.monotonic()
            done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
            if done.returncode:
                raise SystemExit(done.stderr)
            print(f"{what}: {time.monotonic() - began:.2f} s for {trials} trials")
        print(done.stdout)


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 64)
