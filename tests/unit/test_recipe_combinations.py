"""Settings that cannot stand together are refused at the line of the key they name, and no others are."""

from __future__ import annotations

from typing import Any

import pytest

from sft_dist.combinations import combinations
from sft_dist.rules import RULES
from tests.recipe_texts import MINIMAL, faults, load, section, train


@pytest.mark.parametrize(
    ("where", "text", "key", "said"),
    [
        ("output", "overwrite: true\nresume: true", "output.overwrite", "cannot stand with output.resume"),
        (
            "checkpoint",
            "metric_for_best_model: eval_loss",
            "checkpoint.metric_for_best_model",
            "eval_loss is never meas",
        ),
        ("guard", "spike_window: 9", "guard.spike_window", "has no effect without guard.spike_factor"),
        ("guard", "on_spike: stop", "guard.on_spike", "has no effect without guard.spike_factor"),
        ("guard", "nonfinite: rollback", "guard.nonfinite", "rollback goes back to a checkpoint, and none is written"),
        (
            "data",
            "response_template: A\nchat_template_path: x",
            "data.response_template",
            "cannot stand with data.chat",
        ),
        ("data", "instruction_template: A\nchat_template_path: x", "data.instruction_template", "cannot stand with"),
        ("data", "test_split_size: 5\ndataset_test_split: test", "data.test_split_size", "cannot stand with data.data"),
        ("data", "test_split_size: 1.5", "data.test_split_size", "1.5 is neither a share below 1 nor a whole number"),
        ("data", "dataset_test_split: train", "data.dataset_test_split", "train is what is trained on"),
        ("data", "dataset_test_split: train.jsonl", "data.dataset_test_split", "train.jsonl is what is trained on"),
        ("data", "min_response_length: 9\nmax_response_length: 8", "data.min_response_length", "9 is above data.max_r"),
        ("data", "shuffle_buffer: 9", "data.shuffle_buffer", "has no effect while data.streaming is false"),
        ("data", "formatting: my.module", "data.formatting", "expected package.module:function, got 'my.module'"),
        ("data", "formatting: my.mod:f()", "data.formatting", "expected package.module:function"),
        ("train", "eval_strategy: steps", "train.eval_strategy", "steps needs held-out data; set data.dataset_test"),
        ("train", "eval_strategy: epoch", "train.eval_strategy", "epoch needs held-out data"),
        ("train", "max_steps: 0", "train.max_steps", "0 trains nothing"),
        ("train", "warmup_steps: 1.5", "train.warmup_steps", "1.5 is neither a share below 1 nor a whole number"),
        (
            "train",
            "lr_scheduler_type: cosine_with_min_lr",
            "train.lr_scheduler_type",
            "cosine_with_min_lr needs min_lr",
        ),
        (
            "train",
            "lr_scheduler_kwargs: {min_lr: 1e-6, min_lr_rate: 0.1}\nlr_scheduler_type: cosine_with_min_lr",
            "train.lr_scheduler_type",
            "cosine_with_min_lr needs min_lr or min_lr_rate (one of them)",
        ),
        (
            "train",
            "lr_scheduler_kwargs:\n  min_lr: 1e-6",
            "train.lr_scheduler_kwargs.min_lr",
            "the scheduler linear takes no arguments",
        ),
        (
            "train",
            "lr_scheduler_type: polynomial\nlr_scheduler_kwargs:\n  power: high",
            "train.lr_scheduler_kwargs.power",
            "expected a number, got 'high'",
        ),
        (
            "train",
            "lr_scheduler_type: polynomial\nlearning_rate: 1e-8",
            "train.learning_rate",
            "polynomial needs more than lr_end (1e-07), got 1e-08",
        ),
        (
            "train",
            "gradient_checkpointing: false\ngradient_checkpointing_kwargs: {use_reentrant: true}",
            "train.gradient_checkpointing_kwargs",
            "has no effect while train.gradient_checkpointing is false",
        ),
        (
            "parallel",
            "global_batch_size: 4",
            "parallel.global_batch_size",
            "4 rows do not divide over micro-batches of 8",
        ),
        (
            "parallel",
            "processes: 2\nglobal_batch_size: 24",
            "parallel.global_batch_size",
            "24 rows do not divide over 2 processes of 8 rows; make it a multiple of 16",
        ),
        ("parallel", "processes: 2\nstrategy: single", "parallel.strategy", "single is one process"),
        ("peft", "lora_r: 8", "peft.lora_r", "has no effect while peft.use_peft is false"),
        ("peft", "use_dora: true", "peft.use_dora", "has no effect while peft.use_peft is false"),
        ("peft", "use_peft: true\nlora_target_modules: []", "peft.lora_target_modules", "names no module"),
        ("peft", "use_peft: true\nlora_target_modules: '*proj'", "peft.lora_target_modules", "'*proj' is no regular"),
    ],
)
def test_what_cannot_stand_together_is_refused_at_the_line_of_its_key(
    where: str, text: str, key: str, said: str
) -> None:
    written = section(where, text)
    (found,) = faults(written)
    name = key.rpartition(".")[2]
    line = next(n for n, t in enumerate(written.splitlines(), 1) if t.strip().startswith(f"{name}:"))
    assert found.startswith(f"r.yaml:{line}: {key}: {said}"), found


def test_a_stream_needs_its_steps_told_and_refuses_what_needs_all_records() -> None:
    assert faults(section("data", "streaming: true")) == [
        "r.yaml:4: data.streaming: a stream has no known length; set train.max_steps above 0"
    ]
    text = section("data", "streaming: true\ntest_split_size: 5\nmax_train_records: 5\ndeduplicate: true")
    assert [line.split(": ", 1)[1] for line in faults(text + "train: {max_steps: 5}\n")] == [
        "data.test_split_size: cannot stand with data.streaming; name what is held out in data.dataset_test_split",
        "data.max_train_records: cannot stand with data.streaming; leave it out; train.max_steps ends the training",
        "data.deduplicate: cannot stand with data.streaming; leave it out; an earlier record may be long gone",
    ]


def test_accumulation_steps_and_a_global_batch_are_two_answers_to_one_question() -> None:
    text = train("gradient_accumulation_steps: 2") + "parallel: {global_batch_size: 16}\n"
    assert faults(text) == [
        "r.yaml:8: train.gradient_accumulation_steps: follows from parallel.global_batch_size; keep one of the two"
    ]


def test_steps_that_are_kept_are_saved() -> None:
    text = train("save_strategy: steps") + "checkpoint: {keep_every: 700}\n"
    assert faults(text) == [
        "r.yaml:9: checkpoint.keep_every: 700 is no multiple of train.save_steps (500); make it one"
    ]
    assert load(text, "train.save_steps=350").checkpoint.keep_every == 700


def test_states_on_a_disk_have_no_checkpoints() -> None:
    text = train("save_strategy: epoch") + "parallel: {strategy: zero3_offload, offload_nvme_path: /d}\n"
    (found,) = faults(text)
    assert found.startswith("r.yaml:8: train.save_strategy: no checkpoints are written of states that lie on a disk")


def test_flash_attention_needs_bf16() -> None:
    text = section("model", "attn_implementation: flash_attention_2") + "train: {bf16: false}\n"
    assert faults(text)[0].startswith("r.yaml:2: model.attn_implementation: flash_attention_2 computes in bf16 only")
    assert load(text, "train.bf16=null").model.attn_implementation == "flash_attention_2"


@pytest.mark.parametrize("strategy", ["zero1", "zero2", "zero3_offload", "fsdp2", "fsdp2_hybrid"])
def test_a_compiled_model_is_trained_whole(strategy: str) -> None:
    text = train("torch_compile: true") + f"parallel: {{strategy: {strategy}}}\n"
    (found,) = faults(text)
    assert found.startswith(f"r.yaml:8: train.torch_compile: cannot stand with {strategy} so far; leave it out")
    assert load(text, "parallel.strategy=ddp").train.torch_compile


@pytest.mark.parametrize(
    ("where", "text"),
    [
        ("data", "dataset_test_split: test.jsonl\nmax_eval_records: 5"),
        ("data", "formatting: my_hooks.data:to_messages"),
        ("data", "response_template: '### Response:'"),
        ("train", "save_strategy: no\nsave_steps: 2"),
        ("train", "full_determinism: true"),
        ("train", "lr_scheduler_type: cosine_with_min_lr\nlr_scheduler_kwargs: {min_lr_rate: 0.1}"),
        ("parallel", "strategy: ddp\nprocesses: 1"),
        ("parallel", "strategy: zero2\nprocesses: 4\nglobal_batch_size: 64"),
        ("output", "resume: true"),
        ("peft", "use_peft: true\nlora_r: 8"),
        ("peft", "lora_r: 16"),
    ],
)
def test_what_can_stand_together_is_not_refused(where: str, text: str) -> None:
    assert combinations(load(section(where, text))) == []


def test_held_out_data_is_any_of_three() -> None:
    steps = train("eval_strategy: steps")
    for override in ("data.dataset_name=python-docs", "data.test_split_size=4", "data.dataset_test_split=test"):
        assert load(steps, override).train.eval_strategy == "steps"


def test_no_combination_is_judged_by_a_key_that_is_itself_at_fault() -> None:
    text = train("eval_strategy: steps\ntest_split: 0.1")
    assert [line for line in faults(text) if "eval_strategy" in line] == []
    text = train("eval_strategy: steps") + "parallel: {global_batch_size: 9}\n"
    found = faults(text.replace("data:\n", "data:\n  test_split_size: many\n"))
    assert [line.split(": ")[1] for line in found] == ["data.test_split_size", "parallel.global_batch_size"]


class Watched:
    """A recipe that notes which of its keys are read."""

    def __init__(self, part: Any, name: str, seen: set[str]) -> None:
        self._part, self._name, self._seen = part, name, seen

    def __getattr__(self, key: str) -> Any:
        below, dotted = getattr(self._part, key), f"{self._name}.{key}".lstrip(".")
        if "." not in dotted and dotted != "stage":
            return Watched(below, dotted, self._seen)
        self._seen.add(dotted)
        return below


def test_every_rule_declares_the_keys_that_it_reads() -> None:
    recipes: list[Any] = [
        load(section("peft", "use_peft: true\nlora_target_modules: a") + "parallel: {global_batch_size: 8}\n"),
        load(MINIMAL, "data.test_split_size=4", "train.eval_strategy=steps", "train.lr_scheduler_type=polynomial"),
        load(MINIMAL, "data.chat_template_path=x", "parallel.strategy=single", "data.dataset_test_split=y"),
        load(MINIMAL, "model.attn_implementation=flash_attention_2", "train.gradient_checkpointing_kwargs={a: 1}"),
    ]
    for keys, rule in RULES:
        seen: set[str] = set()
        for recipe in recipes:
            list(rule(Watched(recipe, "", seen)))  # type: ignore[arg-type]
        assert seen, rule.__name__
        assert seen <= set(keys), rule.__name__
