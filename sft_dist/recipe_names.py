"""What was meant by a key or a section that a recipe does not have."""

from __future__ import annotations

import difflib
from typing import Any, NamedTuple, get_args, get_origin

from sft_dist.config import MixtureSource, Recipe
from sft_dist.config_base import Section
from sft_dist.recipe_values import kinds

SECTIONS: dict[str, type[Section]] = {
    name: field.annotation
    for name, field in Recipe.model_fields.items()
    if isinstance(field.annotation, type) and issubclass(field.annotation, Section)
}


def sections_below(annotation: Any) -> type[Section] | None:
    """The kind of the sections that a key holds under names of the user's, None for a key that holds none."""
    for kind in kinds(annotation):
        below = get_args(kind)[-1] if get_origin(kind) is dict else None
        if isinstance(below, type) and issubclass(below, Section):
            return below
    return None


class Unknown(NamedTuple):
    """The message about an unknown name, and the dotted key that was most likely meant."""

    text: str
    meant: str | None


# What the same thing is called by other trainers, by the key alone or within a section.
_RENAMED = {
    new: words.split()
    for new, words in {
        "train.per_device_train_batch_size": "batch_size micro_batch_size train_batch_size per_device_batch_size "
        "train_micro_batch_size_per_gpu per_gpu_train_batch_size",
        "train.per_device_eval_batch_size": "eval_batch_size per_gpu_eval_batch_size",
        "train.gradient_accumulation_steps": "grad_accum_steps accumulation_steps gradient_accumulation "
        "accumulate_grad_batches",
        "train.learning_rate": "lr",
        "train.num_train_epochs": "epochs num_epochs epoch",
        "train.max_steps": "steps total_steps max_train_steps num_steps",
        "train.max_length": "max_seq_length max_seq_len seq_length seq_len sequence_len cutoff_len block_size "
        "model_max_length max_tokens",
        "train.lr_scheduler_type": "scheduler lr_scheduler",
        "train.optim": "optimizer",
        "train.max_grad_norm": "gradient_clipping clip_grad grad_clip gradient_clip_val",
        "train.eval_strategy": "evaluation_strategy",
        "train.gradient_checkpointing": "activation_checkpointing",
        "train.dataloader_num_workers": "num_workers workers",
        "train.report_to": "logger trackers wandb",
        "checkpoint.keep": "save_total_limit keep_last max_checkpoints",
        "model.model_name_or_path": "model.name model.path model.id model.name_or_path model_name base_model model_id "
        "pretrained_model_name_or_path name_or_path",
        "model.model_revision": "model.revision",
        "model.dtype": "torch_dtype precision",
        "model.attn_implementation": "attention attn use_flash_attention_2 flash_attention",
        "data.dataset_name": "data.name data.path data.dataset data.file data.files data.train_file train_file "
        "data.data_path dataset_path",
        "data.mixture": "data.datasets data.sources data.mix data.mixer dataset_mixer dataset_mixture data_mixture "
        "interleave interleave_datasets",
        "data.mixture_temperature": "data.temperature mixing_temperature sampling_temperature",
        "data.stopping_strategy": "mix_strategy interleave_strategy",
        "data.dataset_config": "dataset_config_name data.config data.subset",
        "data.dataset_revision": "data.revision",
        "data.dataset_train_split": "train_split data.split data.train",
        "data.dataset_test_split": "test_split eval_split validation_split validation_file eval_file data.test "
        "data.validation",
        "data.test_split_size": "test_size val_size val_set_size validation_size eval_size",
        "data.chat_template_path": "chat_template",
        "data.max_train_records": "max_samples max_train_samples",
        "data.max_eval_records": "max_eval_samples",
        "data.formatting": "formatting_func",
        "data.packing": "sample_packing pack packed",
        "data.streaming": "dataset_streaming stream",
        "data.dataset_num_proc": "preprocessing_num_workers num_proc dataset_processes preprocessing_num_proc",
        "data.truncation_mode": "truncation too_long",
        "data.deduplicate": "dedup dedupe",
        "peft.use_peft": "use_lora peft.lora peft.enabled",
        "peft.lora_r": "peft.r peft.rank lora_rank",
        "peft.lora_alpha": "peft.alpha",
        "peft.lora_dropout": "peft.dropout",
        "peft.lora_target_modules": "target_modules",
        "peft.lora_modules_to_save": "modules_to_save",
        "peft.load_in_4bit": "use_qlora qlora",
        "parallel.offload_nvme_path": "nvme_path offload_param_nvme_path offload_optimizer_nvme_path",
        "parallel.processes": "num_processes world_size nproc_per_node num_gpus gpus n_gpus",
        "parallel.strategy": "zero_stage distributed_type",
        "output.output_dir": "output.dir output.path output.folder save_dir",
        "output.overwrite": "overwrite_output_dir",
        "output.resume": "resume_from_checkpoint",
    }.items()
}
_NEW_NAMES = {old: new for new, every in _RENAMED.items() for old in every}
_NEW_SECTIONS = {
    "training": "train", "trainer": "train", "training_arguments": "train", "training_args": "train", "sft": "train",
    "dataset": "data", "datasets": "data", "lora": "peft", "adapter": "peft", "distributed": "parallel",
    "launcher": "parallel", "accelerate": "parallel", "evaluation": "eval", "out": "output",
}  # fmt: skip
# What the weight of a source is called elsewhere.
_WEIGHT = ("proportion", "probability", "prob", "ratio", "share", "fraction", "frac", "sampling_weight")
_REASONS: dict[str, tuple[str, str | None]] = {
    "warmup_ratio": ("a share is a train.warmup_steps below 1", "train.warmup_steps"),
    "fp16": ("mixed precision is bf16, which needs no loss scaling", "train.bf16"),
    "mixed_precision": ("mixed precision is train.bf16, true or false", "train.bf16"),
    "deepspeed": ("DeepSpeed is chosen by its ZeRO stage", "parallel.strategy"),
    "fsdp": ("FSDP is the strategy fsdp2 or fsdp2_hybrid", "parallel.strategy"),
    "load_in_8bit": ("frozen weights are quantised to 4 bits", "peft.load_in_4bit"),
    "assistant_only_loss": ("the loss is always on the responses only; leave it out", None),
    "completion_only_loss": ("the loss is always on the responses only; leave it out", None),
    "train_on_inputs": ("the loss is always on the responses only; leave it out", None),
    "weights": ("each source of data.mixture has its own weight", "data.mixture"),
    "probabilities": ("each source of data.mixture has its own weight", "data.mixture"),
    "interleave_probs": ("each source of data.mixture has its own weight", "data.mixture"),
    "push_to_hub": ("nothing is uploaded; leave it out", None),
}


def unknown_key(section: str, key: str) -> Unknown:
    """What to say of a key that its section does not have."""
    if key in _REASONS:
        why, meant = _REASONS[key]
        return Unknown(f"no such key: {why}{_did_you_mean(meant)}", meant)
    meant = _NEW_NAMES.get(f"{section}.{key}") or _NEW_NAMES.get(key)
    if meant:
        return Unknown(f"no such key{_did_you_mean(meant)}", meant)
    if home := _home_of(key):
        return Unknown(f"no such key here; it belongs to {home}", home)
    own = list(SECTIONS[section].model_fields)
    if near := near_name(key, own):
        return Unknown(f"no such key{_did_you_mean(f'{section}.{near}')}", f"{section}.{near}")
    elsewhere = {name: other for other, kind in SECTIONS.items() for name in kind.model_fields}
    if near := near_name(key, list(elsewhere), 0.8):
        return Unknown(f"no such key{_did_you_mean(f'{elsewhere[near]}.{near}')}", f"{elsewhere[near]}.{near}")
    known = f"{section} has {', '.join(own)}" if len(own) < 12 else "`sft-dist schema` prints all keys"
    return Unknown(f"no such key; {known}", None)


def unknown_source_key(source: str, key: str) -> Unknown:
    """What to say of a key that a source of a mixture does not have; `source` is `data.mixture.NAME`."""
    own = list(MixtureSource.model_fields)
    data, _, renamed = (_NEW_NAMES.get(f"data.{key}") or _NEW_NAMES.get(key) or "").partition(".")
    near = "weight" if key in _WEIGHT else renamed if data == "data" and renamed in own else None
    if near is None and (home := _home_of(key)):
        return Unknown(f"no such key of a source; it belongs to {home}, for all sources", None)
    if near := near or near_name(key, own):
        return Unknown(f"no such key{_did_you_mean(f'{source}.{near}')}", f"{source}.{near}")
    return Unknown(f"no such key; a source has {', '.join(own)}", None)


def unknown_section(name: str) -> Unknown:
    """What to say of a name at the top of a recipe that is no section."""
    names = list(Recipe.model_fields)
    section, _, key = name.partition(".")
    if section in SECTIONS:
        return Unknown(f"no such section; write {key} under `{section}:`", name)
    near = _NEW_SECTIONS.get(name) or near_name(name, names, 0.7)
    if near:
        return Unknown(f"no such section{_did_you_mean(near)}", near)
    if home := _home_of(name):
        return Unknown(f"no such section; it belongs to {home}", home)
    if name in _REASONS:
        why, meant = _REASONS[name]
        return Unknown(f"no such section: {why}{_did_you_mean(meant)}", meant)
    if meant := _NEW_NAMES.get(name):
        return Unknown(f"no such section{_did_you_mean(meant)}", meant)
    return Unknown(f"no such section; a recipe has {', '.join(names)}", None)


def near_name(name: str, names: list[str], cutoff: float = 0.6) -> str | None:
    """The closest of some names, whatever the case of its letters."""
    by_lower = {n.lower(): n for n in names}
    found = difflib.get_close_matches(name.lower(), by_lower, n=1, cutoff=cutoff)
    return by_lower[found[0]] if found else None


def _home_of(key: str) -> str | None:
    return next((f"{name}.{key}" for name, kind in SECTIONS.items() if key in kind.model_fields), None)


def _did_you_mean(meant: str | None) -> str:
    return f", did you mean {meant}" if meant else ""
