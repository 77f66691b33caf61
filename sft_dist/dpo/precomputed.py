"""The reference's log-probabilities, computed once for machine, data and reference, and read from the cache."""

from __future__ import annotations

import gc
import hashlib
import json
import os
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import xxhash
from numpy.typing import NDArray

from sft_dist.checkpoints.together import Together
from sft_dist.data.arrangement import document_lengths
from sft_dist.data.order import FILLER
from sft_dist.dpo.batch import Batch, PairCollator, PairRows
from sft_dist.dpo.reference import Reference, load_reference, reference_path, refuse_other_model
from sft_dist.errors import DataError
from sft_dist.paths import cache_dir, locked
from sft_dist.process import disk_is_full
from sft_dist.render.wording import count

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import TrainingArguments

    from sft_dist.stages import Setting

Ints = NDArray[np.int64]
# Raised whenever the same weights and rows would give other numbers.
CODE_VERSION = 1
_SIDES = ("chosen_ids", "rejected_ids")
# Passes of the model after which the ranks tell each other what they have.
_ROUNDS = 64
_CHUNK = 1 << 24


@dataclass(frozen=True)
class Table:
    """The log-probability of each completion's tokens, row by row, the chosen side first.

    `values`: fp32, (tokens,), on the disk. `starts`: where the sides of each row begin, (rows, 3), the last being the
    row's end.
    """

    values: NDArray[np.float32]
    starts: Ints

    def of_row(self, number: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Those of the chosen and of the rejected completion."""
        first, middle, last = self.starts[number]
        return np.array(self.values[first:middle]), np.array(self.values[middle:last])


def tables(setting: Setting, args: TrainingArguments, splits: Sequence[Dataset]) -> list[Table]:
    """The log-probabilities of prepared pairs under the reference of a recipe, a table a split.

    Where they are not in the cache, the reference is loaded, asked and let go, before the policy is there. All ranks
    call it together. Raises :class:`UserError` for another model than the policy's, and :class:`DataError` where the
    disk is full.
    """
    world, together = setting.world, Together("precompute")
    refuse_other_model(setting)
    files = [cache_dir() / "reference" / f"{name}.npy" for name in together.every(_names(setting, splits))[0]]
    starts = [_starts(rows) for rows in splits]
    # Runs on one head node wait for each other; other nodes only see what their own has settled.
    with locked(files[0].with_suffix("")) if world.is_main else nullcontext():
        absent = together.every([not file.exists() for file in files])
        wanted = [number for number in range(len(files)) if any(rank[number] for rank in absent)]
        if wanted:
            reference = load_reference(setting, args)
            for number in wanted:
                _compute(files[number], splits[number], starts[number], reference, setting, together)
            del reference
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
        together.every(None)
    for rows, file, number in zip(splits, files, range(len(files)), strict=True):
        made = "computed" if number in wanted else "in the cache"
        setting.say(f"reference: log-probabilities of {count(len(rows), 'pair')} {made} ({file})")
    return [Table(np.load(file, mmap_mode="r"), start) for file, start in zip(files, starts, strict=True)]


def _names(setting: Setting, splits: Sequence[Dataset]) -> list[str]:
    """What the numbers of each split depend on, as a name; of rank 0, the others do not look."""
    if not setting.world.is_main:
        return []
    recipe = setting.recipe
    path, revision = reference_path(recipe), recipe.model.model_revision
    parts: dict[str, Any] = {
        "code": CODE_VERSION,
        "weights": _digest_of_weights(path, recipe.dpo.ref_model_revision if recipe.dpo.ref_model else revision),
        "tokens": len(setting.tokenizer),
        "model": recipe.model.model_dump(include={"dtype", "attn_implementation"}),
        "peft": recipe.peft.model_dump(include={"load_in_4bit", "bnb_4bit_quant_type", "use_bnb_nested_quant"}),
        "bf16": setting.bf16,
    }
    return [
        hashlib.sha256(json.dumps({**parts, "rows": _digest_of_rows(rows)}, sort_keys=True).encode()).hexdigest()[:32]
        for rows in splits
    ]


def _digest_of_weights(path: str, revision: str) -> str:
    """What tells the weights of a model from others: the bytes of its files, or the commit of a hub model."""
    from transformers.utils import cached_file

    folder = Path(path)
    if not folder.is_dir():
        # Files of the hub's cache lie in a folder that is named after their commit.
        return Path(cached_file(path, "config.json", revision=revision)).parent.name
    found = xxhash.xxh3_128()
    files = sorted(folder.glob("*.safetensors")) or sorted(folder.glob("*.bin"))
    for file in (folder / "config.json", *files):
        found.update(file.name.encode())
        with file.open("rb") as opened:
            while chunk := opened.read(_CHUNK):
                found.update(chunk)
    return found.hexdigest()


def _digest_of_rows(rows: Dataset) -> str:
    found = xxhash.xxh3_128(str(len(rows)).encode())
    for batch in rows.select_columns(["prompt_ids", *_SIDES]).with_format("arrow").iter(10_000):
        for name in batch.column_names:
            for chunk in batch[name].chunks:
                # Of a slice, only what it shows.
                found.update(chunk.value_lengths().to_numpy().tobytes())
                found.update(chunk.flatten().to_numpy().tobytes())
    return found.hexdigest()


def _starts(rows: Dataset) -> Ints:
    """See :class:`Table`."""
    lengths = [
        np.stack([batch[name].combine_chunks().value_lengths().to_numpy(zero_copy_only=False) for name in _SIDES], 1)
        for batch in rows.select_columns(list(_SIDES)).with_format("arrow").iter(10_000)
    ]
    ends = np.cumsum(np.concatenate(lengths).astype(np.int64).reshape(-1))
    first = np.concatenate([[0], ends[:-1]]).reshape(-1, 2)
    return np.concatenate([first, ends.reshape(-1, 2)[:, 1:]], 1)


def _compute(
    file: Path, rows: Dataset, starts: Ints, reference: Reference, setting: Setting, together: Together
) -> None:
    """Have all ranks ask the reference, and one of each node write what came of it."""
    world, device = setting.world, getattr(reference, "device", torch.device("cpu"))
    writes = world.local_rank == 0
    file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    unfinished = file.with_name(f"{file.name}.unfinished{world.rank}")
    try:
        values = np.lib.format.open_memmap(unfinished, "w+", np.float32, (int(starts[-1, -1]),)) if writes else None
        for mine in _asked(rows, reference, setting, device):
            for found in together.every(mine):
                if values is not None:
                    _fill(values, starts, found)
        if values is not None:
            values.flush()
            os.replace(unfinished, file)
    except BaseException as error:
        unfinished.unlink(missing_ok=True)
        if disk_is_full(error):
            raise DataError(
                f"{cache_dir()}: no space left on the device for the reference's log-probabilities ({error}); free "
                "some, or name another folder in SFT_DIST_CACHE"
            ) from error
        raise


def _fill(values: Any, starts: Ints, found: Found) -> None:
    for number, (chosen, rejected) in found:
        first, middle, last = starts[number]
        values[first:middle], values[middle:last] = chosen, rejected


Found = list[tuple[int, tuple[NDArray[np.float32], NDArray[np.float32]]]]


def _asked(rows: Dataset, reference: Reference, setting: Setting, device: torch.device) -> Any:
    """What the reference says of this rank's rows, some rows at a time; as often on every rank."""
    size = setting.recipe.dpo.precompute_ref_batch_size or setting.recipe.train.per_device_train_batch_size
    order = np.argsort(-document_lengths(rows), kind="stable")
    batches = [order[start : start + size] for start in range(0, len(order), size)]
    source = PairRows(rows, len(rows), setting.tokenizer.pad_token_id)
    collate = PairCollator(setting.tokenizer.pad_token_id)
    rank, world = setting.world.rank, setting.world.size
    mine: Found = []
    for turn, first in enumerate(range(0, len(batches), world), start=1):
        numbers = batches[first + rank].tolist() if first + rank < len(batches) else []
        batch = collate([source[(number,)] for number in numbers] or [source[FILLER]])
        said = reference.log_probs({name: tensor.to(device) for name, tensor in batch.items()}).cpu()
        mine += _sides(numbers, said, batch)
        if turn % _ROUNDS == 0:
            yield mine
            mine = []
    yield mine


def _sides(numbers: Sequence[int], said: torch.Tensor, batch: Batch) -> Found:
    mask = batch["completion_mask"][:, 1:].bool()
    rows = [one[counted].numpy() for one, counted in zip(said, mask, strict=True)]
    half = len(rows) // 2
    return [(number, (rows[place], rows[half + place])) for place, number in enumerate(numbers)]
