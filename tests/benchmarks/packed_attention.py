"""How exact packed rows are, for every architecture and attention, by each way to feed them and as TRL feeds them.

    python -m tests.benchmarks.packed_attention

prints the table of docs/packing.md in a minute; `--write` puts it there. All models are small, random and fp32.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import nullcontext
from importlib.metadata import version
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from trl.data_utils import pack_dataset
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from sft_dist import packing_proof
from sft_dist.attention import Way, ways
from sft_dist.packing_proof import Proof, Trial, prove
from tests.architectures import (
    EAGER_ONLY,
    MODELS,
    PAIRS,
    UNPACKED,
    flex_on_a_processor,
    model_of,
    with_flash_on_a_processor,
)

PAGE = Path(__file__).parents[2] / "docs" / "packing.md"
BEGIN, END = "<!-- table: python -m tests.benchmarks.packed_attention --write -->", "<!-- end of table -->"
# Attentions that a processor has only as torch defines them, or as a stand-in: the page says so at their marks.
LABELS = {"flex_attention": "flex [1]", "flash": "flash [2]"}


def cases() -> Iterator[tuple[str, str, Any]]:
    """What is measured: a name, an attention, and the model."""
    for name in MODELS:
        for attention in (attention for pair, attention in PAIRS if pair == name):
            yield name, attention, model_of(name, attention)
        if name not in EAGER_ONLY:
            yield name, "flash", with_flash_on_a_processor(model_of(name))
    for name in ("opt", "llama"):
        adapter = LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear")
        yield f"{name}, LoRA", "sdpa", get_peft_model(model_of(name), adapter)
        model = model_of(name)
        model.gradient_checkpointing_enable({"use_reentrant": False})
        yield f"{name}, gradient checkpointing", "sdpa", model
    for name in UNPACKED:
        yield name, "eager", model_of(name, "eager")


def of_trl(batch: dict[str, torch.Tensor], *_: Any) -> dict[str, Any]:
    """What TRL's `SFTTrainer` gives the model for these packs with `packing=True`, whose default is `bfd`."""
    packs = []
    for ids, documents in zip(batch["input_ids"], batch["document_ids"], strict=True):
        kept = documents > 0
        lengths = documents[kept].unique(return_counts=True)[1]
        packs.append({"input_ids": ids[kept].tolist(), "seq_lengths": lengths.tolist()})
    fed = DataCollatorForLanguageModeling(pad_token_id=0, padding_free=True)(packs)
    return {name: value for name, value in fed.items() if name != "labels"} | {"use_cache": False}


def check_form() -> None:
    """That a row of TRL's `pack_dataset` has the columns that :func:`of_trl` gives to its collator."""
    packed = pack_dataset(Dataset.from_dict({"input_ids": [[1, 2, 3], [4, 5]]}), 8, "bfd")
    if packed[0] != {"input_ids": [1, 2, 3, 4, 5], "seq_lengths": [3, 2]}:
        raise RuntimeError(f"TRL packs in another form than this table was made for: {packed[0]}")


def row(name: str, attention: str, model: Any) -> str:
    """The line of one case."""
    with flex_on_a_processor() if attention == "flex_attention" else nullcontext():
        proof = prove(model)
        trials = {way: prove(model, [way]).trials[0] for way in ways(model)}
        # TRL joins all rows to one, so its logits have the form of that way's.
        with mock.patch.object(packing_proof, "feed", of_trl):
            theirs = prove(model, [Way.VARLEN]).trials[0]
    cells = [cell(trials.get(way), proof) for way in Way]
    chosen = proof.way.value if proof.way else "not packed"
    return f"| {name} | {LABELS.get(attention, attention)} | {' | '.join(cells)} | {chosen} | {cell(theirs, proof)} |"


def cell(trial: Trial | None, proof: Proof) -> str:
    """Errors of logits and gradients, in bold where they are no round-off."""
    if trial is None:
        return ""
    if trial.errors is None:
        return "not possible"
    text = f"{figure(trial.errors.logits)}, {figure(trial.errors.gradients)}"
    return text if proof.exact(trial) else f"**{text}**"


def figure(value: float) -> str:
    return f"{value:.2g}" if value >= 1e-3 else f"{value:.0e}".replace("e-0", "e-")


def table() -> str:
    titles = ["model", "attention", *(way.value for way in Way), "chosen here", f"TRL {version('trl')}"]
    lines = [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
    for case in cases():
        lines.append(row(*case))
        print(lines[-1], flush=True)
    return "\n".join(lines)


def main(words: list[str]) -> None:
    check_form()
    made = table()
    if "--write" in words:
        before, rest = PAGE.read_text(encoding="utf-8").split(BEGIN)
        PAGE.write_text(f"{before}{BEGIN}\n{made}\n{END}{rest.split(END)[1]}", encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
