"""A sweep on a real Slurm: one array, whose jobs each leave the run that a trial is."""

from __future__ import annotations

import json
from pathlib import Path

import yaml

from launch.slurm.records import SlurmDir, read_attempts, read_submission
from slurm.dev_cluster import DevCluster
from tests import tiny
from tests.recipes import small_recipe
from tests.slurm.several import command, logs, until, write_profile

WORDS = ("train.max_steps=3", "train.report_to=none", "train.save_strategy=no", "eval.enabled=false",
         "metric=train_loss")  # fmt: skip


def test_trials_are_one_array_that_is_left_alone_while_it_is_queued(cluster: DevCluster, tmp_path: Path) -> None:
    small_recipe(tmp_path, tiny.save_model(tmp_path / "model"))
    profile = write_profile(tmp_path)
    held = {"recipe": "recipe.yaml", "output_dir": "sweep", "parameters": {"train.learning_rate": [1e-4, 1e-3]}}
    (tmp_path / "s.yaml").write_text(yaml.safe_dump(held))
    words = ("sweep", "s.yaml", *WORDS, "--cluster", str(profile), "--at-once", "1")
    began = command(cluster, tmp_path, *words)
    assert began.returncode == 0, began.stderr
    trials = [tmp_path / "sweep" / name for name in ("trial-000", "trial-001")]
    submissions = [read_submission(SlurmDir(trial)) for trial in trials]
    numbers = [submission.job_id or "" for submission in submissions if submission]
    array = numbers[0].partition("_")[0]
    assert numbers == [f"{array}_0", f"{array}_1"] and f"2 trials queued as job {array}" in began.stdout
    again = command(cluster, tmp_path, *words)
    assert again.returncode == 0 and "0 to run" in again.stdout, again.stdout + again.stderr
    assert [read_submission(SlurmDir(trial)) for trial in trials] == submissions
    until(lambda: all((trial / "summary.json").exists() for trial in trials), lambda: logs(tmp_path / "sweep"))
    until(lambda: all(len(read_attempts(SlurmDir(trial))) == 2 for trial in trials), lambda: logs(tmp_path / "sweep"))
    attempts = [read_attempts(SlurmDir(trial)) for trial in trials]
    assert [[one.job for one in each] for each in attempts] == [[number] * 2 for number in numbers]
    first, second = sorted(attempts, key=lambda each: each[0].at)
    assert first[1].at < second[0].at, "two ran at once"
    report = command(cluster, tmp_path, "sweep", "s.yaml", *WORDS, "--report")
    assert report.returncode == 0 and "2 done" in report.stdout, report.stdout + report.stderr
    results = json.loads((tmp_path / "sweep" / "results.json").read_text())["trials"]
    assert len({trial["train_loss"] for trial in results}) == 2 and None not in {t["train_loss"] for t in results}
    assert "WANDB_RUN_GROUP=sweep" in (trials[1] / "slurm" / "job.sh").read_text()


def test_what_no_node_can_run_is_told_before_anything_is_written(cluster: DevCluster, tmp_path: Path) -> None:
    small_recipe(tmp_path, tiny.save_model(tmp_path / "model"))
    held = {"recipe": "recipe.yaml", "output_dir": "sweep", "parameters": {"train.learning_rate": [1e-4, 1e-3]}}
    (tmp_path / "s.yaml").write_text(yaml.safe_dump(held))
    profile = write_profile(tmp_path, gpus_per_node=3)
    for more, line in (((), "cluster.yaml: Slurm says"), (("--nodes", "9"), "--nodes: 9 is more than the 4")):
        refused = command(cluster, tmp_path, "sweep", "s.yaml", *WORDS, "--cluster", str(profile), *more)
        assert refused.returncode == 2 and line in refused.stderr, refused.stdout + refused.stderr
        assert (
            "Traceback" not in refused.stderr and refused.stderr.count(line) == 1 and not (tmp_path / "sweep").exists()
        )
