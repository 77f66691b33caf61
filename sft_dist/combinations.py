"""Settings that cannot stand together. A value equal to its default counts as not set."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator

from sft_dist.backend import NODE_SHARDS
from sft_dist.config import DataSection, PeftSection, Recipe
from sft_dist.rules import RULES, Finding, rule

_PEFT_KEYS = tuple(f"peft.{name}" for name in PeftSection.model_fields if name != "use_peft")
# What each source of a mixture has for itself.
_OF_EACH_SOURCE = ("dataset_config", "dataset_revision", "dataset_train_split", "format", "formatting")
_FUNCTION = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*")
# What transformers' schedule functions take beside the steps; further names would end in a TypeError.
_SCHEDULER_KWARGS: dict[str, tuple[str, ...]] = {
    "linear": (),
    "cosine": ("num_cycles",),
    "cosine_with_min_lr": ("num_cycles", "min_lr", "min_lr_rate"),
    "constant": (),
    "constant_with_warmup": (),
    "polynomial": ("lr_end", "power"),
    "inverse_sqrt": ("timescale",),
}


def combinations(recipe: Recipe, unsure: Collection[str] = ()) -> list[Finding]:
    """The impossible combinations of a recipe, as (dotted key, message).

    `unsure` are keys whose value is not known to be meant: rules that look at one of them are left out.
    """
    # Their rules count when they are read.
    from sft_dist import combinations_dpo, combinations_ppo, combinations_stages, combinations_survival  # noqa: F401

    return [found for keys, judge in RULES if not set(keys) & set(unsure) for found in judge(recipe)]


@rule("output.overwrite", "output.resume")
def _one_way_with_an_earlier_run(recipe: Recipe) -> Iterator[Finding]:
    if recipe.output.overwrite and recipe.output.resume:
        yield "output.overwrite", "cannot stand with output.resume, which goes on with what this removes; keep one"


@rule("data.chat_template_path", "data.response_template", "data.instruction_template")
def _one_template(recipe: Recipe) -> Iterator[Finding]:
    if recipe.data.chat_template_path is None:
        return
    for key in ("instruction_template", "response_template"):
        if getattr(recipe.data, key) is not None:
            yield f"data.{key}", "cannot stand with data.chat_template_path, which says the same; keep one"


@rule("data.dataset_test_split", "data.test_split_size")
def _one_held_out_set(recipe: Recipe) -> Iterator[Finding]:
    if recipe.data.dataset_test_split is not None and recipe.data.test_split_size:
        yield "data.test_split_size", "cannot stand with data.dataset_test_split, which is held out already; keep one"


@rule("data.test_split_size")
def _share_or_number(recipe: Recipe) -> Iterator[Finding]:
    size = recipe.data.test_split_size
    if size >= 1 and size != int(size):
        yield "data.test_split_size", f"{size} is neither a share below 1 nor a whole number of records"


@rule("data.dataset_name", "data.dataset_train_split", "data.dataset_test_split", "data.mixture")
def _held_out_is_not_trained_on(recipe: Recipe) -> Iterator[Finding]:
    data = recipe.data
    trained = [source.dataset_name for source in (data.mixture or {}).values()]
    if data.dataset_test_split in (data.dataset_train_split, data.dataset_name, *trained):
        yield "data.dataset_test_split", f"{data.dataset_test_split} is what is trained on; name other data"


@rule("data.min_response_length", "data.max_response_length")
def _some_response_fits(recipe: Recipe) -> Iterator[Finding]:
    least, most = recipe.data.min_response_length, recipe.data.max_response_length
    if least is not None and most is not None and least > most:
        yield "data.min_response_length", f"{least} is above data.max_response_length ({most}), so that none is left"


@rule("data.streaming", "data.shuffle_buffer")
def _buffer_of_a_stream(recipe: Recipe) -> Iterator[Finding]:
    default = DataSection.model_fields["shuffle_buffer"].default
    if recipe.data.shuffle_buffer != default and not recipe.data.streaming:
        yield "data.shuffle_buffer", "has no effect while data.streaming is false; set that to true or leave this out"


@rule("data.streaming", "train.max_steps")
def _a_stream_has_no_end(recipe: Recipe) -> Iterator[Finding]:
    if recipe.data.streaming and recipe.train.max_steps < 1:
        yield "data.streaming", "a stream has no known length; set train.max_steps above 0"


@rule("data.streaming", "data.test_split_size", "data.max_train_records", "data.deduplicate")
def _a_stream_is_not_known_whole(recipe: Recipe) -> Iterator[Finding]:
    if not recipe.data.streaming:
        return
    mends = {
        "test_split_size": "name what is held out in data.dataset_test_split",
        "max_train_records": "leave it out; train.max_steps ends the training",
        "deduplicate": "leave it out; an earlier record may be long gone",
    }
    for name, mend in mends.items():
        if getattr(recipe.data, name):
            yield f"data.{name}", f"cannot stand with data.streaming; {mend}"


@rule("data.formatting", "data.mixture")
def _function_path(recipe: Recipe) -> Iterator[Finding]:
    sources = {"data": recipe.data.formatting}
    sources |= {f"data.mixture.{name}": source.formatting for name, source in (recipe.data.mixture or {}).items()}
    for key, path in sources.items():
        if path is not None and not _FUNCTION.fullmatch(path):
            yield f"{key}.formatting", f"expected package.module:function, got {path!r}"


@rule("data.dataset_name", "data.mixture")
def _one_source_or_several(recipe: Recipe) -> Iterator[Finding]:
    if recipe.data.mixture == {}:
        yield (
            "data.mixture",
            "names no source; write `NAME: {dataset_name: ...}` below it, or leave it out",
        )
    if recipe.data.mixture is not None and recipe.data.dataset_name:
        yield "data.mixture", "cannot stand with data.dataset_name, which is trained on alone; keep one of the two"


@rule("data.mixture", *(f"data.{key}" for key in _OF_EACH_SOURCE))
def _keys_of_each_source(recipe: Recipe) -> Iterator[Finding]:
    for key in _OF_EACH_SOURCE:
        given = getattr(recipe.data, key) != DataSection.model_fields[key].get_default()
        if recipe.data.mixture and given:
            name = next(iter(recipe.data.mixture))
            yield f"data.{key}", f"each source of data.mixture has its own; write it as data.mixture.{name}.{key}"


@rule("data.mixture", "data.mixture_temperature", "data.stopping_strategy")
def _settings_of_a_mixture(recipe: Recipe) -> Iterator[Finding]:
    for key in ("mixture_temperature", "stopping_strategy"):
        given = getattr(recipe.data, key) != DataSection.model_fields[key].get_default()
        if recipe.data.mixture is None and given:
            yield f"data.{key}", "has no effect without data.mixture; name sources there or leave this out"


@rule("data.mixture", "data.streaming", "data.stopping_strategy")
def _end_of_a_streamed_mixture(recipe: Recipe) -> Iterator[Finding]:
    data = recipe.data
    default = DataSection.model_fields["stopping_strategy"].default
    if data.mixture is not None and data.streaming and data.stopping_strategy != default:
        yield (
            "data.stopping_strategy",
            "has no effect with data.streaming, where each source begins again by itself; leave this out",
        )


@rule("data.mixture", "data.streaming")
def _weights_of_a_stream(recipe: Recipe) -> Iterator[Finding]:
    sources = recipe.data.mixture or {}
    without = [f"data.mixture.{name}.weight" for name, source in sources.items() if source.weight is None]
    if recipe.data.streaming and without:
        yield "data.streaming", f"the sizes of the sources are not known beforehand; set {', '.join(without)}"


@rule("data.mixture", "data.dataset_test_split")
def _held_out_beside_a_mixture(recipe: Recipe) -> Iterator[Finding]:
    split = recipe.data.dataset_test_split
    if recipe.data.mixture is None or split is None:
        return
    # Not for every recipe: the module takes the built-in data with it.
    from sft_dist.data.sources import is_local

    if not is_local(split):
        yield (
            "data.dataset_test_split",
            f"{split} is no local file or folder, as it must be with data.mixture; mend it or set data.test_split_size",
        )


@rule("train.eval_strategy", "data.dataset_name", "data.dataset_test_split", "data.test_split_size")
def _evaluation_has_data(recipe: Recipe) -> Iterator[Finding]:
    if recipe.train.eval_strategy == "no" or recipe.data.test_split_size:
        return
    # Not for every recipe: the module takes the built-in data with it.
    from sft_dist.data.sources import test_split_of

    if test_split_of(recipe) is None:
        yield (
            "train.eval_strategy",
            f"{recipe.train.eval_strategy} needs held-out data; set data.dataset_test_split or data.test_split_size",
        )


@rule("train.max_steps")
def _some_steps(recipe: Recipe) -> Iterator[Finding]:
    if recipe.train.max_steps == 0:
        yield "train.max_steps", "0 trains nothing; -1 leaves the length to train.num_train_epochs"


@rule("train.warmup_steps")
def _whole_warmup(recipe: Recipe) -> Iterator[Finding]:
    steps = recipe.train.warmup_steps
    if steps >= 1 and steps != int(steps):
        yield "train.warmup_steps", f"{steps} is neither a share below 1 nor a whole number of steps"


@rule("train.lr_scheduler_type", "train.lr_scheduler_kwargs", "train.learning_rate")
def _scheduler_arguments(recipe: Recipe) -> Iterator[Finding]:
    train, key = recipe.train, "train.lr_scheduler_kwargs"
    given, known = train.lr_scheduler_kwargs or {}, _SCHEDULER_KWARGS[train.lr_scheduler_type]
    for name, value in given.items():
        if name not in known:
            takes = f"takes {', '.join(known)} only" if known else "takes no arguments"
            yield f"{key}.{name}", f"the scheduler {train.lr_scheduler_type} {takes}; leave it out"
        elif isinstance(value, bool) or not isinstance(value, int | float):
            yield f"{key}.{name}", f"expected a number, got {value!r}"
    if train.lr_scheduler_type == "cosine_with_min_lr" and len({"min_lr", "min_lr_rate"} & set(given)) != 1:
        yield "train.lr_scheduler_type", f"cosine_with_min_lr needs min_lr or min_lr_rate (one of them) in {key}"
    lowest = given.get("lr_end", 1e-7) if train.lr_scheduler_type == "polynomial" else 0
    if isinstance(lowest, int | float) and lowest >= train.learning_rate:
        yield "train.learning_rate", f"polynomial needs more than lr_end ({lowest}), got {train.learning_rate}"


@rule("train.gradient_checkpointing", "train.gradient_checkpointing_kwargs")
def _checkpointing_arguments(recipe: Recipe) -> Iterator[Finding]:
    if recipe.train.gradient_checkpointing_kwargs and not recipe.train.gradient_checkpointing:
        yield (
            "train.gradient_checkpointing_kwargs",
            "has no effect while train.gradient_checkpointing is false; set that to true or leave this out",
        )


@rule("parallel.global_batch_size", "train.gradient_accumulation_steps")
def _one_source_of_accumulation(recipe: Recipe) -> Iterator[Finding]:
    if recipe.parallel.global_batch_size is not None and recipe.train.gradient_accumulation_steps != 1:
        yield "train.gradient_accumulation_steps", "follows from parallel.global_batch_size; keep one of the two"


@rule("parallel.global_batch_size", "parallel.processes", "parallel.strategy", "train.per_device_train_batch_size")
def _global_batch_divides(recipe: Recipe) -> Iterator[Finding]:
    rows, each = recipe.parallel.global_batch_size, recipe.train.per_device_train_batch_size
    processes = recipe.parallel.processes
    at_once = each * (processes or 1)
    if rows is not None and rows % at_once:
        over = f"{processes} processes of {each} rows" if processes and processes > 1 else f"micro-batches of {each}"
        yield (
            "parallel.global_batch_size",
            (
                f"{rows} rows do not divide over {over}; make it a multiple of {at_once}, or change "
                "train.per_device_train_batch_size"
            ),
        )


@rule("parallel.strategy", "parallel.processes")
def _single_is_one_process(recipe: Recipe) -> Iterator[Finding]:
    processes = recipe.parallel.processes
    if recipe.parallel.strategy == "single" and processes is not None and processes > 1:
        yield "parallel.strategy", f"single is one process, parallel.processes is {processes}; take auto, ddp or zero2"


@rule("parallel.strategy", "parallel.processes")
def _a_node_has_several_processes(recipe: Recipe) -> Iterator[Finding]:
    strategy, processes = recipe.parallel.strategy, recipe.parallel.processes
    if strategy in NODE_SHARDS and processes == 1:
        yield (
            "parallel.strategy",
            f"{strategy} shards over the processes of a node, parallel.processes is 1; take single, or more processes",
        )


@rule("parallel.strategy", "parallel.offload_nvme_path")
def _path_of_an_offload(recipe: Recipe) -> Iterator[Finding]:
    if recipe.parallel.offload_nvme_path is not None and recipe.parallel.strategy != "zero3_offload":
        yield (
            "parallel.offload_nvme_path",
            "is for parallel.strategy=zero3_offload only; take that, or leave this out",
        )


@rule("parallel.strategy", "train.optim")
def _optimizer_of_shards(recipe: Recipe) -> Iterator[Finding]:
    strategy = recipe.parallel.strategy
    if recipe.train.optim == "adafactor" and strategy.startswith(("zero", "fsdp2")):
        yield (
            "train.optim",
            f"adafactor factors whole matrices, {strategy} gives it shards; take adamw_torch, or parallel.strategy=ddp",
        )


@rule("parallel.strategy", "train.torch_compile")
def _compilation_of_whole_weights(recipe: Recipe) -> Iterator[Finding]:
    strategy = recipe.parallel.strategy
    # Not proven to give the losses of one process where hooks gather weights or DeepSpeed wraps the model.
    if recipe.train.torch_compile and strategy.startswith(("zero", "fsdp2")):
        yield "train.torch_compile", f"cannot stand with {strategy} so far; leave it out, or take parallel.strategy=ddp"


@rule("model.attn_implementation", "model.dtype", "train.bf16")
def _flash_attention_precision(recipe: Recipe) -> Iterator[Finding]:
    kernel = recipe.model.attn_implementation or ""
    if kernel.startswith("flash_attention") and recipe.model.dtype == "float32" and recipe.train.bf16 is False:
        yield "model.attn_implementation", f"{kernel} computes in bf16 only; set train.bf16=true, or take sdpa"


@rule("peft.use_peft", *_PEFT_KEYS)
def _adapter_settings(recipe: Recipe) -> Iterator[Finding]:
    if recipe.peft.use_peft:
        return
    for name, field in PeftSection.model_fields.items():
        if getattr(recipe.peft, name) != field.get_default():
            yield f"peft.{name}", "has no effect while peft.use_peft is false; set that to true or leave this out"


@rule("peft.lora_target_modules", "peft.use_peft")
def _adapter_has_modules(recipe: Recipe) -> Iterator[Finding]:
    modules, key = recipe.peft.lora_target_modules, "peft.lora_target_modules"
    if not recipe.peft.use_peft:
        return
    if not modules or (isinstance(modules, list) and not all(modules)):
        yield key, "names no module; give names, a regular expression or all-linear"
    elif isinstance(modules, str):
        try:
            re.compile(modules)
        except re.error as error:
            yield key, f"{modules!r} is no regular expression: {error}; mend it, or give a list of names"
