"""Workers get the environment that `accelerate launch` would have given them, and work in it."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from launch import local
from launch.environment import ABSENT, STRATEGIES, config_path, worker_environments
from launch.processes import Ending, Rank, run_ranks, run_to_end
from sft_dist.config import Recipe
from sft_dist.errors import UserError
from tests.recipes import ROOT

WORKERS = Path(__file__).parent / "workers"


def base_environment() -> dict[str, str]:
    kept = {name: os.environ[name] for name in ("PATH", "HOME", "LD_LIBRARY_PATH") if name in os.environ}
    # Without a locale Python would set LC_CTYPE on its own.
    return kept | {"PYTHONPATH": str(ROOT), "LC_ALL": "C.UTF-8", "OMP_NUM_THREADS": "3"}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def accelerate(folder: Path, strategy: str, processes: int, port: int, worker: str) -> None:
    done = subprocess.run(
        [
            sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(config_path(strategy)),
            "--num_processes", str(processes), "--main_process_port", str(port),
            "--num_cpu_threads_per_process", "3", str(WORKERS / worker), str(folder),
        ],
        env=base_environment(), capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]


def accelerate_nodes(folder: Path, strategy: str, nodes: int, processes: int, port: int) -> list[dict[str, str]]:
    """What accelerate gives to each rank of several nodes, which here are launchers side by side."""
    launchers = [
        subprocess.Popen(
            [
                sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(config_path(strategy)),
                "--num_processes", str(nodes * processes), "--num_machines", str(nodes), "--machine_rank", str(node),
                "--main_process_ip", "127.0.0.1", "--main_process_port", str(port), "--num_cpu_threads_per_process",
                "3", "--deepspeed_multinode_launcher", "standard", str(WORKERS / "dump_environment.py"), str(folder),
            ],
            env=base_environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for node in range(nodes)
    ]  # fmt: skip
    for launcher in launchers:
        said, _ = launcher.communicate(timeout=120)
        assert launcher.returncode == 0, said[-3000:]
    return expected(folder, nodes * processes)


def expected(folder: Path, processes: int) -> list[dict[str, str]]:
    found = [json.loads((folder / f"environment{rank}.json").read_text()) for rank in range(processes)]
    return [{name: value for name, value in one.items() if name not in ABSENT} for one in found]


@pytest.mark.parametrize(
    ("strategy", "processes"),
    [("single", 1), ("ddp", 1), ("zero2", 1), *((strategy, 2) for strategy in STRATEGIES if strategy != "single")],
)
def test_a_worker_s_environment_is_the_one_accelerate_gives(tmp_path: Path, strategy: str, processes: int) -> None:
    port = free_port()
    accelerate(tmp_path, strategy, processes, port, "dump_environment.py")
    ours = worker_environments(strategy, processes, master_port=port, omp_num_threads=3, base=base_environment())
    assert ours == expected(tmp_path, processes)


@pytest.mark.parametrize("strategy", ["ddp", "zero3", "fsdp2"])
def test_on_several_nodes_it_is_the_one_accelerate_gives_there(tmp_path: Path, strategy: str) -> None:
    port = free_port()
    given = accelerate_nodes(tmp_path, strategy, nodes=2, processes=2, port=port)
    common = {"master_port": port, "omp_num_threads": 3, "base": base_environment()}
    ours = [one for node in range(2) for one in worker_environments(strategy, 2, node=node, nodes=2, **common)]
    assert ours == given


def test_every_file_in_ds_configs_is_compared() -> None:
    assert {path.stem for path in (ROOT / "ds_configs").glob("*.yaml")} == set(STRATEGIES)


def test_accelerate_starts_real_processes_where_there_is_no_gpu(tmp_path: Path) -> None:
    accelerate(tmp_path, "ddp", 2, 0, "all_reduce.py")
    told = [json.loads((tmp_path / f"sum{rank}").read_text()) for rank in range(2)]
    assert [one["sum"] for one in told] == [1.0, 1.0]


@pytest.mark.parametrize("processes", [2, 4])
def test_ranks_started_here_find_each_other(tmp_path: Path, processes: int) -> None:
    import torch

    if 0 < torch.cuda.device_count() < processes:
        pytest.skip(f"needs {processes} GPUs, or none")
    environments = worker_environments(
        "ddp", processes, master_port=free_port(), omp_num_threads=1, base=base_environment()
    )
    command = [sys.executable, str(WORKERS / "all_reduce.py"), str(tmp_path)]
    code = run_ranks([Rank(rank, command, one, tmp_path / f"{rank}.log") for rank, one in enumerate(environments)])
    assert code == 0, (tmp_path / "0.log").read_text()
    told = [json.loads((tmp_path / f"sum{rank}").read_text()) for rank in range(processes)]
    assert [one["sum"] for one in told] == [sum(range(processes))] * processes
    assert [one["local"] for one in told] == list(range(processes))
    assert {one["processes"] for one in told} == {processes}
    assert {one["OMP_NUM_THREADS"] for one in told} == {"1"}


def environments(strategy: str, processes: int = 1) -> list[dict[str, str]]:
    return worker_environments(strategy, processes, master_port=1, omp_num_threads=1, base={})


@pytest.mark.parametrize("name", ["zero9", "../setup", ""])
def test_an_unknown_strategy_is_refused_with_those_there_are(name: str) -> None:
    with pytest.raises(UserError, match=r"strategy: .* is not a strategy; take one of single, ddp, zero1, "):
        environments(name)


def test_single_is_refused_on_several_processes() -> None:
    with pytest.raises(UserError, match="single is one process, not 2; take ddp or zero2"):
        environments("single", 2)


@pytest.mark.parametrize(
    ("line", "named"),
    [
        ("mixed_precision: bf16", "mixed_precision"),
        ("num_machines: 2", "num_machines"),
        ("deepspeed_config: {zero3_save_16bit_model: true}", "zero3_save_16bit_model"),
        ("distributed_type: MEGATRON_LM", "distributed_type"),
        ("a: [", "cannot be read"),
    ],
)
def test_a_setting_that_would_be_passed_over_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, line: str, named: str
) -> None:
    file = tmp_path / "ddp.yaml"
    file.write_text(f"distributed_type: MULTI_GPU\n{line}\n")
    monkeypatch.setattr("launch.environment.config_path", lambda _: file)
    with pytest.raises(UserError, match=named):
        environments("ddp", 2)


def recipe_into(folder: Path, **parallel: object) -> Recipe:
    return Recipe.model_validate(
        {
            "model": {"model_name_or_path": "m"},
            "data": {"dataset_name": "d"},
            "output": {"output_dir": str(folder / "run")},
            "parallel": parallel,
        }
    )


def test_a_run_finds_the_package_from_anywhere_and_sends_no_telemetry(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A recipe that is not there is each worker's own fault: code 2, said once, by the real `sft_dist`."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PYTHONPATH", raising=False)
    kept: list[Rank] = []

    def keep_and_run(ranks: list[Rank], **options: Any) -> Ending:
        kept.extend(ranks)
        return run_to_end(ranks, **options)

    monkeypatch.setattr("launch.local.run_to_end", keep_and_run)
    monkeypatch.setattr("launch.devices.gpus", list)
    assert local.run(tmp_path / "absent.yaml", recipe_into(tmp_path, processes=2)) == Ending(2, stopped=False)
    assert "absent.yaml" in (tmp_path / "run" / "logs" / "rank1.log").read_text()
    assert {rank.environment["HF_HUB_DISABLE_TELEMETRY"] for rank in kept} == {"1"}
    assert {rank.environment["DO_NOT_TRACK"] for rank in kept} == {"1"}
    assert [rank.environment["WORLD_SIZE"] for rank in kept] == ["2", "2"]


def test_a_module_s_exit_code_and_words_go_through(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "ends.py").write_text("import sys, sft_dist.errors; sys.exit(int(sys.argv[1]))")
    (tmp_path / "dies.py").write_text("import os; os.kill(os.getpid(), 9)")
    assert local.run_module("ends", ["7"]) == 7
    assert local.run_module("dies", []) == 128 + 9


def test_starting_a_run_imports_no_torch() -> None:
    code = (
        "import sys, launch.local, launch.devices; launch.devices.gpus(); launch.devices.cpu_cores();"
        "launch.environment.worker_environments('zero2', 2, master_port=1, omp_num_threads=1, base={});"
        "heavy = {'torch', 'transformers', 'trl', 'accelerate', 'deepspeed', 'numpy'} & set(sys.modules);"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
