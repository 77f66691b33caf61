"""Pipelines on a real Slurm: a job for each stage, behind those that it needs, with the numbers of this machine."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from launch.slurm.records import SlurmDir, read_attempts
from slurm.dev_cluster import DevCluster
from tests import tiny
from tests.outcome import numbers, weights_hash
from tests.recipes import environment, small_recipe
from tests.slurm.runs import ClusterRun
from tests.slurm.several import command, logs, until, write_profile

# The first trains an adapter, which has to be merged before the second can take its model.
CHAIN = """\
output_dir: out
stages:
  first:
    recipe: recipe.yaml
    set: {train.max_steps: 4, peft.use_peft: true, peft.lora_r: 4, peft.lora_target_modules: [q_proj, v_proj]}
  second:
    recipe: recipe.yaml
    model: ${stages.first.output}
    set: {train.max_steps: 160, train.save_strategy: steps, train.save_steps: 20}
  measure: {kind: eval, model: "${stages.second.output}"}
"""
BROKEN = """\
output_dir: out
stages:
  broken: {recipe: recipe.yaml, set: {data.dataset_name: gone.jsonl, train.max_steps: 1}}
  behind: {recipe: recipe.yaml, model: "${stages.broken.output}"}
  last: {kind: eval, model: "${stages.behind.output}"}
  alone: {recipe: recipe.yaml, set: {train.max_steps: 1}}
"""
COMMON = ("eval.enabled=false", "train.report_to=none", "train.full_determinism=true", "parallel.processes=1",
          "data.dataset_num_proc=1")  # fmt: skip


def words(*stages: str) -> list[str]:
    return [f"{stage}.{word}" for stage in stages for word in COMMON]


@contextlib.contextmanager
def started_here(folder: Path) -> Iterator[subprocess.Popen[bytes]]:
    """The pipeline on this machine, beside that on the cluster; a test that fails leaves nothing of it."""
    process = subprocess.Popen(
        [sys.executable, "-m", "launch.cli", "pipeline", "p.yaml", "output_dir=local", *words("first", "second")],
        cwd=folder,
        env=environment(folder) | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
    )
    try:
        yield process
    finally:
        process.terminate()
        process.wait(30)


def test_a_chain_with_a_rank_that_dies_has_the_weights_of_one_on_this_machine(
    cluster: DevCluster, tmp_path: Path
) -> None:
    small_recipe(tmp_path, tiny.save_model(tmp_path / "model"))
    (tmp_path / "p.yaml").write_text(CHAIN)
    with started_here(tmp_path) as local:
        _submit_and_kill(cluster, tmp_path)
        assert local.wait(120) == 0
    for stage in ("first", "second"):
        assert numbers(tmp_path / "out" / stage) == numbers(tmp_path / "local" / stage), stage
    assert weights_hash(tmp_path / "out" / "second") == weights_hash(tmp_path / "local" / "second")
    shown = command(cluster, tmp_path, "pipeline", "out", "--status").stdout
    assert shown.count("✔ done") == 3, shown


def _submit_and_kill(cluster: DevCluster, tmp_path: Path) -> None:
    """Queue the pipeline, kill the rank that trains the second stage, and wait for the end."""
    started = ("pipeline", "p.yaml", *words("first", "second"), "--cluster", str(write_profile(tmp_path)))
    queued = command(cluster, tmp_path, *started)
    assert queued.returncode == 0, queued.stderr
    jobs = re.findall(r"(\w+): queued as job (\d+)(?: behind (\d+))?", queued.stdout)
    ids = {stage: number for stage, number, _ in jobs}
    assert [(stage, behind) for stage, _, behind in jobs] == [
        ("first", ""), ("second", ids["first"]), ("measure", ids["second"])]  # fmt: skip
    again = command(cluster, tmp_path, *started)
    assert again.returncode == 0 and "queued as" not in again.stdout, again.stdout + again.stderr
    shown = command(cluster, tmp_path, "pipeline", "out", "--status").stdout
    assert f"job {ids['measure']} (Dependency)" in shown, shown
    run = ClusterRun(cluster, tmp_path, "out/second")

    def said() -> str:
        return logs(tmp_path / "out")

    until(lambda: bool(list(run.root.glob("checkpoints/checkpoint-*[0-9]"))), said)
    os.kill(run.workers()[0], signal.SIGKILL)
    until((tmp_path / "out" / "measure" / "measure.json").exists, said)
    for number in ids.values():
        cluster.wait_for(number, "COMPLETED")
    killed, done = run.ends()
    assert (killed.verdict, killed.rank, done.verdict) == ("again", 0, "done")
    assert run.starts()[1].step >= 20 and run.starts()[1].nodes == run.starts()[0].nodes


def test_a_stage_that_fails_takes_along_what_needs_it_and_nothing_else(cluster: DevCluster, tmp_path: Path) -> None:
    small_recipe(tmp_path, tiny.save_model(tmp_path / "model"))
    (tmp_path / "p.yaml").write_text(BROKEN)
    given = tmp_path / "gone.jsonl"
    given.write_bytes((tmp_path / "train.jsonl").read_bytes())
    profile = write_profile(tmp_path, sbatch={"begin": "now+1hour"})
    started = ("pipeline", "p.yaml", *words("broken", "behind", "alone"), "--cluster", str(profile))
    queued = command(cluster, tmp_path, *started)
    assert queued.returncode == 0, queued.stderr
    ids = dict(re.findall(r"(\w+): queued as job (\d+)", queued.stdout))
    given.unlink()
    for number in ids.values():
        cluster.begin_now(number)
    cluster.wait_for(ids["broken"], "FAILED", 100)
    cluster.wait_for(ids["behind"], "CANCELLED")
    cluster.wait_for(ids["last"], "CANCELLED")
    cluster.wait_for(ids["alone"], "COMPLETED", 100)
    end = read_attempts(SlurmDir(tmp_path / "out" / "broken"))[-1]
    assert end.event == "end" and end.verdict == "stop" and "gone.jsonl" in end.reason
    shown = command(cluster, tmp_path, "pipeline", "out", "--status").stdout
    states = dict(re.findall(r"(broken|behind|last|alone) +\w+ +\S (\w+)", shown))
    assert states == {"broken": "failed", "behind": "skipped", "last": "skipped", "alone": "done"}, shown

    given.write_bytes((tmp_path / "train.jsonl").read_bytes())
    again = command(cluster, tmp_path, *started)
    assert again.returncode == 0, again.stderr
    ids = dict(re.findall(r"(\w+): queued as job (\d+)", again.stdout))
    assert list(ids) == ["broken", "behind", "last"] and not list((tmp_path / "out").glob("*.old-*"))
    here = command(cluster, tmp_path, *started[:-2])
    assert here.returncode == 2 and f"stage broken: job {ids['broken']} is pending; wait for it" in here.stderr
    other = command(cluster, tmp_path, *started, "broken.train.seed=7")
    assert other.returncode == 2 and "of another recipe: train.seed" in other.stderr, other.stderr
    cluster.run(["scancel", *ids.values()])
