"""The set-up: which build of torch a machine gets, and that nothing is done twice."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from launch import bootstrap
from tests.recipes import ROOT

CPU = {"install": [{"metadata": {"name": "torch"}}, {"metadata": {"name": "sympy"}}]}
CUDA = {"install": [{"metadata": {"name": "torch"}}, {"metadata": {"name": "nvidia-cublas-cu13"}}]}


@pytest.fixture
def commands(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The commands that the set-up would run."""
    seen: list[list[str]] = []

    def run(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        seen.append(command)
        return subprocess.CompletedProcess(command, 0, "")

    monkeypatch.setattr(bootstrap.subprocess, "run", run)
    return seen


def test_cuda_packages_are_recognised() -> None:
    assert bootstrap.brings_cuda(CUDA)
    assert not bootstrap.brings_cuda(CPU)


def test_a_machine_without_a_gpu_looks_for_a_cpu_build_first(
    commands: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bootstrap, "has_gpu", lambda: False)
    monkeypatch.setattr(bootstrap, "_default_is_cuda", lambda *_: True)
    bootstrap._torch(Path("python"))
    assert commands[-1][-3:] == ["--torch-backend", "cpu", bootstrap.torch_requirement()]
    assert not any("pip" in c and c[-1] == bootstrap.torch_requirement() and "uv" not in c for c in commands)


@pytest.mark.parametrize(("gpu", "cuda"), [(True, True), (False, False)])
def test_the_default_build_is_taken_with_a_gpu_and_where_it_is_a_cpu_build(
    commands: list[list[str]], monkeypatch: pytest.MonkeyPatch, gpu: bool, cuda: bool
) -> None:
    monkeypatch.setattr(bootstrap, "has_gpu", lambda: gpu)
    monkeypatch.setattr(bootstrap, "_default_is_cuda", lambda *_: cuda)
    bootstrap._torch(Path("python"))
    assert len(commands) == 1
    assert commands[0][-1] == bootstrap.torch_requirement()


def test_a_failing_step_is_one_line_and_leaves_no_stamp(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object) -> Path:
        raise bootstrap.Failed("`pip` failed; mend what it says above and call make again")

    monkeypatch.setattr(bootstrap, "_environment", fail)
    assert bootstrap.main([str(tmp_path)]) == 2
    assert capsys.readouterr().err == "set-up: `pip` failed; mend what it says above and call make again\n"
    assert not list(tmp_path.iterdir())


def test_an_environment_that_is_up_to_date_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    monkeypatch.setattr(bootstrap, "_environment", lambda venv: calls.append("environment") or venv)
    monkeypatch.setattr(bootstrap, "_torch", lambda _: calls.append("torch"))
    monkeypatch.setattr(bootstrap, "_pip", lambda *_: calls.append("pip"))
    assert bootstrap.main([str(tmp_path)]) == 0
    assert calls == ["environment", "torch", "pip", "pip"]
    assert bootstrap.main([str(tmp_path)]) == 0
    assert len(calls) == 4


def test_the_set_up_needs_the_standard_library_only() -> None:
    code = "import sys; sys.path.insert(0, 'launch'); import bootstrap; print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert {name.split(".")[0] for name in done.stdout.split()} <= {*sys.stdlib_module_names, "bootstrap", "__main__"}
