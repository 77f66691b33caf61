"""Rows of one source's split: made once per machine and fingerprint, then read from the cache.

Every process of a node asks for the same rows; the first makes them under a file lock and the others wait
for the lock, not in a collective that could time out. A cache folder gets its name only when it is whole.
"""

from __future__ import annotations

import hashlib
import importlib
import itertools
import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from sft_dist.config import DataSection
from sft_dist.data.account import Account, dropped
from sft_dist.data.conversations import no_record
from sft_dist.data.encoder import FAST, PLAIN, EncoderDiffers
from sft_dist.data.formats import Conversation, from_json, load_hook
from sft_dist.data.masking import Masker, Tokens
from sft_dist.data.pool import BATCH, Blocks, processes
from sft_dist.data.sources import Source, open_source
from sft_dist.data.template import ChatTemplate
from sft_dist.data.work import SCHEMA, Block, MakesBlocks, Merger, Work
from sft_dist.errors import DataError
from sft_dist.paths import cache_dir, locked, locked_if_free
from sft_dist.process import disk_is_full

if TYPE_CHECKING:
    from datasets import Dataset

# Raised whenever the same input would give other rows.
CODE_VERSION = 3
_UNFINISHED = ".unfinished"
# Settings of the recipe's `data` section that decide what becomes of a record.
_DECIDING = {"format", "formatting", "max_bad_records", "truncation_mode", "min_response_length",
             "max_response_length", "deduplicate"}  # fmt: skip


@dataclass(frozen=True)
class Kind:
    """A kind of rows: its name in fingerprints, its columns, and what makes blocks of it."""

    name: str
    schema: pa.Schema
    work: Callable[[DataSection, ChatTemplate, Masker], MakesBlocks]


CONVERSATIONS = Kind("conversations", SCHEMA, Work)


@dataclass(frozen=True)
class Prepared:
    """A split ready for the trainer.

    `rows`, of conversations, has the columns input_ids, labels (lists of int32), where, turns (the conversation as
    JSON), digest (of the conversation, 16 bytes), length and trained (tokens of the row, and those that the loss is
    taken over). For those of pairs see `sft_dist.data.pairs`.
    """

    rows: Dataset
    account: Account


def turns_of(row: dict[str, Any]) -> Conversation:
    """The conversation that a prepared row was made of."""
    return from_json(row["turns"])


def rows_of(
    data: DataSection, template: ChatTemplate, max_length: int | None, split: str, key: str, limit: int | None = None,
    kind: Kind = CONVERSATIONS,
) -> Prepared:  # fmt: skip
    """The rows of a split, from the cache or made now, of at most `limit` conversations or pairs.

    `max_length` in tokens, None for no limit; `key` is the recipe key that messages name. Raises :class:`DataError`
    for data that cannot be used, and :class:`UserError` where a process that prepares it dies.
    """
    source = open_source(data, split, key)
    folder = _folder(data, template, max_length, source, limit, kind)
    with locked(folder):
        if not folder.is_dir():
            _build(folder, source, data, template, max_length, limit, kind)
    return _load(folder)


def rows_in_cache(
    data: DataSection, template: ChatTemplate, max_length: int | None, split: str, key: str, limit: int | None = None
) -> Prepared | None:
    """What `rows_of` would give, if it has been made before."""
    folder = _folder(data, template, max_length, open_source(data, split, key), limit, CONVERSATIONS)
    return _load(folder) if folder.is_dir() else None


def tokenized(
    pairs: Iterator[tuple[str, Conversation]],
    template: ChatTemplate,
    masker: Masker,
    data: DataSection,
    account: Account,
) -> Iterator[tuple[str, Conversation, Tokens]]:
    """Rows of conversations, in order, as they are prepared; what is left out is counted."""
    work, merger = Work(data, template, masker), Merger(data, account)
    while batch := list(itertools.islice(pairs, BATCH)):
        block = work.finish(Block(form=account.format), [(i, *pair) for i, pair in enumerate(batch)])
        rows, record = merger.add(block)
        for row, number in zip(rows.to_pylist(), record.tolist(), strict=True):
            yield row["where"], turns_of(row), Tokens(row["input_ids"], row["labels"], bool(block.truncated[number]))


def fingerprint(
    data: DataSection, template: ChatTemplate, max_length: int | None, source: Source, limit: int | None, kind: Kind
) -> str:
    """What the rows depend on: this code, the tokenizer, the template, the settings and the source."""
    tokenizer = template.tokenizer
    parts = {
        "code": CODE_VERSION,
        "kind": kind.name,
        "source": source.fingerprint,
        "tokenizer": tokenizer.backend_tokenizer.to_str(),
        "special": [tokenizer.bos_token, tokenizer.eos_token],
        "template": tokenizer.chat_template,
        "max_length": max_length,
        "limit": limit,
        "hook": _hook_source(data.formatting),
        "data": data.model_dump(include=_DECIDING),
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


def _hook_source(path: str | None) -> str | None:
    """The text of the module that holds the user's function, so that a change of it is seen."""
    if path is None:
        return None
    module = importlib.import_module(load_hook(path).__module__)
    return Path(module.__file__).read_text() if module.__file__ else path


def _folder(
    data: DataSection, template: ChatTemplate, max_length: int | None, source: Source, limit: int | None, kind: Kind
) -> Path:
    return cache_dir() / "rows" / fingerprint(data, template, max_length, source, limit, kind)


def _build(
    folder: Path, source: Source, data: DataSection, template: ChatTemplate, max_length: int | None, limit: int | None,
    kind: Kind,
) -> None:  # fmt: skip
    # The lock is ours, so a folder of that name is what a killed process left.
    unfinished = folder.with_name(folder.name + _UNFINISHED)
    shutil.rmtree(unfinished, ignore_errors=True)
    _sweep(folder.parent)
    try:
        unfinished.mkdir(parents=True, mode=0o700)
        masker = Masker(template.tokenizer, max_length)
        try:
            account = _write(unfinished, source, data, kind.work(data, template, masker), masker, limit, kind)
        except EncoderDiffers:
            plain = Masker(template.tokenizer, max_length, fast=False)
            account = _write(unfinished, source, data, kind.work(data, template, plain), plain, limit, kind)
            account.encoder = f"{PLAIN}, since {FAST} gave other ids"
        if account.rows == 0:
            raise DataError(f"data.dataset_name: {source.name}: {nothing_left(account)}")
        (unfinished / "account.json").write_text(json.dumps(asdict(account)))
    except BaseException as error:
        shutil.rmtree(unfinished, ignore_errors=True)
        if disk_is_full(error):
            raise DataError(
                f"{cache_dir()}: no space left on the device for the prepared rows ({error}); free some, or name "
                "another folder in SFT_DIST_CACHE"
            ) from error
        raise
    os.replace(unfinished, folder)


def _sweep(cache: Path) -> None:
    """Remove what killed preparations of other rows have left, which nobody may ask for again."""
    for left in cache.glob(f"*{_UNFINISHED}"):
        with locked_if_free(left.with_name(left.name.removesuffix(_UNFINISHED))) as ours:
            if ours:
                shutil.rmtree(left, ignore_errors=True)


def _write(
    folder: Path, source: Source, data: DataSection, work: MakesBlocks, masker: Masker, limit: int | None, kind: Kind
) -> Account:
    """Write the rows of a split into a folder and give the account of them."""
    account = Account()
    merger = Merger(data, account)
    good = 0
    with (
        open(folder / "rows.arrow", "wb") as file,
        pa.ipc.new_stream(file, _schema(kind)) as writer,
        Blocks(source.raw(), work, processes(data.dataset_num_proc), account.format) as blocks,
    ):
        for batch, block in blocks:
            # The batch in which the limit is reached is done again up to it.
            last = limit is not None and good + block.good >= limit
            if limit is not None and last:
                block = work(batch, account.format, limit - good)
            good += block.good
            rows, _ = merger.add(block)
            if rows.num_rows:
                writer.write_batch(rows)
            if last:
                break
    if account.records == 0:
        raise no_record(source)
    account.encoder = masker.encoder_of(account.records)
    return account


def _schema(kind: Kind) -> Any:
    """The columns of the rows, with what `datasets` wants to know of them."""
    from datasets import Features

    return Features.from_arrow_schema(kind.schema).arrow_schema


def nothing_left(account: Account) -> str:
    """Why no row is left, with the mend."""
    reasons = dropped(account)
    if account.untrained_count and len(reasons) == 1:
        return "no record has a response within train.max_length; raise it"
    return f"no record is left ({', '.join(reasons)}); mend the data" if reasons else "no record is left; mend the data"


def _load(folder: Path) -> Prepared:
    from datasets import Dataset

    account = Account(**json.loads((folder / "account.json").read_text()))
    return Prepared(Dataset.from_file(str(folder / "rows.arrow")), account)
