"""What real trainings on two processes leave becomes model directories, whole or in one line why not: checkpoints of
runs, and those that DeepSpeed and torch write themselves."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from sft_dist.export.__main__ import main
from sft_dist.export.command import Wishes, export
from tests import tiny
from tests.recipes import command, sft_dist, small_recipe

WORKER = Path(__file__).parent / "workers" / "checkpoints.py"
SHORT = ("parallel.processes=2", "train.save_strategy=steps", "train.save_steps=3", "train.max_steps=3",
         "train.report_to=none", "eval.enabled=false")  # fmt: skip
# Of whole models and of every strategy: see test_resume.py.
RUNS = {
    "zero3": ("peft.use_peft=true", "peft.use_dora=true"),
    "fsdp2": ("peft.use_peft=true", "peft.use_rslora=true", "peft.lora_modules_to_save=[norm]"),
}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders zero1, zero2, zero3 and fsdp2, made by one pair of processes."""
    folder = tmp_path_factory.mktemp("checkpoints")
    for name in ("zero1", "zero2", "zero3", "fsdp2"):
        (folder / name).mkdir()
    done = command(folder, sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2",
                   str(WORKER), str(folder), DS_ACCELERATOR="cpu", OMP_NUM_THREADS="1")  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return folder


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of finished runs by strategy, each with a checkpoint of its last step."""
    folder = tmp_path_factory.mktemp("runs")
    recipe = small_recipe(folder, tiny.save_model(folder / "base"))
    for strategy, settings in RUNS.items():
        words = (f"parallel.strategy={strategy}", f"output.output_dir={folder / strategy}", *SHORT, *settings)
        done = sft_dist(folder, "run", str(recipe), *words)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return folder


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_as_deepspeed_converts_it(checkpoints: Path, tmp_path: Path, stage: int) -> None:
    """Equal to the bit: tied embeddings, sizes that do not divide, two groups, a frozen weight."""
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    folder = checkpoints / f"zero{stage}"
    export(str(folder), tmp_path / "out", Wishes(file_bytes=20_000))
    ours = AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    wanted = get_fp32_state_dict_from_zero_checkpoint(str(folder))
    # DeepSpeed's conversion loses frozen weights under ZeRO-1.
    lost = {"model.layers.1.mlp.up_proj.weight"} if stage == 1 else set()
    assert ours.keys() - wanted.keys() == lost and not wanted.keys() - ours.keys()
    assert all(torch.equal(ours[name], wanted[name]) for name in wanted)
    whole = torch.load(checkpoints / "fsdp2" / "whole.pt", weights_only=True)
    assert all(torch.equal(ours[name], whole[name]) for name in lost)
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 3


def test_a_checkpoint_of_fsdp2_without_its_processes(checkpoints: Path, tmp_path: Path) -> None:
    export(str(checkpoints / "fsdp2"), tmp_path / "out", Wishes())
    ours = AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    wanted = torch.load(checkpoints / "fsdp2" / "whole.pt", weights_only=True)
    assert ours.keys() == wanted.keys()
    assert all(torch.equal(ours[name], wanted[name]) for name in wanted)


def gone(name: str) -> Callable[[Path], Path]:
    """A file that is taken away."""

    def damage(folder: Path) -> Path:
        file = next(folder.rglob(name))
        file.unlink()
        return file

    return damage


def cut(name: str) -> Callable[[Path], Path]:
    """A file of which the second half is missing."""

    def damage(folder: Path) -> Path:
        file = next(folder.rglob(name))
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
        return file

    return damage


DAMAGES = {
    "rank": ("zero2", gone("zero_pp_rank_0_*optim_states.pt")),
    "last rank": ("zero3", gone("zero_pp_rank_1_*optim_states.pt")),
    "model states": ("zero3", gone("zero_pp_rank_1_*model_states.pt")),
    "latest": ("zero1", gone("latest")),
    "optimizer cut": ("zero1", cut("zero_pp_rank_1_*optim_states.pt")),
    "model states cut": ("zero2", cut("mp_rank_00_model_states.pt")),
    "fsdp2 rank": ("fsdp2", gone("__1_0.distcp")),
    "fsdp2 cut": ("fsdp2", cut("__0_0.distcp")),
    "fsdp2 metadata": ("fsdp2", gone(".metadata")),
    "fsdp2 metadata cut": ("fsdp2", cut(".metadata")),
}


@pytest.mark.parametrize("case", DAMAGES)
def test_damage_is_one_line(checkpoints: Path, tmp_path: Path, case: str, capsys: pytest.CaptureFixture[str]) -> None:
    kind, damage = DAMAGES[case]
    shutil.copytree(checkpoints / kind, tmp_path / "checkpoint-2")
    file = damage(tmp_path / "checkpoint-2")
    assert main([str(tmp_path / "checkpoint-2"), "--output", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    line = next(line for line in said.splitlines() if line.startswith("sft-dist: "))
    assert said.count("sft-dist: ") == 1 and "Traceback" not in said
    # The last rank's name cannot be known when its file is gone, but its number can.
    assert file.name in line or (case == "last rank" and "rank 1 is missing" in line), line
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-2"]


@pytest.mark.parametrize("strategy", RUNS)
def test_a_checkpoint_of_the_last_step_is_the_model_of_the_run(runs: Path, tmp_path: Path, strategy: str) -> None:
    """Adapters are merged from the checkpoint and from the run's folder."""
    run = runs / strategy
    for source, name in ((run, "run"), (run / "checkpoints" / "checkpoint-3", "checkpoint")):
        export(str(source), tmp_path / name, Wishes())
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in ("run", "checkpoint"))
    assert first.keys() == second.keys() and all(torch.equal(first[n], second[n]) for n in first)
    base = load_file(runs / "base" / "model.safetensors")
    assert not torch.equal(first[n := "model.layers.0.mlp.up_proj.weight"], base[n])
    from peft import PeftModel

    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(runs / "base"), run / "model")
    merged = model.merge_and_unload().state_dict()
    assert all((merged[n] - first[n]).abs().max() < 1e-6 for n in first)


def test_the_command(runs: Path, tmp_path: Path) -> None:
    words = ("--output", str(tmp_path / "out"), "--dtype", "bfloat16", "--max-shard-size", "100KB")
    done = sft_dist(tmp_path, "export", str(runs / "zero3" / "checkpoints" / "checkpoint-3"), *words)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{tmp_path / 'out'}: 20 tensors, 0.000201 GB in 3 files\n"
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert model.dtype == torch.bfloat16 and model.config.dtype == torch.bfloat16


def test_a_run_that_was_killed_has_all_that_is_needed(runs: Path, tmp_path: Path) -> None:
    """A checkpoint has neither configuration nor tokenizer; without `model/` the recipe leads to them."""
    shutil.copytree(runs / "fsdp2", tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "model")
    checkpoint = tmp_path / "run" / "checkpoints" / "checkpoint-3"
    export(str(checkpoint), tmp_path / "out", Wishes())
    export(str(runs / "fsdp2"), tmp_path / "whole", Wishes())
    ours, wanted = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "whole"))
    assert all(torch.equal(ours[n], wanted[n]) for n in wanted)
    tokenizers = [AutoTokenizer.from_pretrained(tmp_path / name) for name in ("out", "whole")]
    assert tokenizers[0].chat_template == tokenizers[1].chat_template
    export(str(checkpoint), tmp_path / "adapter", Wishes(keep_adapter=True))
    kept, trained = (load_file(f / "adapter_model.safetensors") for f in (tmp_path / "adapter", runs / "fsdp2/model"))
    assert kept.keys() == trained.keys() and all(torch.equal(kept[n], trained[n]) for n in kept)
    from peft import PeftModel

    PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(runs / "base"), tmp_path / "adapter")
