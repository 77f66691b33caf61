"""The batch script of a run: what it asks for, and that it holds no secret and can be submitted by hand."""

from __future__ import annotations

import os
import shlex
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from launch.slurm import script
from launch.slurm.profile import Profile
from sft_dist.errors import UserError

Script = Callable[..., str]


@pytest.fixture
def text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Script:
    """The script of a run in `tmp_path/run` for a profile, on a machine that seems to have Slurm."""
    monkeypatch.setattr("shutil.which", lambda name: f"/usr/bin/{name}")

    def make(nodes: int = 2, tasks: int = 4, after: tuple[str, ...] = (), root: str = "run", **profile: Any) -> str:
        made = script.executor(tmp_path / root, "sft-dist:run", Profile(**profile), nodes, tasks, after)
        return script.text(made)

    return make


def options(text: str) -> dict[str, str]:
    lines = [line.removeprefix("#SBATCH --") for line in text.splitlines() if line.startswith("#SBATCH --")]
    return {line.partition("=")[0]: " ".join(shlex.split(line.partition("=")[2])) for line in lines}


def call(text: str) -> list[str]:
    return shlex.split(next(line for line in text.splitlines() if line.startswith("srun ")))


def test_what_the_profile_says_is_asked_for(text: Script, tmp_path: Path) -> None:
    asked = options(text(partition="gpu", account="me", qos="high", constraint="ib", reservation="r", exclude="n9",
                         gpus_per_node=4, gpu_type="h100", cpus_per_task=12, memory_per_node="480G", exclusive=True,
                         time="1-00:00:00", signal_seconds=180, sbatch={"mail-type": "END"}))  # fmt: skip
    assert asked | {
        "partition": "gpu", "account": "me", "qos": "high", "constraint": "ib", "reservation": "r", "exclude": "n9",
        "nodes": "2", "ntasks-per-node": "4", "gpus-per-node": "h100:4", "cpus-per-task": "12", "mem": "480G",
        "exclusive": "", "time": "1440", "signal": "USR2@180", "requeue": "", "mail-type": "END", "open-mode": "append",
        "comment": str(tmp_path / "run"), "output": f"{tmp_path}/run/slurm/job-%j.out", "chdir": os.getcwd(),
        "job-name": "sft-dist:run",
    } == asked  # fmt: skip


def test_what_the_profile_leaves_out_is_left_to_the_cluster(text: Script) -> None:
    asked = options(text())
    assert not {"partition", "account", "qos", "constraint", "reservation", "exclude", "gpus-per-node", "mem",
                "exclusive", "dependency", "gres"} & set(asked)  # fmt: skip


@pytest.mark.parametrize(("time", "minutes"), [("90", "90"), ("0:10:30", "11"), ("1:00:00", "60")])
def test_a_time_is_rounded_up_to_the_minutes_of_slurm(text: Script, time: str, minutes: str) -> None:
    assert options(text(time=time))["time"] == minutes


def test_options_without_a_value_are_switches(text: Script) -> None:
    made = text(sbatch={"spread-job": "true", "contiguous": "false"})
    assert "#SBATCH --spread-job" in made.splitlines() and "contiguous" not in made


def test_a_job_waits_for_those_it_needs(text: Script) -> None:
    asked = options(text(after=("7", "9_1")))
    assert asked["dependency"] == "afterok:7:9_1" and asked["kill-on-invalid-dep"] == "yes"


def test_srun_ends_all_tasks_with_the_first_and_counts_node_by_node(text: Script) -> None:
    words = call(text(cpus_per_task=6, srun=["--mpi=none"], container={"image": "i.sqsh", "mounts": ["/a:/a", "/b:/b"]},
                      python="python3"))  # fmt: skip
    for word in ("--kill-on-bad-exit=1", "--distribution=block", "--cpus-per-task=6", "--mpi=none",
                 "--container-image=i.sqsh", "--container-mounts=/a:/a,/b:/b"):  # fmt: skip
        assert word in words
    assert "python3 -u -m submitit.core._submit" in " ".join(words)


def test_words_with_blanks_and_quotes_stay_one_word(text: Script, tmp_path: Path) -> None:
    made = text(root="a 'run' $HOME", environment={"A": "x y; $(touch no) 'z'"}, setup=["true"])
    assert options(made)["comment"] == f"{tmp_path}/a 'run' $HOME"
    ran = subprocess.run(["bash", "-c", made.split("# setup")[1].split("SFT_DIST_RENDEZVOUS")[0] + 'printf %s "$A"'],
                         capture_output=True, text=True, cwd=tmp_path, check=True)  # fmt: skip
    assert ran.stdout == "x y; $(touch no) 'z'" and not (tmp_path / "no").exists()
    assert subprocess.run(["bash", "-n"], input=made, text=True, check=False).returncode == 0


def test_no_secret_of_the_environment_is_in_the_script(text: Script, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WANDB_API_KEY", "HF_TOKEN"):
        monkeypatch.setenv(name, "shibboleth")
    assert "shibboleth" not in text(partition="gpu", gpus_per_node=8)


@pytest.mark.parametrize(
    ("before", "srun", "after", "code", "runs"),
    [
        (0, 0, 0, 0, "before srun after"),
        (3, 0, 0, 0, "before"),
        (2, 0, 0, 2, "before"),
        (1, 0, 0, 2, "before"),
        (0, 75, 0, 75, "before srun after"),
        (0, 1, 4, 1, "before srun after before srun after"),
        (0, 0, 5, 1, "before srun after"),
    ],
)
def test_the_script_does_what_before_and_after_say(
    text: Script, tmp_path: Path, before: int, srun: int, after: int, code: int, runs: str
) -> None:
    """Run by bash with stand-ins for Python and srun. `after` is what is answered the first time."""
    python, said = tmp_path / "python", tmp_path / "said"
    python.write_text(
        "#!/bin/bash\n"
        'case "$2" in\n'
        f"launch.slurm.before) echo before >> {said}; echo 127.0.0.1 20000 0; exit {before};;\n"
        f"launch.slurm.after) [ \"$4 $5\" = '{srun} 127.0.0.1 20000 0' ] || exit 99\n"
        f"  first=$(grep -c after {said}); echo after >> {said}; [ $first = 0 ] && exit {after}; exit 0;;\n"
        "esac\n"
    )
    (tmp_path / "srun").write_text(f'#!/bin/bash\n[ -n "$SFT_DIST_RENDEZVOUS" ] && echo srun >> {said}\nexit {srun}\n')
    for name in ("python", "srun"):
        (tmp_path / name).chmod(0o700)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.executable", str(python))
        (tmp_path / "job.sh").write_text(text())
    ran = subprocess.run(["bash", str(tmp_path / "job.sh")], env={"PATH": f"{tmp_path}:/usr/bin:/bin"},
                         capture_output=True, text=True, check=False)  # fmt: skip
    assert (ran.returncode, " ".join(said.read_text().split())) == (code, runs), ran.stderr


def test_without_slurm_it_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="there is no Slurm here; log in to a node that has it"):
        script.executor(tmp_path, "x", Profile(), 1, 1)
