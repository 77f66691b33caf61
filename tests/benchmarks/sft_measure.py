"""One measurement of the benchmark of training, in a process of its own (see tests.benchmarks.gpu_sft).

python -m tests.benchmarks.sft_measure CASE WAY STEPS FILE
"""

from __future__ import annotations

import importlib.util
import json
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import trl
from transformers import AutoModelForCausalLM, LlamaConfig, OPTConfig, PrinterCallback, TrainerCallback

from sft_dist import adapters, builtin_models
from sft_dist.attention import text_config
from sft_dist.backend import Backend
from sft_dist.config import Recipe
from sft_dist.data.arrangement import Arrangement, document_lengths
from sft_dist.data.prepare import prepare
from sft_dist.data.template import load_template
from sft_dist.data.tokenizer import load_tokenizer
from sft_dist.hardware import peak_flops
from sft_dist.metrics import flops_per_token, peak_memory_bytes
from sft_dist.models import load_model
from sft_dist.packing_choice import packed_way
from sft_dist.rundir import RunDir
from sft_dist.trainers.sft import SFTTrainer, sft_config
from sft_dist.world import World
from tests.benchmarks import corpus
from tests.benchmarks.sft_cells import Case, Counts, Way, case_of, counts_of, figures, seen_length

# The sizes of facebook/opt-1.3b and of Llama 2 7B, by their published config.json.
SHAPES = {
    "opt-1.3b": lambda: OPTConfig(hidden_size=2048, word_embed_proj_dim=2048, ffn_dim=8192, num_hidden_layers=24,
                                  num_attention_heads=32, vocab_size=50272, max_position_embeddings=2048),
    "llama-7b": lambda: LlamaConfig(hidden_size=4096, intermediate_size=11008, num_hidden_layers=32,
                                    num_attention_heads=32, num_key_value_heads=32, vocab_size=32000,
                                    max_position_embeddings=4096, rms_norm_eps=1e-5),
    "tiny": lambda: OPTConfig(hidden_size=64, word_embed_proj_dim=64, ffn_dim=128, num_hidden_layers=2,
                              num_attention_heads=2, vocab_size=512, max_position_embeddings=128),
}  # fmt: skip
_CORPUS_TOKENS = 400  # at least, of a conversation of tests.benchmarks.corpus, on average


def kernel(way: Way, cuda: bool) -> str:
    """Attention implementation: the best there is for such rows.

    Padded rows have it from transformers' default, as TRL's script leaves it. Packed ones need a kernel that leaves
    out the blocks between documents.
    """
    if way.packed and importlib.util.find_spec("flash_attn") is not None and cuda:
        return "flash_attention_2"
    return "flex_attention" if way.packed and cuda else "sdpa"


def recipe_of(case: Case, way: Way, data: str, folder: Path) -> Recipe:
    return Recipe.model_validate(
        {
            "model": {"model_name_or_path": builtin_models.NAME, "dtype": case.dtype,
                      "attn_implementation": kernel(way, torch.cuda.is_available())},
            "data": {"dataset_name": data, "packing": "required" if way.packed else False},
            "train": {"max_length": case.length, "per_device_train_batch_size": case.rows,
                      "gradient_accumulation_steps": case.accumulation, "max_steps": case.uncounted + case.steps,
                      "optim": case.optim, "bf16": case.bf16, "gradient_checkpointing": case.checkpointing,
                      "report_to": []} | ({"torch_compile": True} if way is Way.COMPILED else {}),
            "peft": {"use_peft": case.lora},
            "output": {"output_dir": str(folder)},
        }
    )  # fmt: skip


def model_of(case: Case, recipe: Recipe, path: str, tokenizer: Any) -> Any:
    """The built-in model, or a shape with random weights, made where it is trained."""
    if case.model not in SHAPES:
        return load_model(path, recipe.model, tokenizer)
    torch.manual_seed(0)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = AutoModelForCausalLM.from_config(
            SHAPES[case.model](),
            dtype=getattr(torch, case.dtype),
            attn_implementation=recipe.model.attn_implementation,
        )
    model.config.pad_token_id = tokenizer.pad_token_id
    return model


def rows_of(case: Case, recipe: Recipe, tokenizer: Any, vocabulary: int) -> Any:
    """Prepared rows, the same for all ways. Ids beyond a vocabulary are folded into it: speed does not read them."""
    train, _ = prepare(recipe, load_template(tokenizer, recipe.data), case.length)
    rows = train.rows
    if len(tokenizer) <= vocabulary:
        return rows
    return rows.map(lambda row: {"input_ids": [int(token) % vocabulary for token in row["input_ids"]]})


def our_trainer(recipe: Recipe, model: Any, rows: Any, tokenizer: Any) -> Any:
    """This project's trainer as a worker makes it, on one process."""
    backend, run = Backend(), RunDir(Path(recipe.output.output_dir))
    args = sft_config(recipe, run, World(0, 1, 0, 1), bool(recipe.train.bf16), False, backend, model.config.hidden_size)
    model = adapters.wrap(model, recipe.peft, backend)
    trainer = SFTTrainer(model, args, rows, None, tokenizer, backend)
    way = packed_way(trainer.model, recipe.data.packing, args.bf16, print)
    capacity = None if way is None else recipe.train.max_length
    trainer.arrange(Arrangement(document_lengths(rows), capacity, seed=0), way)
    return trainer


def trl_trainer(recipe: Recipe, model: Any, rows: Any, tokenizer: Any) -> Any:
    """What a script of TRL's would make, with the same settings on the same tokens and labels."""
    train = recipe.train
    args = trl.SFTConfig(
        output_dir=recipe.output.output_dir,
        max_length=train.max_length,
        packing=bool(recipe.data.packing),
        per_device_train_batch_size=train.per_device_train_batch_size,
        gradient_accumulation_steps=train.gradient_accumulation_steps,
        max_steps=train.max_steps,
        learning_rate=train.learning_rate,
        optim=train.optim,
        bf16=train.bf16,
        gradient_checkpointing=train.gradient_checkpointing,
        use_cpu=not torch.cuda.is_available(),
        logging_steps=train.logging_steps,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    return trl.SFTTrainer(
        model=model,
        args=args,
        train_dataset=rows.select_columns(["input_ids", "labels"]),
        processing_class=tokenizer,
        peft_config=adapters.lora_config(recipe.peft),
    )


class Counting:
    """A collator that counts what passes: a micro-batch at a time, in the order in which they are trained on."""

    def __init__(self, collator: Any) -> None:
        self.collator = collator
        self.counts: list[Counts] = []

    def __call__(self, rows: Sequence[Any]) -> Any:
        batch = self.collator(rows)
        # This project's rows are lists of documents, TRL's padded rows are documents. A packed row of TRL's is one
        # whole, with the lengths of its documents.
        documents = [one for row in rows for one in (row if isinstance(row, list) else _documents(row))]
        self.counts.append(counts_of(documents, batch["input_ids"].numel()))
        return batch


def _documents(row: dict[str, Any]) -> list[dict[str, Any]]:
    found, end = [], 0
    for length in row.get("seq_lengths") or [len(row["input_ids"])]:
        start, end = end, end + length
        found.append({"input_ids": row["input_ids"][start:end], "labels": row["labels"][start:end]})
    return found


class Clock(TrainerCallback):
    """When each optimizer step ended, in seconds by the clock and of processor time.

    A GPU's peak memory is that of the steps on the clock; a processor's is that of the whole process.
    """

    def __init__(self, uncounted: int) -> None:
        self.uncounted = uncounted
        self.ends: list[float] = []
        self.cpu: list[float] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
            if state.global_step == self.uncounted:
                torch.cuda.reset_peak_memory_stats()
        self.ends.append(time.perf_counter())
        self.cpu.append(time.process_time())


def measure(case: Case, way: Way, folder: Path) -> dict[str, Any]:
    """Train, and return the attention that was used and the figures."""
    steps = case.uncounted + case.steps
    data = case.data
    if data == "corpus":
        wanted = steps * case.rows * case.accumulation * case.length // _CORPUS_TOKENS
        data = str(corpus.write(folder / "corpus.jsonl", corpus.conversations(wanted)))
    recipe = recipe_of(case, way, data, folder / "run")
    path = builtin_models.resolve(builtin_models.NAME)
    tokenizer = load_tokenizer(path, recipe.model)
    model = model_of(case, recipe, path, tokenizer)
    rows = rows_of(case, recipe, tokenizer, model.config.vocab_size)
    trainer = (our_trainer if way.ours else trl_trainer)(recipe, model, rows, tokenizer)
    trainer.remove_callback(PrinterCallback)
    trainer.data_collator = counting = Counting(trainer.data_collator)
    clock = Clock(case.uncounted)
    trainer.add_callback(clock)
    trainer.train()
    timed = counting.counts[case.uncounted * case.accumulation : steps * case.accumulation]
    counts = sum(timed, Counts())
    flops = flops_per_token(trainer.model, text_config(trainer.model.config), seen_length(counts))
    peak = peak_flops(torch.cuda.get_device_name()) if torch.cuda.is_available() else None
    seconds, cpu = (ends[-1] - ends[case.uncounted - 1] for ends in (clock.ends, clock.cpu))
    found = figures(counts, seconds, cpu, flops, peak, peak_memory_bytes())
    found["step_seconds"] = [after - before for before, after in zip(clock.ends, clock.ends[1:], strict=False)]
    return {"attention": recipe.model.attn_implementation, "figures": found}


def device() -> str:
    """The device in words."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"no GPU, {torch.get_num_threads()} thread(s)"


def main() -> None:
    name, way, steps, file = sys.argv[1:]
    case, cuda = case_of(name, int(steps)), torch.cuda.is_available()
    found: dict[str, Any] = {"device": device(), "attention": kernel(Way[way], cuda)}
    with tempfile.TemporaryDirectory() as folder:
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
        try:
            found |= measure(case, Way[way], Path(folder))
        except torch.OutOfMemoryError as error:
            found["fault"] = "out of memory"
            print(error, file=sys.stderr)
    Path(file).write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    main()
