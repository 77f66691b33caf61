"""What is found to compute with, and how many processes and which strategy follow from it."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from launch import devices
from launch.devices import Gpu, bf16_supported, cpu_cores, gpus
from launch.local import choose_processes, choose_strategy
from sft_dist.config import Recipe
from sft_dist.errors import UserError

ANSWER = """\
0, GPU-aa11, 9.0, 81559, NVIDIA H100 80GB HBM3
1, GPU-aa22, 8.0, 40960, NVIDIA A100-PCIE-40GB
2, GPU-bb33, 7.5, 15360, Tesla T4
"""
H100 = Gpu(0, "NVIDIA H100 80GB HBM3", (9, 0), 81559 * 2**20)
A100 = Gpu(1, "NVIDIA A100-PCIE-40GB", (8, 0), 40960 * 2**20)
T4 = Gpu(2, "Tesla T4", (7, 5), 15360 * 2**20)


@pytest.fixture
def nvidia_smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A program of that name that gives three GPUs, as the only one on the path."""
    program = tmp_path / "bin" / "nvidia-smi"
    program.parent.mkdir()
    write(program, f"/bin/cat <<'END'\n{ANSWER}END\n")
    monkeypatch.setenv("PATH", str(program.parent))
    return program


def write(program: Path, script: str) -> None:
    program.write_text(f"#!/bin/sh\n{script}")
    program.chmod(0o755)


@pytest.mark.parametrize(
    ("visible", "found"),
    [
        (None, [H100, A100, T4]),
        ("0,1,2", [H100, A100, T4]),
        ("2,0", [T4, H100]),
        (" 1 ", [A100]),
        ("GPU-bb,GPU-aa11", [T4, H100]),
        ("", []),
        ("-1", []),
        ("1,-1,0", [A100]),
        ("1,7,0", [A100]),
        ("1,1", [A100]),
        ("GPU-aa", []),
        ("NoDevFiles", []),
    ],
)
@pytest.mark.usefixtures("nvidia_smi")
def test_cuda_visible_devices_is_honoured(visible: str | None, found: list[Gpu]) -> None:
    assert gpus({} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}) == found


def test_a_gpu_that_tells_no_memory_is_a_gpu_all_the_same(nvidia_smi: Path) -> None:
    write(nvidia_smi, "echo '0, GPU-cc, 12.1, [N/A], NVIDIA GB10'")
    assert gpus({}) == [Gpu(0, "NVIDIA GB10", (12, 1), 0)]


def test_without_nvidia_smi_there_is_no_gpu(nvidia_smi: Path) -> None:
    nvidia_smi.unlink()
    assert gpus({}) == []


@pytest.mark.parametrize("script", ["echo 'driver not loaded'; exit 9", "echo 'No devices were found'"])
def test_an_nvidia_smi_that_fails_gives_no_gpu(nvidia_smi: Path, script: str) -> None:
    write(nvidia_smi, script)
    assert gpus({}) == []


def test_an_nvidia_smi_that_hangs_is_given_up(nvidia_smi: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(nvidia_smi, "exec /bin/sleep 60")
    monkeypatch.setattr(devices, "_LIMIT_SECONDS", 0.2)
    start = time.monotonic()
    assert gpus({}) == []
    assert time.monotonic() - start < 5


@pytest.fixture
def sixteen_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(16)), raising=False)


@pytest.mark.parametrize(
    ("outer", "inner", "cores"),
    [
        ("max 100000", "max 100000", 16),
        ("max 100000", "400000 100000", 4),
        ("200000 100000", "400000 100000", 2),
        ("max 100000", "350000 100000", 3),
        ("max 100000", "50000 100000", 1),
        ("max 100000", "6400000 100000", 16),
    ],
)
@pytest.mark.usefixtures("sixteen_cores")
def test_a_quota_of_any_cgroup_around_the_process_bounds_its_cores(
    tmp_path: Path, outer: str, inner: str, cores: int
) -> None:
    folder = tmp_path / "fs" / "job" / "step"
    folder.mkdir(parents=True)
    (folder.parent / "cpu.max").write_text(outer)
    (folder / "cpu.max").write_text(inner)
    (tmp_path / "cgroup").write_text("1:name=systemd:/other\n0::/job/step\n")
    assert cpu_cores(tmp_path / "cgroup", tmp_path / "fs") == cores


@pytest.mark.usefixtures("sixteen_cores")
def test_without_cgroups_the_affinity_counts(tmp_path: Path) -> None:
    assert cpu_cores(tmp_path / "absent", tmp_path / "absent") == 16


def test_bf16_needs_every_gpu_to_have_it() -> None:
    assert bf16_supported([H100, A100]) == (True, "NVIDIA H100 80GB HBM3 has bf16")
    able, why = bf16_supported([H100, T4])
    assert not able
    assert why == "GPU 2 (Tesla T4) has compute capability 7.5, bf16 needs 8.0"


@pytest.mark.parametrize("able", [True, False])
def test_without_a_gpu_the_processor_decides_on_bf16(monkeypatch: pytest.MonkeyPatch, able: bool) -> None:
    monkeypatch.setattr(devices, "cpu_has_bf16", lambda: able)
    found, why = bf16_supported([])
    assert found is able
    assert ("no bf16" in why) is not able


def recipe(**parallel: object) -> Recipe:
    return Recipe.model_validate(
        {
            "model": {"model_name_or_path": "m"},
            "data": {"dataset_name": "d"},
            "output": {"output_dir": "o"},
            "parallel": parallel,
        }
    )


@pytest.mark.parametrize(
    ("parallel", "visible", "processes", "strategy"),
    [
        ({}, [], 1, "single"),
        ({}, [H100], 1, "single"),
        ({}, [H100, A100], 2, "ddp"),
        ({"processes": 4}, [], 4, "ddp"),
        ({"processes": 1}, [H100, A100], 1, "single"),
        ({"strategy": "single"}, [H100, A100], 1, "single"),
        ({"strategy": "zero2"}, [H100, A100], 2, "zero2"),
        ({"strategy": "ddp"}, [], 1, "ddp"),
    ],
)
def test_processes_and_strategy_follow_from_recipe_and_gpus(
    parallel: dict[str, object], visible: list[Gpu], processes: int, strategy: str
) -> None:
    chosen = recipe(**parallel)
    assert choose_processes(chosen, visible) == processes
    assert choose_strategy(chosen, processes, visible) == strategy


def test_more_processes_than_gpus_are_refused() -> None:
    with pytest.raises(UserError, match=r"parallel\.processes: 3 is more than the 2 GPUs"):
        choose_processes(recipe(processes=3), [H100, A100])


def test_single_on_several_processes_is_refused() -> None:
    with pytest.raises(UserError, match=r"parallel\.strategy: single is one process"):
        choose_strategy(recipe(strategy="single", processes=2), 2, [])
