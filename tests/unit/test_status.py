"""What `sft-dist status` says of a run, by its files and by Slurm, each of which may be away."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from launch import cli
from launch.slurm import queue, reasons, registry
from launch.status import looking
from launch.status.progress import progress
from tests.recipes import ROOT
from tests.slurm_runs import NOON, SlurmRun, fake_command, iso, traceback

INVALID = "echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1"
NO_ANSWER = "echo 'slurm_load_jobs error: Unable to contact slurm controller (connect failure)' >&2; exit 1"
NOW = NOON + 3600


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An afternoon, a user without runs, and a Slurm that knows nothing."""
    monkeypatch.setenv("TZ", "UTC")
    time.tzset()
    monkeypatch.setattr(time, "time", lambda: NOW)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.setattr("launch.status.rendering.datetime", _Clock)
    for name in ("squeue", "sacct"):
        slurm(tmp_path, monkeypatch, name, "exit 0" if name == "squeue" else INVALID)
    slurm(tmp_path, monkeypatch, "scontrol", INVALID)


class _Clock(datetime):
    @classmethod
    def now(cls, tz: Any = None) -> datetime:
        return datetime.fromtimestamp(NOW, tz)


@pytest.fixture
def run(tmp_path: Path) -> SlurmRun:
    return SlurmRun(tmp_path / "run")


def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, script: str) -> None:
    fake_command(tmp_path / "bin", monkeypatch, name, script)


def shown_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, **held: str) -> None:
    """`scontrol --oneliner show job` of Slurm 22.05, as far as it matters."""
    known = {"JobId": "123", "JobName": "opt a=b", "Restarts": "0", "Comment": "/a run", "Partition": "gpu"} | held
    line = " ".join(f"{name}={value}" for name, value in known.items())
    slurm(tmp_path, monkeypatch, "scontrol", f"echo '{line}'")


def said(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, str]:
    """What is printed of a run, by the name of each fact; the other lines under their first word."""
    assert cli.main(["status", *words]) == 0
    facts: dict[str, str] = {}
    name = ""
    for line in filter(None, capsys.readouterr().out.splitlines()[1:]):
        head, _, value = line.partition("  ")
        if not head.strip():
            facts[name] += " " + line.strip()
        else:
            name = head if value else line.split()[0]
            facts[name] = value.strip() or line
    return facts


def trained(run: SlurmRun, steps: int, first: float = 0, seconds: float = 2.0, **more: float) -> None:
    run.metrics(
        [
            {"step": n, "loss": 3 - n / 1000, "epoch": n / 500, "tokens_per_second": 12345.6, "max_steps": 1000}
            | {"time": NOON + first + n * seconds}
            | more
            for n in range(1, steps + 1)
        ]
    )


# The state


def test_a_job_that_waits_says_why_and_until_when(
    run: SlurmRun, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    shown_job(tmp_path, monkeypatch, JobState="PENDING", Reason="Resources", SubmitTime="2026-11-25T16:59:00",
              StartTime="2026-11-25T19:30:00", NodeList="(null)")  # fmt: skip
    slurm(tmp_path, monkeypatch, "squeue", "echo 2026-11-25T19:30:00")
    assert said(capsys, str(run.root)) == {
        "state": "queued since 16:59: it is next, and its nodes are not free yet (Resources)",
        "begins": "expected 19:30",
        "job": "123, opt, 2 x 2 processes, ddp, partition gpu",
    }


def test_a_job_that_runs_says_where_since_when_and_to_when(
    run: SlurmRun, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    shown_job(tmp_path, monkeypatch, JobState="RUNNING", Reason="None", NodeList="n[0-1]", Restarts="1",
              StartTime="2026-11-25T17:10:00", EndTime="2026-11-25T18:10:00")  # fmt: skip
    run.start(0)
    run.end(300, "requeue", "time limit", code=75, step=100)
    run.start(600, restart=1, step=100)
    trained(run, 400, first=3590 - 800)
    assert said(capsys, str(run.root)) == {
        "state": "running on n[0-1] since 17:10 (50 min)",
        "job": "123, opt, 2 x 2 processes, ddp, partition gpu",
        "requeued": "1 of at most 5 times",
        "time limit": "18:10, in 10 min: the training will not be done by then, and goes on in a further job",
        "step": "400 of 1,000 (40%)  ━━━━━━━━┄┄┄┄┄┄┄┄┄┄┄┄",
        "epoch": "0.80",
        "loss": "2.6000",
        "tokens/s": "12,346, 2 s a step",
        "ends": "18:20, in 20 min of training",
        "restart": "17:05  step 100: time limit",
    }


def test_a_job_that_was_put_back_rests(
    run: SlurmRun, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    shown_job(tmp_path, monkeypatch, JobState="PENDING", Reason="BeginTime", Restarts="2")
    facts = said(capsys, str(run.root))
    assert facts["state"] == "queued: it was put back, and begins again after a rest (BeginTime)"
    assert facts["requeued"] == "2 of at most 5 times"


def test_a_run_that_is_done(run: SlurmRun, capsys: pytest.CaptureFixture[str]) -> None:
    run.start(0)
    run.end(1800, "done", "done", code=0, step=1000)
    trained(run, 1000)
    facts = said(capsys, str(run.root))
    assert facts["state"] == "done at 17:30"
    assert facts["step"] == "1,000 of 1,000 (100%)  ━━━━━━━━━━━━━━━━━━━━"
    assert "ends" not in facts


def test_a_run_that_failed_says_whose_fault_it_was(run: SlurmRun, capsys: pytest.CaptureFixture[str]) -> None:
    run.start(0)
    run.log(3, *((60 + n * 1e-4, line) for n, line in enumerate(traceback("ValueError: [red]no[/red] \x1b[2J"))))
    run.rank(3, 1, 61)
    run.end(70, "stop", "rank 3 ended with exit code 1 at step 5 three times", step=5)
    facts = said(capsys, str(run.root))
    assert facts["state"] == "failed at 17:01: rank 3 ended with exit code 1 at step 5 three times"
    assert facts["first error"] == "rank 3 on n1, 17:01: ended with exit code 1 ValueError: [red]no[/red]"
    assert facts["`sft-dist"] == f"`sft-dist logs {run.root}` shows more"


@pytest.mark.parametrize(
    ("held", "state"),
    [
        ({"JobState": "NODE_FAIL"}, "failed at 17:50: its job was lost with a node"),
        ({"JobState": "TIMEOUT"}, "failed at 17:50: its job was killed at its time limit"),
        ({"JobState": "CANCELLED"}, "cancelled at 17:50: by scancel or an administrator"),
    ],
)
def test_a_job_that_slurm_ended_without_a_word_of_the_run(
    run: SlurmRun, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
    held: dict[str, str], state: str,
) -> None:  # fmt: skip
    shown_job(tmp_path, monkeypatch, EndTime="2026-11-25T17:50:00", **held)
    run.start(0)
    assert said(capsys, str(run.root))["state"] == state


def test_accounting_is_asked_about_a_job_that_slurm_has_forgotten(
    run: SlurmRun, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run.start(0)
    gone = "gone: its job has left no word of its end, and Slurm has forgotten it"
    assert said(capsys, str(run.root))["state"] == gone
    slurm(tmp_path, monkeypatch, "sacct", "echo 'CANCELLED by 1000'")
    assert said(capsys, str(run.root))["state"] == "cancelled: by scancel or an administrator"


def test_a_cancelled_run_is_no_failure(run: SlurmRun, capsys: pytest.CaptureFixture[str]) -> None:
    run.start(0)
    run.at.cancelled.touch()
    assert said(capsys, str(run.root))["state"] == "cancelled"
    run.end(60, "stop", "cancelled", code=75, step=7)
    assert said(capsys, str(run.root))["state"] == "cancelled at 17:01"


def test_a_run_that_stopped_can_go_on_and_one_that_was_to_be_put_back_is_missed(
    run: SlurmRun, capsys: pytest.CaptureFixture[str]
) -> None:
    run.start(0)
    run.end(60, "requeue", "time limit", code=75, step=7)
    assert said(capsys, str(run.root))["state"] == (
        "stopped at 17:01: time limit; it was to begin again, but its job is gone"
    )
    run.start(70, restart=1)
    run.end(80, "stop", "no requeue is left", restart=1, code=75, step=9)
    assert said(capsys, str(run.root))["state"] == "stopped at 17:01: no requeue is left"


def test_attempts_of_an_earlier_job_are_history(run: SlurmRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run.start(0)
    run.end(60, "stop", "out of requeues", code=75, step=7)
    again = SlurmRun(run.root, "200")
    shown_job(tmp_path, monkeypatch, JobState="PENDING", Reason="Priority")
    assert looking.look(run.root).state.kind == "queued"
    again.start(120)
    again.start(180, restart=1, step=9)
    status = looking.to_json(looking.look(run.root))
    assert [(each["step"], each["reason"][:19]) for each in status["restarts"]] == [
        (7, "out of requeues"), (9, "killed without a wo"),
    ]  # fmt: skip
    assert status["requeues"] == 1


@pytest.mark.parametrize("script", [NO_ANSWER, "exec sleep 60", "exit 1"])
def test_without_slurms_answer_the_files_tell(
    run: SlurmRun, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, script: str
) -> None:
    monkeypatch.setattr(queue, "_SECONDS", 0.2)
    for name in ("scontrol", "squeue"):
        slurm(tmp_path, monkeypatch, name, script)
    facts = said(capsys, str(run.root))
    assert facts["state"] == "queued since 16:59: as its files have it"
    assert facts["Slurm"].startswith("Slurm could not be asked, so this is what the files tell: scontrol: ")
    run.start(0)
    trained(run, 10)
    facts = said(capsys, str(run.root))
    assert facts["state"] == "running on n0, n1 since 17:00 (1 h 0 min): as its files have it"
    assert facts["step"].startswith("10 of 1,000 (1%)")


def test_where_there_is_no_slurm_at_all(
    run: SlurmRun, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))
    run.start(0)
    run.end(60, "done", "done", code=0, step=7)
    assert said(capsys, str(run.root))["state"] == "done at 17:01"
    registry.add(run.root)
    assert cli.main(["status"]) == 0
    assert "there is no Slurm here" in capsys.readouterr().out


def test_files_that_make_no_sense_are_passed_over(run: SlurmRun, capsys: pytest.CaptureFixture[str]) -> None:
    run.at.attempts.write_text(
        '{"event": "start", "at": "never", "job": "123", "restart": 0, "nodes": [], "step": 0}\n{"ev'
    )
    (run.root / "metrics.jsonl").write_text('{"step": 3, "loss": "x", "epoch": null}\nnull\n[1]\n{"step"')
    (run.root / "recipe.yaml").write_text("]")
    (run.root / "checkpoints").write_text("a file")
    assert said(capsys, str(run.root))["state"].startswith("gone")
    run.start(5)
    run.at.attempts.write_text(run.at.attempts.read_text().replace(iso(5), "never"))
    assert said(capsys, str(run.root))["restart"].startswith("?  step 0: killed without a word")
    run.at.submission.write_text("{")
    assert said(capsys, str(run.root))["state"] == "stopped"


def test_as_json_it_can_be_read_by_strict_readers(run: SlurmRun, capsys: pytest.CaptureFixture[str]) -> None:
    run.start(0)
    run.rank(1, -9, 50)
    run.end(60, "stop", "rank 1", step=5)
    run.metrics([{"step": 5, "loss": float("nan"), "max_steps": 10, "epoch": 1.0}])
    assert cli.main(["status", str(run.root), "--json"]) == 0
    held = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
    assert (held["run"], held["state"]["kind"], held["progress"]["loss"]) == (str(run.root), "failed", None)
    assert (held["progress"]["step"], held["progress"]["steps"]) == (5, 10)
    assert (held["first_error"]["rank"], held["first_error"]["node"], held["first_error"]["code"]) == (1, "n0", -9)
    assert held["submission"]["job_id"] == "123"


def test_a_local_run_has_a_status(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = tmp_path / "local"
    root.mkdir()
    (root / "metrics.jsonl").write_text('{"step": 2, "loss": 1.5, "epoch": 1.0, "max_steps": 4}\n')
    assert said(capsys, str(root)) == {
        "state": "stopped", "step": "2 of 4 (50%)  ━━━━━━━━━━┄┄┄┄┄┄┄┄┄┄", "epoch": "1.00", "loss": "1.5000",
    }  # fmt: skip
    (root / "summary.json").write_text("{}")
    assert said(capsys, str(root))["state"] == "done"


# How far it is


def test_the_time_of_a_step_counts_no_time_between_attempts(run: SlurmRun) -> None:
    times = [0, 10, 20, 5000, 5010, 5030]
    run.metrics([{"step": n + 1, "loss": 1.0, "time": NOON + at, "max_steps": 100} for n, at in enumerate(times)])
    found = progress(run.root, [NOON - 5, NOON + 4900])
    assert found.seconds_per_step == pytest.approx(50 / 4)
    assert found.seconds_left == pytest.approx(94 * 50 / 4)


def test_without_times_the_tokens_tell_how_long_a_step_takes(run: SlurmRun) -> None:
    run.metrics([{"step": n, "loss": 1.0, "num_tokens": n * 600, "tokens_per_second": 100.0} for n in range(1, 5)])
    assert progress(run.root).seconds_per_step == pytest.approx(6)


@pytest.mark.parametrize(
    ("train", "record", "steps"),
    [
        ("{max_steps: 77}", {"epoch": 0.5}, 77),
        ("{num_train_epochs: 3}", {"epoch": 0.4}, 75),
        ("{num_train_epochs: 3}", {"epoch": 0.4, "max_steps": 76}, 76),
        ("{num_train_epochs: 0.5}", {"epoch": 0.32}, 16),
    ],
)
def test_how_many_steps_there_will_be(run: SlurmRun, train: str, record: dict[str, float], steps: int) -> None:
    recipe = f"model: {{model_name_or_path: m}}\ndata: {{dataset_name: d}}\ntrain: {train}\noutput: {{output_dir: o}}\n"
    (run.root / "recipe.yaml").write_text("stage: sft\n" + recipe)
    run.metrics([{"step": 10, "loss": 1.0} | record])
    assert progress(run.root).steps == steps


def test_the_newest_evaluation_is_found_however_long_ago_it_was(run: SlurmRun) -> None:
    trained(run, 5000, padding="x" * 100)  # type: ignore[arg-type]
    path = run.root / "metrics.jsonl"
    path.write_text('{"step": 1, "eval_loss": 2.0}\n{"step": 2, "eval_loss": 1.5}\n' + path.read_text())
    found = progress(run.root)
    assert (found.step, found.eval_loss, found.eval_step) == (5000, 1.5, 2)


def test_a_run_that_has_gone_silent_is_noticed(
    run: SlurmRun, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    shown_job(tmp_path, monkeypatch, JobState="RUNNING", NodeList="n0", StartTime="2026-11-25T17:00:00")
    run.start(0)
    trained(run, 100)
    assert said(capsys, str(run.root))["silent"] == "no record for 56 min; one comes every 2 s"
    trained(run, 100, first=3390)
    assert "silent" not in said(capsys, str(run.root))


# All runs


def test_all_runs_of_the_queue_and_of_memory_are_listed_newest_first(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    old, new = SlurmRun(tmp_path / "old", "7"), SlurmRun(tmp_path / "a|b [bold]", "8_3")
    text = new.at.submission.read_text().replace(iso(-60), iso(-30))
    new.at.submission.write_text(text)
    old.start(0)
    old.end(60, "stop", "rank 3 failed", step=4)
    trained(old, 4)
    registry.add(old.root)
    registry.add(tmp_path / "gone")
    lines = [
        f"8_3|PENDING|Priority|2026-11-25T19:00:00|N/A|2026-11-25T16:59:30||gpu|{new.root}",
        "9|RUNNING|None|2026-11-25T17:00:00|2026-11-25T19:00:00|2026-11-25T16:00:00|n0|gpu|somebody else's script",
        "10|RUNNING|None|N/A|N/A|N/A|n0|gpu|(null)",
    ]
    (tmp_path / "queue").write_text("\n".join(lines) + "\n")
    slurm(tmp_path, monkeypatch, "squeue", f"cat {tmp_path}/queue")
    assert cli.main(["status"]) == 0
    table = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[0] for line in table[2:4]] == ["a|b [bold]", "old"]
    assert "8_3" in table[2] and "queued: Priority" in table[2]
    assert "failed: rank 3 failed" in table[3] and "4/1,000" in table[3] and "59 min ago" in table[3]
    assert len(table) == 6 and max(map(len, table[:4])) <= 80
    assert table[5] == (
        f"a folder that is gone, or not mounted here: {tmp_path}/gone; `sft-dist status --forget` drops them"
    )
    assert cli.main(["status", "--json"]) == 0
    held = json.loads(capsys.readouterr().out)
    assert [each["state"]["kind"] for each in held["runs"]] == ["queued", "failed"]
    assert cli.main(["status", "--forget"]) == 0
    assert f"forgotten: {tmp_path}/gone" in capsys.readouterr().out
    assert registry.read() == [old.root]


def test_the_table_is_not_longer_than_one_looks_at(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("launch.status.command._MOST_RUNS", 2)
    monkeypatch.chdir(tmp_path)
    for name in ("a", "b", "c"):
        (tmp_path / name).mkdir()
        registry.add(tmp_path / name)
    assert cli.main(["status"]) == 0
    shown = capsys.readouterr().out.splitlines()
    assert {line.split()[0] for line in shown[2:4]} == {"b", "c"}
    assert shown[-1] == "1 older run left out; `sft-dist status RUN` shows it"


def test_without_runs_it_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["status"]) == 0
    assert (
        capsys.readouterr().out == "no runs on Slurm are known here; `sft-dist status RUN` shows the one in a folder\n"
    )


def test_what_is_no_run_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["status", str(tmp_path / "none")]) == 2
    assert capsys.readouterr().err == (
        f"sft-dist: RUN: {tmp_path}/none is no folder; name a run's folder (its output.output_dir)\n"
    )


def test_what_watches_a_run_pays_for_no_training() -> None:
    modules = [f"launch.{path.parent.name}.{path.stem}" for name in ("logs", "status", "slurm")
               for path in (ROOT / "launch" / name).glob("*.py") if path.stem != "__init__"]  # fmt: skip
    assert len(modules) > 10
    code = f"import importlib, sys; [importlib.import_module(name) for name in {modules}]; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert not {"torch", "transformers", "trl", "deepspeed", "numpy", "submitit"} & set(done.stdout.split())


# Slurm's words


@pytest.mark.parametrize(
    ("code", "words"),
    [
        ("Priority", "other jobs come first (Priority)"),
        ("QOSMaxGRESPerUser", "a limit of its quality of service on what one job or user may have (QOSMaxGRESPerUser)"),
        ("QOSGrpCpuLimit", "a limit of its quality of service on what all together may have (QOSGrpCpuLimit)"),
        ("AssocGrpCPUMinutesLimit", "a limit of the account on what all together may have (AssocGrpCPUMinutesLimit)"),
        ("ReqNodeNotAvail, UnavailableNodes:n[1-2]",
         "nodes that it needs are down, drained or reserved: n[1-2] (ReqNodeNotAvail)"),
        ("SomethingNew", "Slurm says SomethingNew"),
        (None, "Slurm has not said why"),
    ],
)  # fmt: skip
def test_reasons_are_told_in_words(code: str | None, words: str) -> None:
    assert reasons.waits(code) == words
