"""The recipe as one typed tree. Every setting has one owner, one name and one description here.

``train`` keeps the names of TRL's ``SFTConfig``, ``model``, ``peft`` and ``data`` those of TRL's
``ModelConfig`` and ``ScriptArguments``, so that TRL's documentation still applies. Reading a file into
this tree, with the line numbers in its messages, is the work of :mod:`sft_dist.recipe`.
This module is free of torch.
"""

from __future__ import annotations

import os.path
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BeforeValidator,
    ConfigDict,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
)

from sft_dist.config_base import NAMED, Location, Name, Section, Seed, SourceName
from sft_dist.config_stages import DPOSection, PPOSection, RewardSection

TRACKERS = ("wandb", "tensorboard")


def trackers(value: Any) -> Any:
    """`none` and `all` as the lists that they stand for, and one bare name as a list of it."""
    words = {"none": [], "all": list(TRACKERS)}
    if isinstance(value, str):
        return words.get(value, [value])
    return [] if value == ["none"] else list(TRACKERS) if value == ["all"] else value


def _whole(value: float) -> float:
    return int(value) if value >= 1 and value == int(value) else value


RecordFormat = Literal[
    "auto", "conversations", "messages", "prompt_completion", "instruction", "text", "preference", "prompt"
]
Strategy = Literal[
    "auto", "single", "ddp", "zero1", "zero2", "zero2_offload", "zero3", "zero3_offload", "zero3_hpz",
    "fsdp2", "fsdp2_hybrid",
]  # fmt: skip
Trackers = Annotated[
    list[Literal["wandb", "tensorboard"]],
    AfterValidator(lambda names: list(dict.fromkeys(names))),
    BeforeValidator(trackers, json_schema_input_type=list[Literal["wandb", "tensorboard"]]
                    | Literal["none", "all", "wandb", "tensorboard"]),
]  # fmt: skip


class ModelSection(Section):
    """Which model is trained and how it is loaded."""

    model_name_or_path: Location = Field(examples=["facebook/opt-1.3b"])
    """Hub id, local folder, or a built-in name (`smollm2-135m-instruct`)."""
    model_revision: Name = "main"
    """Branch, tag or commit of a hub model."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Precision the weights are kept in. float32 with `train.bf16` is mixed precision; bfloat16 halves the
    memory of frozen weights under LoRA."""
    attn_implementation: Literal["eager", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention"] | None = (
        None
    )
    """Attention kernel; unset leaves the choice to transformers (sdpa where the model has it)."""
    trust_remote_code: bool = False
    """Run Python code that a model repository ships. Off: a model that needs it is refused."""
    allow_pickle_weights: bool = False
    """Accept old `.bin` weights where a model has no safetensors; they are read with `weights_only`."""


class MixtureSource(Section):
    """One source of a mixture: where its records come from, their format, and how much of it is trained on."""

    dataset_name: Location = Field(examples=["python-docs"])
    """Hub id, file, folder or glob (JSON, JSONL, Parquet, CSV), or the built-in `python-docs`, `python-docs-pairs`."""
    dataset_config: str | None = None
    """Configuration name of a hub data set."""
    dataset_revision: str | None = None
    """Branch, tag or commit of a hub data set."""
    dataset_train_split: Name = "train"
    """Split that is trained on."""
    format: RecordFormat = "auto"
    """Shape of a record; `auto` finds it by the columns."""
    formatting: str | None = None
    """`package.module:function` that turns a raw record into one of the formats."""
    weight: PositiveFloat | None = None
    """Share of the trained documents, relative to the other weights. Unset: the number of documents of the source."""


class DataSection(Section):
    """Which records are trained on, their format, and how turns become text."""

    model_config = ConfigDict(json_schema_extra={"anyOf": [{"required": ["dataset_name"]}, {"required": ["mixture"]}]})

    # Of type str though a mixture has none: a source is opened by its own section, which has its name (`sources_of`).
    dataset_name: Annotated[str, AfterValidator(os.path.expanduser)] = Field(default="", examples=["python-docs"])
    """Hub id, file, folder or glob (JSON, JSONL, Parquet, CSV), or the built-in `python-docs` or
    `python-docs-pairs`. Required, unless `data.mixture` names several."""
    dataset_config: str | None = None
    """Configuration name of a hub data set."""
    dataset_revision: str | None = None
    """Branch, tag or commit of a hub data set."""
    dataset_train_split: Name = "train"
    """Split that is trained on."""
    mixture: Annotated[dict[SourceName, MixtureSource], NAMED] | None = None
    """Several sources in place of `data.dataset_name`, each under a name of yours and with keys of its own."""
    mixture_temperature: PositiveFloat = 1.0
    """Shares are in proportion to weight ** (1 / temperature): 1 keeps the weights, a high one makes shares equal."""
    stopping_strategy: Literal["first_exhausted", "all_exhausted"] = "first_exhausted"
    """An epoch of a mixture ends before the first source would begin again, or when each was read through once."""
    dataset_test_split: Location | None = None
    """Split (or, for local data, file or folder) that is held out for evaluation. With `data.mixture` a local path."""
    test_split_size: Annotated[NonNegativeFloat | PositiveInt, AfterValidator(_whole)] = 0.0
    """Where there is no test split: the share (below 1) or the number of records to hold out of the training data; of
    each source of a mixture in proportion to its size."""
    format: RecordFormat = "auto"
    """Shape of a record; `auto` finds it by the columns."""
    formatting: str | None = None
    """`package.module:function` that turns a raw record into one of the formats."""
    chat_template_path: Location | None = None
    """A Jinja file that replaces the tokenizer's chat template."""
    instruction_template: str | None = None
    """Text that opens a user's turn where the model has no chat template (default `### Instruction:\\n`)."""
    response_template: str | None = None
    """Text that opens an assistant's turn where the model has no chat template (default `### Response:\\n`)."""
    packing: bool | Literal["required"] = False
    """Rows of `train.max_length` made of several whole documents; under `stage: ppo`, of responses with their prompts,
    as long as the longest of a micro-batch. Proven exact on the loaded model before the first step; where it is not,
    rows stay unpacked and the run says so, or stops with `required`."""
    streaming: bool = False
    """Prepare the data block by block while training, for data larger than the disk; needs `train.max_steps`."""
    shuffle_buffer: PositiveInt = 16384
    """Documents of a block, which are shuffled and packed together, under `data.streaming`."""
    truncation_mode: Literal["keep_start", "keep_end", "drop", "split"] = "keep_start"
    """What becomes of a row longer than `train.max_length`: its start or its end is kept, it is dropped, or, for plain
    text, split into several rows; a conversation that would have to be split is refused."""
    min_response_length: PositiveInt | None = None
    """Drop conversations of which fewer tokens are trained, after `truncation_mode`."""
    max_response_length: PositiveInt | None = None
    """Drop conversations of which more tokens are trained, after `truncation_mode`."""
    deduplicate: bool = False
    """Drop conversations that are equal to an earlier one."""
    dataset_num_proc: PositiveInt | None = None
    """Processes that prepare the data; unset: one per core, at most 32. The rows do not depend on it."""
    max_bad_records: NonNegativeInt = 0
    """Records with faults that are skipped, counted and named before the run refuses the data."""
    max_train_records: PositiveInt | None = None
    """Train on the first so many records only (of each source of a mixture)."""
    max_eval_records: PositiveInt | None = None
    """Evaluate on the first so many held-out records only."""


class TrainSection(Section):
    """Optimisation, under the names of TRL's `SFTConfig`."""

    max_length: Annotated[int, Field(ge=2)] | None = 1024
    """Longest row in tokens; longer ones: see `data.truncation_mode`. Unset: the model's own limit."""
    per_device_train_batch_size: PositiveInt = 8
    """Rows per process and micro-batch."""
    per_device_eval_batch_size: PositiveInt = 8
    """Rows per process and evaluation batch."""
    gradient_accumulation_steps: PositiveInt = 1
    """Micro-batches per optimizer step; set `parallel.global_batch_size` to have it derived."""
    num_train_epochs: PositiveFloat = 3.0
    """Passes over the training rows."""
    max_steps: int = Field(default=-1, ge=-1)
    """Optimizer steps; when positive it overrides `num_train_epochs`."""
    learning_rate: PositiveFloat = 2e-5
    """Peak learning rate."""
    lr_scheduler_type: Literal[
        "linear", "cosine", "cosine_with_min_lr", "constant", "constant_with_warmup", "polynomial", "inverse_sqrt"
    ] = "linear"
    """Shape of the learning rate after the warm-up."""
    lr_scheduler_kwargs: dict[str, Any] | None = None
    """Further arguments of the scheduler, such as `min_lr`."""
    warmup_steps: NonNegativeFloat = 0.0
    """Warm-up in optimizer steps, or as a share of all steps when below 1."""
    optim: Literal["adamw_torch", "adamw_torch_fused", "adafactor", "sgd"] = "adamw_torch"
    """Optimizer."""
    weight_decay: NonNegativeFloat = 0.0
    """Decoupled weight decay; not applied to biases and norms."""
    adam_beta1: float = Field(default=0.9, ge=0, lt=1)
    """First Adam coefficient."""
    adam_beta2: float = Field(default=0.999, ge=0, lt=1)
    """Second Adam coefficient."""
    adam_epsilon: PositiveFloat = 1e-8
    """Adam's epsilon."""
    max_grad_norm: NonNegativeFloat = 1.0
    """Gradient clipping threshold (global L2 norm); 0 switches clipping off."""
    bf16: bool | None = None
    """bf16 autocast. Unset: on where the hardware has bf16 instructions."""
    gradient_checkpointing: bool = True
    """Recompute activations in the backward pass instead of keeping them."""
    gradient_checkpointing_kwargs: dict[str, Any] | None = None
    """Arguments of `torch.utils.checkpoint`; non-reentrant unless told otherwise."""
    torch_compile: bool = False
    """Compile the model with `torch.compile`: faster steps on a GPU, after a first one that takes minutes."""
    seed: Seed = 42
    """Seed of initialisation, dropout and, unless `data_seed` is set, of the order of the data."""
    data_seed: Seed | None = None
    """Seed of the order of the data."""
    full_determinism: bool = False
    """Deterministic kernels (slower): a second run gives the same bits."""
    logging_steps: PositiveInt = 10
    """Optimizer steps between log lines."""
    logging_first_step: bool = True
    """Log the first step too."""
    eval_strategy: Literal["no", "steps", "epoch"] = "no"
    """When the held-out loss is measured during training."""
    eval_steps: PositiveInt | None = None
    """Optimizer steps between evaluations; unset: `logging_steps`."""
    save_strategy: Literal["no", "steps", "epoch"] = "no"
    """When checkpoints are written during training; the final model is always written."""
    save_steps: PositiveInt = 500
    """Optimizer steps between checkpoints."""
    dataloader_num_workers: NonNegativeInt = 0
    """Processes that collate batches, per rank."""
    report_to: Trackers = Field(default=["wandb", "tensorboard"])
    """Trackers; `none` (or `[]`) switches them off, `all` takes both. W&B is online with a key, else offline."""
    run_name: str | None = None
    """Name of the run in the trackers; unset: the name of the output folder."""


class PeftSection(Section):
    """Parameter-efficient fine-tuning, under the names of TRL's `ModelConfig`."""

    use_peft: bool = False
    """Train a LoRA adapter instead of all weights."""
    lora_r: PositiveInt = 16
    """Rank of the adapter."""
    lora_alpha: PositiveInt = 32
    """Scale of the adapter; the update is multiplied by alpha / r."""
    lora_dropout: float = Field(default=0.05, ge=0, lt=1)
    """Dropout on the adapter's input."""
    lora_target_modules: list[str] | str = "all-linear"
    """Modules that get an adapter: names, one regular expression, or `all-linear`."""
    lora_modules_to_save: list[str] | None = None
    """Modules trained and saved whole beside the adapter."""
    use_rslora: bool = False
    """Scale by alpha / sqrt(r) instead of alpha / r."""
    use_dora: bool = False
    """Weight-decomposed LoRA."""
    load_in_4bit: bool = False
    """QLoRA: the frozen weights are kept in 4 bits by bitsandbytes."""
    bnb_4bit_quant_type: Literal["nf4", "fp4"] = "nf4"
    """The 4-bit numbers: NF4 suits the distribution of weights better."""
    use_bnb_nested_quant: bool = True
    """Quantise the scales of the blocks as well, which saves 0.4 bits a weight."""


class ParallelSection(Section):
    """How the work is spread over processes. It never changes the result."""

    strategy: Strategy = "auto"
    """Each names a file in `ds_configs/`. `auto`: `single` on one process; on several the first of `ddp`, `zero2`,
    `fsdp2` and `zero3_offload` whose model states fit into the GPUs."""
    offload_nvme_path: Location | None = None
    """Folder on a fast local disk that takes what `zero3_offload` moves out of the GPU; unset: memory."""
    processes: PositiveInt | None = None
    """Processes on this machine; unset: one per GPU, or one without a GPU."""
    global_batch_size: PositiveInt | None = None
    """Rows per optimizer step over all processes; the accumulation steps follow from it."""


class CheckpointSection(Section):
    """Checkpoints, written when `train.save_strategy` says: what is kept of them, and stopping so that a run can go on.

    Names that TRL has are TRL's.
    """

    keep: PositiveInt | None = 3
    """Newest checkpoints that are kept; unset keeps all. An older one goes when a newer one is complete."""
    keep_every: PositiveInt | None = None
    """Keep for good those whose step is a multiple of this, too."""
    metric_for_best_model: Name | None = Field(default=None, examples=["eval_loss"])
    """Keep the one of the best held-out value, too: a name from `metrics.jsonl`, such as `eval_loss`."""
    greater_is_better: bool = False
    """Whether the best value of `metric_for_best_model` is the largest."""
    asynchronous: bool = True
    """Write while the training goes on, from a copy in memory; off: without the copy, and the training waits."""
    max_failures: PositiveInt = 3
    """Checkpoints in a row that may fail to be written (disk full, file system away) before the run stops."""
    signals: list[Literal["SIGTERM", "SIGINT", "SIGUSR1", "SIGUSR2"]] = Field(
        default=["SIGTERM", "SIGINT", "SIGUSR1", "SIGUSR2"]
    )
    """Signals at which a run saves and stops, with exit code 75; of the others the system's meaning is left."""
    grace: PositiveFloat = 60.0
    """Seconds from such a signal to the end of the run."""


class GuardSection(Section):
    """What is done when a training goes wrong: numbers that are none, sudden losses, a process that hangs."""

    nonfinite: Literal["stop", "skip", "rollback"] = "stop"
    """NaN or infinity in loss or gradients: stop, leave out the update, or go back to the weights of the last
    checkpoint and on with the data behind."""
    spike_factor: Annotated[float, Field(gt=1)] | None = None
    """A step's loss above so many times the median of the steps before is a spike; unset: none is."""
    spike_window: Annotated[int, Field(ge=2)] = 64
    """Steps before, of which the median is taken; no step is a spike before so many are done."""
    on_spike: Literal["stop", "skip", "rollback"] = "skip"
    """What is done at a spike, as in `nonfinite`."""
    max_events: PositiveInt = 10
    """Such steps after which the run stops in any case."""
    hang_factor: PositiveFloat | None = 30.0
    """A step that takes so many times the median step is a hang: stacks are written and the run stops, so that it can
    go on; unset: never."""
    hang_seconds: PositiveFloat = 300.0
    """No step that is shorter than this is a hang."""


class OutputSection(Section):
    """Where the run is kept."""

    output_dir: Location = Field(examples=["runs/my-run"])
    """Folder of the run: resolved recipe, logs, checkpoints, `model/`, evaluation."""
    overwrite: bool = False
    """Remove what an earlier run left in `output_dir`."""
    resume: bool = False
    """Go on from the newest sound checkpoint in `output_dir`; from the beginning where there is none."""


class EvalSection(Section):
    """Evaluation before and after training."""

    enabled: bool = True
    """Measure before and after; off saves the time."""
    num_prompts: NonNegativeInt = 8
    """Held-out prompts that are answered before and after."""
    max_new_tokens: PositiveInt = 128
    """Longest answer in tokens."""
    temperature: NonNegativeFloat = 0.0
    """Sampling temperature of the answers; 0 is greedy."""


class Recipe(Section):
    """A whole run: one recipe file plus the overrides of the command line."""

    stage: Literal["sft", "reward", "dpo", "ppo"] = "sft"
    """Which training is done."""
    model: ModelSection
    data: DataSection
    train: TrainSection = Field(default_factory=TrainSection)
    reward: RewardSection = Field(default_factory=RewardSection)
    dpo: DPOSection = Field(default_factory=DPOSection)
    ppo: PPOSection = Field(default_factory=PPOSection)
    peft: PeftSection = Field(default_factory=PeftSection)
    parallel: ParallelSection = Field(default_factory=ParallelSection)
    checkpoint: CheckpointSection = Field(default_factory=CheckpointSection)
    guard: GuardSection = Field(default_factory=GuardSection)
    output: OutputSection
    eval: EvalSection = Field(default_factory=EvalSection)
