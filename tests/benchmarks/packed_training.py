"""Training speed packed and padded: SmolLM2-135M on the built-in documentation, on this machine's processor or GPU.

    python -m tests.benchmarks.packed_training [--records 48] [--rounds 2]

prints the table of docs/benchmarks.md, on two cores in some ten minutes. The same documents are trained on in turn,
padded in random order, padded with rows of like length together (as this project does where it does not pack), and
packed, so that whatever else the machine does disturbs all of them alike.
"""

from __future__ import annotations

import argparse
import random
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from sft_dist import builtin_models
from sft_dist.backend import Backend
from sft_dist.config import Recipe
from sft_dist.data.arrangement import Arrangement, document_lengths
from sft_dist.data.collate import PackedCollator, PaddingCollator
from sft_dist.data.masking import IGNORE
from sft_dist.data.prepare import prepare
from sft_dist.data.template import load_template
from sft_dist.data.tokenizer import load_tokenizer
from sft_dist.models import load_model, use_bf16
from sft_dist.packing_choice import packed_way
from sft_dist.rundir import RunDir
from sft_dist.trainers.sft import SFTTrainer, sft_config
from sft_dist.world import World

Batch = dict[str, Any]


def recipe_of(records: int, length: int, folder: str) -> Recipe:
    return Recipe.model_validate(
        {
            "model": {"model_name_or_path": "smollm2-135m-instruct"},
            "data": {"dataset_name": "python-docs", "max_train_records": records, "packing": "required"},
            "train": {"max_length": length, "per_device_train_batch_size": 4, "gradient_checkpointing": False,
                      "report_to": []},
            "output": {"output_dir": folder},
        }
    )  # fmt: skip


def in_fours(rows: list[Any]) -> list[list[Any]]:
    return [rows[i : i + 4] for i in range(0, len(rows), 4)]


def batches_of(documents: list[Batch], packs: list[list[int]], pad: int) -> dict[str, list[Batch]]:
    """The micro-batches, of four rows each, of every way."""
    drawn = random.Random(0).sample(documents, len(documents))
    by_length = sorted(documents, key=lambda row: -len(row["input_ids"]))
    padded, packed = PaddingCollator(pad), PackedCollator(pad)
    return {
        "padded, random order": [padded(rows) for rows in in_fours(drawn)],
        "padded, like lengths together": [padded(rows) for rows in in_fours(by_length)],
        "packed": [packed([[documents[n] for n in pack] for pack in rows]) for rows in in_fours(packs)],
    }


def seconds(trainer: SFTTrainer, optimizer: torch.optim.Optimizer, batches: list[Batch]) -> float:
    """One optimizer step over all micro-batches."""
    trained = sum((batch["labels"] != IGNORE).sum() for batch in batches)
    began = time.perf_counter()
    for batch in batches:
        inputs = trainer._prepare_inputs(dict(batch))
        with trainer.compute_loss_context_manager():
            trainer.compute_loss(trainer.model, inputs, num_items_in_batch=trained).backward()
    optimizer.step()
    optimizer.zero_grad()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--records", type=int, default=48)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=2)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        recipe = recipe_of(options.records, options.length, folder)
        path = builtin_models.resolve(recipe.model.model_name_or_path)
        tokenizer = load_tokenizer(path, recipe.model)
        train, _ = prepare(recipe, load_template(tokenizer, recipe.data), options.length)
        bf16 = use_bf16(None)
        model, backend = load_model(path, recipe.model, tokenizer), Backend()
        hidden = model.config.hidden_size
        args = sft_config(recipe, RunDir(Path(folder)), World(0, 1, 0, 1), bf16, False, backend, hidden)
        trainer = SFTTrainer(model, args, train.rows, None, tokenizer, backend)
        way = packed_way(trainer.model, recipe.data.packing, bf16, print)
        arrangement = Arrangement(document_lengths(train.rows), options.length, seed=0)
        trainer.arrange(arrangement, way)
        packs = arrangement.rows(0)
        documents = [dict(row) for row in train.rows.select_columns(["input_ids", "labels"])]
        measure(trainer, batches_of(documents, [packs[i].tolist() for i in range(len(packs))], tokenizer.pad_token_id),
                int(arrangement.lengths.sum()), options.rounds)  # fmt: skip


def measure(trainer: SFTTrainer, ways: dict[str, list[Batch]], tokens: int, rounds: int) -> None:
    """Take turns, and print the table."""
    optimizer = torch.optim.SGD(trainer.model.parameters(), lr=1e-6)
    seconds(trainer, optimizer, ways["packed"][:1])
    took = dict.fromkeys(ways, float("inf"))
    for _ in range(rounds):
        for name, batches in ways.items():
            took[name] = min(took[name], seconds(trainer, optimizer, batches))
    first = next(iter(ways))
    share = {name: tokens / sum(batch["input_ids"].numel() for batch in batches) for name, batches in ways.items()}
    print("\n| rows | real tokens of a row | tokens/s | faster by | real tokens more by |\n|---|---|---|---|---|")
    for name in ways:
        print(
            f"| {name} | {share[name]:.1%} | {tokens / took[name]:,.0f} | {took[first] / took[name]:.2f} | "
            f"{share[name] / share[first]:.2f} |"
        )


if __name__ == "__main__":
    main()
