"""Everything that can be known before a GPU is taken, each as one line.

The checks here read files and ask the hub; the sample of records goes through tokenizer, template and mask
in a process of the training plane.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from launch import devices, hub, local
from launch.check_reference import reference
from launch.check_rewards import rewards
from launch.environment import config_path, worker_environments
from launch.place import Place, this_machine
from sft_dist import builtin_models
from sft_dist.backend import Backend, refuse_contradictions
from sft_dist.checkpoints import folder as folders
from sft_dist.config import Recipe
from sft_dist.data.mixture_sources import key_of, sources_of
from sft_dist.data.sources import is_built_in, is_local, local_files
from sft_dist.errors import EXIT_DONE, EXIT_USER, UserError
from sft_dist.identity import refuse_other_run
from sft_dist.modelinfo import causal_lm_fault, max_positions, quantization_fault
from sft_dist.rundir import RunDir, occupied
from sft_dist.runlock import refuse_if_alive

_NEEDED = ("torch", "transformers", "trl", "accelerate", "datasets", "safetensors")
_WANTED_BY = {"deepspeed": "parallel.strategy: {strategy}: ", "bitsandbytes": "peft.load_in_4bit: ",
              "vllm": "ppo.generator: "}  # fmt: skip
_GB = 1e9
# Weights and Adam's two moments, in multiples of the weights.
_STATES = 3


@dataclass(frozen=True)
class Finding:
    """One line of a check. `unverified`: it could not be known from here, and would fail here."""

    level: Literal["fine", "unverified", "fault"]
    text: str


def findings(recipe: Recipe, place: Place | None = None) -> list[Finding]:
    """What is known of a recipe without starting a process, for a run in `place`, or on this machine."""
    found: list[Finding] = []

    def where() -> Place:
        return place or this_machine(recipe)

    parts: tuple[Callable[[], Iterator[Finding]], ...] = (
        lambda: _packages(recipe, where()),
        lambda: _output(recipe),
        lambda: _model(recipe),
        lambda: _told(reference(recipe)),
        lambda: _told(rewards(recipe)),
        lambda: _data(recipe),
        lambda: _parallel(recipe, where()),
    )
    for part in parts:
        try:
            found += part()
        except UserError as error:
            found.append(Finding("fault", str(error)))
    return found


def _told(lines: Iterator[tuple[bool, str]]) -> Iterator[Finding]:
    """Lines that are known to be well, or not known."""
    return (Finding("fine" if known else "unverified", text) for known, text in lines)


def refuse_faults(found: Sequence[Finding], unverified_too: bool) -> None:
    """Raise :class:`UserError` with the faults, one a line. `unverified_too`: a run here would fail on those."""
    levels = ("fault", "unverified") if unverified_too else ("fault",)
    lines = [f.text for f in found if f.level in levels]
    if lines:
        raise UserError("\n".join(lines))


def report(recipe: Recipe, file: Path, overrides: Sequence[str]) -> int:
    """Print all findings, then those of a sample of the records. Returns the exit code."""
    found = findings(recipe)
    marks = {"fine": "ok ", "unverified": "?? ", "fault": "no "}
    for finding in found:
        print(marks[finding.level], finding.text, flush=True)
    levels = {f.level for f in found}
    if "fault" in levels:
        return EXIT_USER
    if "unverified" in levels:
        print("?? ", "the sample of records was not looked at, for the lack of what is marked ??")
        return EXIT_DONE
    return local.run_module("sft_dist.preview", ["--check", str(file), *overrides])


def _packages(recipe: Recipe, place: Place) -> Iterator[Finding]:
    needed = [*_NEEDED, *recipe.train.report_to]
    needed += ["peft"] if recipe.peft.use_peft else []
    needed += ["bitsandbytes"] if recipe.peft.load_in_4bit else []
    needed += ["vllm"] if recipe.ppo.generator == "vllm" else []
    strategy = place.strategy(recipe)
    needed += ["deepspeed"] if strategy.startswith("zero") else []
    for name in needed:
        if importlib.util.find_spec(name) is None:
            why = _WANTED_BY.get(name, "").format(strategy=strategy)
            raise UserError(f"{why}the package {name} is missing; run: {sys.executable} -m pip install {name}")
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in needed[:4])
    yield Finding("fine", f"packages: {versions}")


def _output(recipe: Recipe) -> Iterator[Finding]:
    fault = occupied(recipe.output)
    if fault:
        raise UserError(fault)
    refuse_if_alive(Path(recipe.output.output_dir))
    if recipe.output.resume:
        refuse_other_run(Path(recipe.output.output_dir), recipe)
    folder = Path(recipe.output.output_dir)
    parent = next(p for p in (folder, *folder.absolute().parents) if p.exists())
    if not parent.is_dir():
        raise UserError(f"output.output_dir: {parent} is a file; name a folder")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise UserError(f"output.output_dir: {parent} cannot be written to; name a folder of yours")
    need, free, left = bytes_needed(recipe), shutil.disk_usage(parent).free, _bytes_left(recipe)
    if need is not None and need > free + left:
        raise UserError(_no_room(recipe, parent, need, free, left))
    about = "" if need is None else f", about {need / _GB:.1f} GB will be written"
    yield Finding("fine", f"output.output_dir: {folder} can be written, {free / _GB:.0f} GB free{about}")


def _no_room(recipe: Recipe, parent: Path, need: int, free: int, left: int) -> str:
    """The arithmetic of a disk that is too small, and how many checkpoints it would hold."""
    beside = f", beside {left / _GB:.1f} GB that this run has used so far," if left else ""
    line = f"{parent} has {free / _GB:.1f} GB free{beside} and the run writes about {need / _GB:.1f} GB"
    weights, held = _weight_bytes(recipe) or 0, _checkpoints_held(recipe)
    if not held:
        return f"output.output_dir: {line}; free some, or name another folder"
    each = _STATES * weights
    fits = recipe.checkpoint.keep and recipe.checkpoint.keep - -(-(need - free - left) // each)
    mend = f"set checkpoint.keep={fits}, or name another folder" if fits and fits > 0 else "name another folder"
    return (
        f"checkpoint.keep: {line}: {held} checkpoints at once (one is written before another goes) of {each / _GB:.1f} "
        f"GB, {_STATES} x the weights, and the model, {weights / _GB:.1f} GB; {mend}"
    )


def bytes_needed(recipe: Recipe) -> int | None:
    """Bytes of the final model and the checkpoints kept, where the size of the weights is known."""
    weights = _weight_bytes(recipe)
    if weights is None or recipe.peft.use_peft:
        return None
    return weights + _checkpoints_held(recipe) * _STATES * weights


def _bytes_left(recipe: Recipe) -> int:
    """Bytes of an earlier start that make room: all of a run that is replaced; checkpoints that later ones replace."""
    run, output = RunDir(Path(recipe.output.output_dir)), recipe.output
    if output.overwrite:
        return _bytes_in(run.checkpoints) + _bytes_in(run.model)
    if not output.resume:
        return 0
    found = sum(_bytes_in(path) for path in run.checkpoints.glob("checkpoint-*") if path.suffix != folders.DAMAGED)
    return min(found, _checkpoints_held(recipe) * _STATES * (_weight_bytes(recipe) or 0))


def _bytes_in(folder: Path) -> int:
    return sum(file.lstat().st_size for file in folder.rglob("*") if file.is_file())


def _checkpoints_held(recipe: Recipe) -> int:
    """Checkpoints on the disk at once: those that are kept, and the one that is written before an older one goes."""
    if recipe.train.save_strategy == "no":
        return 0
    # How many `checkpoint.keep_every` or an unset `checkpoint.keep` come to depends on the length of the training.
    return (recipe.checkpoint.keep or 2) + 1 + (recipe.checkpoint.metric_for_best_model is not None)


def _weight_bytes(recipe: Recipe) -> int | None:
    name = recipe.model.model_name_or_path
    if builtin_models.is_built_in(name):
        return builtin_models.WEIGHT_BYTES
    files = [*Path(name).glob("*.safetensors"), *Path(name).glob("*.bin")] if Path(name).is_dir() else []
    return sum(f.stat().st_size for f in files) or None


def _model(recipe: Recipe) -> Iterator[Finding]:
    name = recipe.model.model_name_or_path
    key = "model.model_name_or_path"
    if builtin_models.is_built_in(name):
        builtin_models.gguf_file()
        yield from _positions(recipe, builtin_models.CONFIG)
        yield Finding("fine", f"{key}: {name} is built in")
        return
    path = Path(name).expanduser()
    if not path.exists() and (name.startswith((".", "/", "~")) or name.count("/") > 1):
        raise UserError(f"{key}: no such folder: {name}; give a model directory or a hub id")
    if path.exists():
        config = hub.local_config(path, recipe.model, key)
        where = "is a model directory"
    else:
        answer = hub.model_config(name, recipe.model.model_revision)
        if answer.fault:
            raise UserError(f"{key}: {name}: {answer.fault}")
        if answer.config is None:
            yield Finding("unverified", f"{key}: {name} is not in the cache, and the hub cannot be reached from here")
            return
        config, where = answer.config, answer.where
    if fault := causal_lm_fault(config, "reward" if recipe.stage == "reward" else "causal"):
        raise UserError(f"{key}: {name}: {fault}")
    if recipe.peft.load_in_4bit and (fault := quantization_fault(config)):
        raise UserError(f"peft.load_in_4bit: {name}: {fault}")
    yield from _positions(recipe, config)
    yield Finding("fine", f"{key}: {name} {where} ({', '.join(config.get('architectures') or ['unnamed'])})")


def _positions(recipe: Recipe, config: dict[str, object]) -> Iterator[Finding]:
    limit, asked = max_positions(config), recipe.train.max_length
    if limit is not None and asked is not None and asked > limit:
        raise UserError(f"train.max_length: {asked} is beyond the model's {limit} positions; lower it")
    yield Finding("fine", f"train.max_length: {asked or limit} of {limit or 'unlimited'} positions")


def _data(recipe: Recipe) -> Iterator[Finding]:
    data = recipe.data
    if data.chat_template_path and not Path(data.chat_template_path).expanduser().is_file():
        raise UserError(f"data.chat_template_path: no such file: {data.chat_template_path}; give a Jinja file")
    for name, source in sources_of(data).items():
        yield _split(source.dataset_name, source.dataset_train_split, source.dataset_revision, key_of(data, name))
    held_out = data.dataset_test_split
    if held_out is not None:
        name = held_out if is_local(held_out) else data.dataset_name
        yield _split(name, held_out, data.dataset_revision, "data.dataset_test_split")


def _split(name: str, split: str, revision: str | None, key: str) -> Finding:
    """What is known of one split of a data set. `key` is the recipe key that names it."""
    if is_built_in(name):
        return Finding("fine", f"{key}: {name} is built in")
    if is_local(name):
        files = local_files(name, None if name == split else split, key)
        size = sum(f.stat().st_size for f in files)
        return Finding("fine", f"{key}: {len(files)} file{'s' * (len(files) > 1)}, {size / 1e6:.1f} MB ({files[0]})")
    answer = hub.dataset(name, revision)
    if answer.fault:
        raise UserError(f"{key}: {name}: {answer.fault}")
    if answer.where:
        return Finding("fine", f"{key}: {name} {answer.where}")
    return Finding("unverified", f"{key}: {name} is not in the cache, and the hub cannot be reached from here")


def _parallel(recipe: Recipe, place: Place) -> Iterator[Finding]:
    gpus, processes, strategy = place.gpus, place.world, place.strategy(recipe)
    _refuse_edited_files(recipe, strategy, processes)
    _refuse_other_batches(recipe, processes)
    _refuse_offload_path(recipe)
    rows, each = recipe.parallel.global_batch_size, recipe.train.per_device_train_batch_size
    if rows is not None and rows % (processes * each):
        raise UserError(
            f"parallel.global_batch_size: {rows} rows do not divide over {processes} processes of {each} rows; "
            f"make it a multiple of {processes * each}"
        )
    kernel = recipe.model.attn_implementation
    # torch has its forward only on a processor: training would fail at the first step.
    if kernel == "flex_attention" and not gpus:
        raise UserError(f"model.attn_implementation: {kernel} trains on a GPU only, and there is none; take sdpa")
    if recipe.ppo.generator == "vllm" and not gpus:
        raise UserError("ppo.generator: vllm needs a GPU, and there is none; take transformers")
    able, why = devices.bf16_supported(gpus)
    # The processors of other machines are not known here.
    known = place.is_here or bool(gpus)
    if recipe.train.bf16 and known and not able:
        raise UserError(f"train.bf16: {why}; set train.bf16=false or leave it out")
    precision = "bf16" if (able if recipe.train.bf16 is None else recipe.train.bf16) else "fp32"
    precision = precision if known or recipe.train.bf16 is not None else "the processors' precision"
    where = f"{len(gpus)} x {gpus[0].name}" if gpus else f"{devices.cpu_cores()} cores, no GPU"
    if not place.is_here:
        where = f"{place.nodes} node{'s' * (place.nodes > 1)} of {place.processes}" + f", {where}" * bool(gpus)
    yield Finding("fine", f"parallel: {strategy} on {processes} process{'es' * (processes > 1)}, {precision} ({where})")


def _refuse_other_batches(recipe: Recipe, processes: int) -> None:
    """Raise :class:`UserError` where a run would go on with other global batches than its checkpoint's."""
    folder = Path(recipe.output.output_dir) / "checkpoints"
    held = folders.complete(folder) if recipe.output.resume else {}
    train = recipe.train
    at_once = train.per_device_train_batch_size * processes
    rows = recipe.parallel.global_batch_size or at_once * train.gradient_accumulation_steps
    if held and (about := held[max(held)]).rows_per_step != rows:
        raise UserError(folders.other_batches(folders.path_of(folder, about.step), about, rows))


def _refuse_edited_files(recipe: Recipe, strategy: str, processes: int) -> None:
    """Raise :class:`UserError` where the strategy's file in ds_configs/ was changed into another strategy."""
    environment = worker_environments(strategy, processes, master_port=0, omp_num_threads=1, base={})[0]
    asked = recipe.model_copy(update={"parallel": recipe.parallel.model_copy(update={"strategy": strategy})})
    try:
        refuse_contradictions(asked, Backend.from_environment(environment), environment)
    except UserError as error:
        raise UserError(f"{config_path(strategy)}: {error}") from error


def _refuse_offload_path(recipe: Recipe) -> None:
    path = recipe.parallel.offload_nvme_path
    if path is None:
        return
    folder = Path(path)
    if not folder.is_dir():
        raise UserError(f"parallel.offload_nvme_path: no such folder: {path}; make it, or leave the key out")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise UserError(f"parallel.offload_nvme_path: {path} cannot be written to; name a folder of yours")
