"""A run that goes on from a checkpoint is the run that was never stopped: to the bit, and to 1e-5 where its processes
are others."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from sft_dist.export.command import Wishes, export
from tests import tiny
from tests.outcome import numbers as records
from tests.outcome import weights_hash
from tests.ranks import do_runs
from tests.recipes import small_recipe, write_conversations

# Checkpoints lie in the middle of an epoch, of accumulated micro-batches' global batches and of the steps between two
# records; the held-out loss is measured in between.
SETTINGS = ("train.save_strategy=steps", "train.save_steps=5", "checkpoint.keep=null", "train.report_to=none",
            "eval.enabled=false", "train.full_determinism=true", "train.logging_steps=3", "train.max_steps=9",
            "train.per_device_train_batch_size=1", "train.eval_strategy=steps", "train.eval_steps=4")  # fmt: skip
STREAM = ("data.streaming=true", "data.shuffle_buffer=10", "data.packing=true", "train.max_length=128")
CASES = {
    "packed": ("data.packing=true", "train.max_length=192"),
    "plain": (),
    "mixture": (),
    "stream": STREAM,
    "lora": ("peft.use_peft=true", "peft.lora_dropout=0.2", "data.packing=true"),
    "qlora": ("peft.use_peft=true", "peft.load_in_4bit=true", "peft.lora_dropout=0.2"),
}
CUT = 5


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Recipes of a model with dropout (`drawing`) and of one without (`still`)."""
    folder = tmp_path_factory.mktemp("resume")
    still = tiny.save_model(folder / "still-model", "llama")
    drawing = tiny.save_model(folder / "drawing-model", "opt", activation="gelu")
    config = AutoConfig.from_pretrained(drawing)
    config.dropout = 0.1
    config.save_pretrained(drawing)
    assert AutoModelForCausalLM.from_pretrained(drawing).config.dropout == 0.1
    for name, model in (("still", still), ("drawing", drawing)):
        small_recipe(folder / name, model)
    write_conversations(folder / "drawing" / "more.jsonl", 30, seed=3)
    return folder


def mixture(folder: Path) -> tuple[str, ...]:
    sources = {name: {"dataset_name": str(folder / "drawing" / f"{name}.jsonl"), "weight": weight}
               for name, weight in (("train", 2), ("more", 1))}  # fmt: skip
    return "data.dataset_name=null", f"data.mixture={json.dumps(sources)}", "data.packing=true"


def job(recipe: Path, run: Path, *words: str) -> list[str]:
    return [str(recipe), *SETTINGS, *words, f"output.output_dir={run}"]


@pytest.mark.parametrize(
    ("strategy", "processes", "names"),
    [
        ("single", 1, ["packed", "stream"]),
        ("ddp", 2, list(CASES)),
        ("ddp", 4, ["packed"]),
        ("zero1", 2, ["packed"]),
        # Weights in 4 bits are slow on a processor, and frozen: their checkpoints are those of LoRA.
        ("zero2", 2, ["packed", "lora"]),
        ("zero3", 2, ["packed", "stream", "lora"]),
        ("fsdp2", 2, ["packed", "mixture", "lora"]),
    ],
)
def test_a_resumed_run_has_the_bits_of_one_that_was_never_stopped(
    folder: Path, strategy: str, processes: int, names: list[str]
) -> None:
    jobs = []
    for name in names:
        settings = mixture(folder) if name == "mixture" else CASES[name]
        whole, again = (folder / f"{strategy}{processes}-{name}-{which}" for which in ("whole", "again"))
        jobs.append(job(folder / "drawing" / "recipe.yaml", whole, *settings))
        jobs.append(
            job(folder / "drawing" / "recipe.yaml", again, *settings, "output.resume=true", f"cut:{whole}:{CUT}")
        )
    do_runs(folder, strategy, processes, jobs)
    for name in names:
        whole, again = (folder / f"{strategy}{processes}-{name}-{which}" for which in ("whole", "again"))
        assert records(whole) == records(again), name
        assert {step for step, key in records(again) if key == "eval_loss"} == {4, 8, 9}
        assert weights_hash(whole) == weights_hash(again), name


def test_other_processes_and_other_strategies_go_on_with_the_same_batches(folder: Path) -> None:
    recipe = folder / "still" / "recipe.yaml"
    words = ("data.packing=true", "train.max_length=192")

    def whole(name: str) -> list[str]:
        return job(recipe, folder / f"cross-{name}", *words)

    def again(source: str, name: str) -> list[str]:
        cut = f"cut:{folder / f'cross-{source}'}:{CUT}"
        return job(recipe, folder / f"cross-{source}-{name}", *words, "output.resume=true", cut)

    do_runs(folder, "ddp", 2, [whole("ddp2")])
    do_runs(folder, "ddp", 4, [whole("ddp4"), again("ddp2", "ddp4")])
    do_runs(folder, "zero3", 2, [whole("zero3"), again("ddp2", "zero3")])
    do_runs(folder, "fsdp2", 2, [again("zero3", "fsdp2"), again("ddp2", "fsdp2")])
    do_runs(folder, "zero2", 2, [again("zero3", "zero2")])
    do_runs(folder, "single", 1, [again("ddp4", "single"), again("zero3", "single"), again("zero3-fsdp2", "single")])
    expected = records(folder / "cross-ddp2")
    found = sorted(path.name for path in folder.glob("cross-*") if path.is_dir())
    assert len(found) == 11
    for name in found:
        have = records(folder / name)
        assert have.keys() == expected.keys(), name
        for (step, key), value in expected.items():
            if key in ("loss", "eval_loss", "grad_norm"):
                assert have[step, key] == pytest.approx(value, rel=1e-5), (name, step, key)
            elif key in ("num_tokens", "num_trained_tokens", "learning_rate"):
                assert have[step, key] == value, (name, step, key)


def test_what_is_written_can_be_read_without_pickle(folder: Path) -> None:
    """Of the two tests above: weights and states are safetensors, all else is JSON."""
    checkpoints = [path for path in folder.glob("*/checkpoints/checkpoint-*") if path.is_dir()]
    assert len(checkpoints) > 20
    for checkpoint in checkpoints:
        for file in checkpoint.iterdir():
            assert file.suffix in (".json", ".safetensors"), file
            if file.suffix == ".json":
                json.loads(file.read_text())


@pytest.mark.parametrize("name", ["packed", "lora", "qlora"])
def test_the_last_checkpoint_is_exported_as_the_model_that_the_run_left(
    folder: Path, tmp_path: Path, name: str
) -> None:
    """Of the tests above, under every strategy: whole models, and adapters merged."""
    runs = sorted(folder.glob(f"*-{name}-whole"))
    # Each with its number of processes.
    spread = {"zero22", "zero32", "fsdp22"} if name != "qlora" else set()
    assert {"ddp2", *spread} <= {run.name.partition("-")[0] for run in runs}
    for run in runs:
        out = [tmp_path / f"{run.name}-{which}" for which in ("run", "checkpoint")]
        for source, place in zip((run, run / "checkpoints" / "checkpoint-9"), out, strict=True):
            export(str(source), place, Wishes())
        left, ours = (load_file(place / "model.safetensors") for place in out)
        assert left.keys() == ours.keys() and all(torch.equal(left[n], ours[n]) for n in left), run.name
