"""`sft-dist sweep` checks all trials, runs those that are left, and says what they came to."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from launch import cli
from launch.processes import Ending
from launch.sweep import history
from launch.sweep.runner import why
from sft_dist.config import Recipe
from sft_dist.recipe import load_recipe
from sft_dist.runlock import RunLock
from tests.recipes import ROOT
from tests.sweeps import Trainings, finish, write_sweep


@pytest.fixture
def trainings(monkeypatch: pytest.MonkeyPatch) -> Trainings:
    return Trainings(monkeypatch)


def sweep(file: Path, *words: str) -> int:
    return cli.main(["sweep", str(file), *words])


def results(file: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads((file.parent / "sweep" / "results.json").read_text())["trials"]
    return found


def said(capsys: pytest.CaptureFixture[str]) -> str:
    both = capsys.readouterr()
    return both.out + both.err


def test_every_trial_is_a_run_of_its_own_that_can_be_repeated_alone(tmp_path: Path, trainings: Trainings) -> None:
    file = write_sweep(tmp_path, set={"train.max_steps": 30})
    assert sweep(file, "train.logging_steps=3") == 0
    assert trainings.names() == [f"trial-00{n}" for n in range(6)]
    recipe = load_recipe(tmp_path / "sweep" / "trial-003" / "recipe.yaml")
    assert (recipe.train.learning_rate, recipe.train.weight_decay) == (1e-4, 0.1)
    assert (recipe.train.max_steps, recipe.train.logging_steps) == (30, 3)
    # All would be called trial-003 in the trackers.
    assert recipe.train.run_name == "sweep/trial-003"
    assert not recipe.output.resume and not recipe.output.overwrite


def test_results_are_best_first_in_table_csv_and_json(
    tmp_path: Path, trainings: Trainings, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write_sweep(tmp_path)
    assert sweep(file) == 0
    out = said(capsys)
    table = [line.split() for line in out.splitlines() if line.lstrip("* ").startswith("trial-") and ":" not in line]
    assert table[0] == ["*", "trial-002", "0.0001", "0", "1.0000", "1,234", "7", "0", "s", "done"]
    assert [row[0] for row in table[1:]] == ["trial-000", "trial-003", "trial-001", "trial-004", "trial-005"]
    assert "6 trials: 6 done; * the best eval_loss (lower is better): 1.0000, trial-002, learning_rate 0.0001" in out
    assert [row["trial"] for row in results(file)] == ["trial-002", *(row[0] for row in table[1:])]
    with open(tmp_path / "sweep" / "results.csv", newline="") as held:
        rows = list(csv.DictReader(held))
    assert rows[0]["train.learning_rate"] == "0.0001" and float(rows[0]["eval_loss"]) == 1.0
    for name in ("results.json", "results.csv", "results.svg", "trials.jsonl", "sweep.json"):
        assert (tmp_path / "sweep" / name).stat().st_mode & 0o777 == 0o600


def test_a_failed_trial_stops_no_other_and_is_tried_again_only_on_demand(
    tmp_path: Path, trainings: Trainings, capsys: pytest.CaptureFixture[str]
) -> None:
    def behave(recipe: Recipe) -> Ending | None:
        if recipe.train.learning_rate < 1e-3 or recipe.train.weight_decay:
            return None
        log = Path(recipe.output.output_dir) / "logs" / "rank0.log"
        log.write_text("torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 20 GiB\n")
        return Ending(1, stopped=False)

    file = write_sweep(tmp_path)
    trainings.behave = behave
    assert sweep(file) == 1
    assert len(trainings.names()) == 6
    last = results(file)[-1]
    assert (last["trial"], last["state"], last["reason"]) == ("trial-004", "failed", "out of memory")
    out = said(capsys)
    assert "failed: out of memory" in out
    assert "\ntrial-004: torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 20 GiB\n" in out
    assert sweep(file) == 1
    assert trainings.names() == []
    assert "what failed is tried again with --retry-failed" in said(capsys)
    trainings.behave = lambda _: None
    assert sweep(file, "--retry-failed") == 0
    (again,) = trainings.seen
    assert again.output.resume and again.output.output_dir.endswith("trial-004")
    assert {row["state"] for row in results(file)} == {"done"}


def test_a_stopped_sweep_goes_on_with_the_trial_that_it_was_at(tmp_path: Path, trainings: Trainings) -> None:
    file = write_sweep(tmp_path)
    trainings.behave = lambda _: Ending(75, stopped=True) if len(trainings.seen) == 3 else None
    assert sweep(file) == 75
    assert trainings.names() == ["trial-000", "trial-001", "trial-002"]
    assert [row["state"] for row in results(file)] == ["done", "done", "unfinished", *["waiting"] * 3]
    trainings.behave = lambda _: None
    assert sweep(file) == 0
    assert [recipe.output.resume for recipe in trainings.seen] == [True, False, False, False]
    assert trainings.names() == ["trial-002", "trial-003", "trial-004", "trial-005"]


def test_a_killed_sweep_goes_on_as_a_stopped_one(tmp_path: Path, trainings: Trainings) -> None:
    """What `kill -9` leaves: a trial that was begun, and no word of its end."""

    class Killed(BaseException):
        pass

    def behave(_: Recipe) -> Ending | None:
        if len(trainings.seen) == 2:
            raise Killed
        return None

    file = write_sweep(tmp_path)
    trainings.behave = behave
    with pytest.raises(Killed):
        sweep(file)
    trainings.seen.clear()
    trainings.behave = lambda _: None
    assert sweep(file) == 0
    assert [recipe.output.resume for recipe in trainings.seen] == [True, *[False] * 4]
    assert trainings.names()[0] == "trial-001"


def test_ctrl_c_between_two_trials_is_a_stop(tmp_path: Path, trainings: Trainings) -> None:
    def behave(_: Recipe) -> Ending | None:
        raise KeyboardInterrupt

    trainings.behave = behave
    assert sweep(write_sweep(tmp_path)) == 75


def test_a_trial_that_can_go_on_is_left_for_the_next_call(tmp_path: Path, trainings: Trainings) -> None:
    """As after a hang: the others are run meanwhile."""
    file = write_sweep(tmp_path)
    trainings.behave = lambda _: Ending(75, stopped=False) if len(trainings.seen) == 1 else None
    assert sweep(file) == 75
    assert len(trainings.names()) == 6
    trainings.behave = lambda _: None
    assert sweep(file) == 0
    assert trainings.names() == ["trial-000"]


def test_a_changed_sweep_knows_its_trials_by_their_settings(
    tmp_path: Path, trainings: Trainings, capsys: pytest.CaptureFixture[str]
) -> None:
    assert sweep(write_sweep(tmp_path)) == 0
    trainings.names()
    # Another order, one value more and one less, one parameter more whose value was the default, another way to say it.
    changed = write_sweep(tmp_path, parameters={"train.adam_beta1": [0.9], "train.weight_decay": [0.1, 0.0],
                                                "train": {"learning_rate": [1e-3, 3e-4]}})  # fmt: skip
    assert sweep(changed) == 0
    assert trainings.names() == ["trial-006", "trial-007"]
    assert {row["trial"] for row in results(changed)} == {"trial-005", "trial-004", "trial-006", "trial-007"}
    assert "left alone, runs with other settings: trial-000, trial-001, trial-002, trial-003" in said(capsys)
    # What all trials have in common counts as well.
    assert sweep(changed, "train.max_steps=3") == 0
    assert trainings.names() == ["trial-008", "trial-009", "trial-010", "trial-011"]
    assert sweep(changed, "parallel.global_batch_size=16") == 0
    assert len(trainings.names()) == 4


def test_settings_that_change_no_number_may_be_varied_and_may_change(tmp_path: Path, trainings: Trainings) -> None:
    speeds = {"train.per_device_train_batch_size": [1, 2]}
    file = write_sweep(tmp_path, parameters=speeds, metric="tokens_per_second", set={"parallel.global_batch_size": 4})
    assert sweep(file) == 0
    assert trainings.names() == ["trial-000", "trial-001"]
    assert sweep(file, "train.logging_steps=2") == 0
    assert trainings.names() == []
    assert json.loads((tmp_path / "sweep" / "results.json").read_text())["greater_is_better"] is True


def test_two_trials_that_are_one_run_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = [f"{tmp_path}/train.jsonl", f"{tmp_path}//train.jsonl"]
    assert sweep(write_sweep(tmp_path, parameters={"data.dataset_name": names})) == 2
    assert f"parameters: two trials are the same run: dataset_name {names[0]}, and dataset_name" in said(capsys)


def test_foreign_folders_and_files_are_left_alone(
    tmp_path: Path, trainings: Trainings, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write_sweep(tmp_path, parameters={"train.seed": [1]})
    mine = tmp_path / "sweep" / "trial-000" / "thesis.tex"
    mine.parent.mkdir(parents=True)
    mine.write_text("x")
    assert sweep(file) == 0
    assert trainings.names() == ["trial-001"] and mine.read_text() == "x"
    other = write_sweep(tmp_path / "b", output_dir=str(tmp_path / "sweep" / "trial-001"))
    assert sweep(other) == 2
    assert "is the folder of a run; name one for the sweep" in said(capsys)
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "results.csv").write_text("mine")
    assert sweep(write_sweep(tmp_path / "b", output_dir=str(tmp_path / "c"))) == 2
    assert (tmp_path / "c" / "results.csv").read_text() == "mine"


def test_two_sweeps_in_one_folder_are_kept_apart(
    tmp_path: Path, trainings: Trainings, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write_sweep(tmp_path)
    with RunLock(tmp_path / "sweep", "sft-dist sweep"):
        assert sweep(file) == 2
        assert f"{file}:2: output_dir: {tmp_path}/sweep is in use by a run on" in said(capsys)
        assert sweep(file, "--report") == 0
    assert trainings.names() == []


def test_a_dry_run_checks_and_lists_and_writes_nothing(
    tmp_path: Path, trainings: Trainings, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write_sweep(tmp_path)
    for option in ("--dry-run", "--list"):
        assert sweep(file, option) == 0
        assert "6 trials: 6 waiting" in said(capsys)
    assert not (tmp_path / "sweep").exists() and trainings.names() == []


@pytest.mark.parametrize(
    ("keys", "line"),
    [
        ({"metric": "eval_los"}, "metric: eval_los is in no run's metrics.jsonl or summary.json, did you mean eval"),
        ({"set": {"eval.enabled": False}}, "metric: eval_loss is never measured; set eval.enabled=true or train.eval"),
        ({"set": {"data.test_split_size": 0}}, "metric: eval_loss is never measured, for nothing is held out; set"),
        ({"metric": "after_loss", "set": {"eval.enabled": False}}, "after_loss is never measured; set eval."),
        ({"parameters": {"train.learning_rate": [1e-5, -1]}}, "rate: must be above 0, got -1.0 (learning_rate -1)"),
        ({"parameters": {"peft.lora_r": [4, 8]}}, "parameters.peft.lora_r: has no effect while peft.use_peft is false"),
        ({"parameters": {"train.max_length": [64, 99999]}}, "sweep.yaml:4: parameters.train.max_length: 99999"),
    ],
)  # fmt: skip
def test_what_would_fail_later_is_told_before_anything_starts(
    tmp_path: Path, trainings: Trainings, capsys: pytest.CaptureFixture[str], keys: dict[str, Any], line: str
) -> None:
    assert sweep(write_sweep(tmp_path, **keys)) == 2
    out = said(capsys)
    assert line in out and len(out.splitlines()) == 1, out
    assert trainings.names() == [] and not (tmp_path / "sweep").exists()


def test_a_disk_that_holds_each_trial_but_not_all_is_told(
    tmp_path: Path, trainings: Trainings, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("launch.check.bytes_needed", lambda _: 10**15)
    monkeypatch.setattr("launch.check.findings", lambda _: [])
    assert sweep(write_sweep(tmp_path)) == 2
    assert "and 6 trials write about 6000000.0 GB; free some" in said(capsys)


def test_slurm_is_refused_in_one_line_so_far(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = write_sweep(tmp_path)
    for words in (["--cluster", "a100"], ["--nodes", "2"], ["--at-once", "2"]):
        assert sweep(file, *words) == 2
        assert said(capsys).startswith(f"sft-dist: {words[0]}: ")


@pytest.mark.parametrize(("which", "expected"), [("last", 2.5), ("best", 1.5)])
def test_the_final_or_the_best_held_out_loss_counts(
    tmp_path: Path, trainings: Trainings, which: str, expected: float
) -> None:
    trainings.behave = lambda recipe: finish(recipe, 2.5, logged=(3.0, 1.5, 2.0)) or Ending(0, stopped=False)
    file = write_sweep(tmp_path, parameters={"train.seed": [1]}, metric_value=which)
    assert sweep(file) == 0
    assert results(file)[0]["eval_loss"] == expected


def test_a_number_that_is_none_is_no_best(
    tmp_path: Path, trainings: Trainings, capsys: pytest.CaptureFixture[str]
) -> None:
    trainings.behave = lambda recipe: (
        finish(recipe, float("nan") if recipe.train.seed == 1 else 9.0) or Ending(0, stopped=False)
    )
    file = write_sweep(tmp_path, parameters={"train.seed": [1, 2]})
    assert sweep(file) == 0
    assert [(row["trial"], row["eval_loss"], row["reason"]) for row in results(file)] == [
        ("trial-001", 9.0, None), ("trial-000", None, "no eval_loss")]  # fmt: skip


def test_the_history_survives_a_torn_line(tmp_path: Path) -> None:
    history.note(tmp_path, "end", "trial-000", code=1, failed=True)
    with open(tmp_path / history.NAME, "a") as file:
        file.write('{"event": "end", "trial": "tri')
    history.note(tmp_path, "start", "trial-001")
    found = history.read(tmp_path)
    assert found["trial-000"][-1].failed and found["trial-001"][-1].event == "start" and len(found) == 2


@pytest.mark.parametrize(
    ("code", "log", "word"),
    [
        (1, "  File x\nValueError: bad things\n", "ValueError"),
        (1, "torch.OutOfMemoryError: CUDA out of memory", "out of memory"),
        (2, "sft-dist: guard.nonfinite: step 3: the loss is not finite; lower it", "not finite"),
        (2, "sft-dist: data.dataset_name: f.jsonl:3: broken", "data.dataset_name"),
        (2, "sft-dist: a/b.jsonl:6: broken JSON: Expecting ','; mend it", "bad data"),
        (137, "", "killed by SIGKILL"),
        (1, "OSError: [Errno 28] No space left on device", "disk full"),
        (3, "", "exit code 3"),
    ],
)
def test_why_a_trial_failed_is_a_word(code: int, log: str, word: str) -> None:
    assert why(code, log) == word


def test_a_sweep_imports_no_torch() -> None:
    names = [f"launch.sweep.{path.stem}" for path in sorted((ROOT / "launch" / "sweep").glob("*.py"))]
    code = "import importlib, sys; [importlib.import_module(n) for n in sys.argv[1:]]; print(*sys.modules)"
    words = [sys.executable, "-c", code, *names, "sft_dist.render.sweep_picture"]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True, timeout=60)
    assert not {"torch", "transformers", "trl", "deepspeed", "datasets", "numpy"} & set(done.stdout.split())
