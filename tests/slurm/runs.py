"""Runs on the cluster of the tests: submitted by the command, watched through Slurm and the run's own files."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import yaml

from launch.slurm.records import End, SlurmDir, Start, read_attempts, read_submission
from slurm.dev_cluster import DevCluster
from tests.recipes import environment, records

LIMIT = 180.0


class ClusterRun:
    """A run in `folder/NAME`, on a cluster."""

    def __init__(self, cluster: DevCluster, folder: Path, name: str = "run", **profile: object) -> None:
        self.cluster = cluster
        self.folder = folder
        self.root = folder / name
        self.at = SlurmDir(self.root)
        self.profile = folder / f"{name}-cluster.yaml"
        self.profile.write_text(yaml.safe_dump({"partition": "main", "gpus_per_node": 1, "time": "0:10:00"} | profile))

    def command(self, *words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "launch.cli", *words],
            cwd=self.folder,
            env={**environment(self.folder), **self.cluster.environment, "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=LIMIT,
            check=False,
        )

    def submit(self, *words: str, nodes: int = 2) -> subprocess.CompletedProcess[str]:
        return self.command(
            "submit", str(self.folder / "recipe.yaml"), "--cluster", str(self.profile), "--nodes", str(nodes),
            f"output.output_dir={self.root}", *words,
        )  # fmt: skip

    @property
    def job(self) -> str:
        submission = read_submission(self.at)
        assert submission is not None and submission.job_id is not None
        return submission.job_id

    def until(self, condition: Callable[[], bool]) -> None:
        """Wait for something, letting a job that was requeued start without the wait that Slurm puts before it."""
        end = time.monotonic() + LIMIT
        while not condition():
            job = self.cluster.job(self.job)
            assert time.monotonic() < end and job["JobState"] not in ("FAILED", "COMPLETED"), (job, self.said())
            if job.get("Reason") == "BeginTime":
                self.cluster.begin_now(self.job)
            time.sleep(0.05)

    def steps(self) -> int:
        return len(records(self.root)) if (self.root / "metrics.jsonl").exists() else 0

    def has_done(self, steps: int) -> Callable[[], bool]:
        return lambda: self.steps() >= steps

    def starts(self) -> list[Start]:
        return [one for one in read_attempts(self.at) if isinstance(one, Start)]

    def ends(self) -> list[End]:
        return [one for one in read_attempts(self.at) if isinstance(one, End)]

    def has_started(self, times: int) -> Callable[[], bool]:
        return lambda: len(self.starts()) >= times

    def is_done(self) -> bool:
        return any(one.verdict == "done" for one in self.ends())

    def workers(self) -> dict[int, int]:
        """The processes that train, by rank; one that trains alone is told of none."""
        found = {}
        for folder in Path("/proc").iterdir():
            if folder.name.isdigit():
                try:
                    words = (folder / "cmdline").read_bytes().split(b"\0")
                    if b"sft_dist" in words and str(self.root / "recipe.yaml").encode() in words:
                        found[int(self.environment(int(folder.name)).get("RANK", 0))] = int(folder.name)
                except OSError:
                    continue
        return found

    @staticmethod
    def environment(pid: int) -> dict[str, str]:
        words = Path(f"/proc/{pid}/environ").read_bytes().decode().split("\0")
        return dict(word.split("=", 1) for word in words if "=" in word)

    def said(self) -> str:
        """The last lines of the job and of its ranks."""
        files = [*self.at.folder.glob("*.out"), *(self.root / "logs").glob("*.log")]
        return "\n".join(f"--- {file.name}\n{file.read_text()[-1500:]}" for file in sorted(files))
