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
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sft_dist.config import DataSection
from sft_dist.data.conversations import Account, conversations
from sft_dist.data.formats import Conversation, Fault, Turn, load_hook
from sft_dist.data.masking import Masker, Tokens
from sft_dist.data.sources import Source, open_source
from sft_dist.data.template import ChatTemplate, Rendered
from sft_dist.errors import DataError
from sft_dist.paths import cache_dir, locked

if TYPE_CHECKING:
    from datasets import Dataset

# Raised whenever the same input would give other rows.
CODE_VERSION = 1
_BATCH = 512


@dataclass(frozen=True)
class Prepared:
    """A split ready for the trainer.

    `rows` has the columns input_ids, labels (lists of int64), where and turns (the conversation as JSON).
    """

    rows: Dataset
    account: Account


def turns_of(row: dict[str, Any]) -> Conversation:
    """The conversation that a prepared row was made of."""
    return tuple(Turn(role, content) for role, content in json.loads(row["turns"]))


def rows_of(
    data: DataSection, template: ChatTemplate, max_length: int | None, split: str, key: str, limit: int | None = None
) -> Prepared:
    source = open_source(data, split, key)
    masker = Masker(template.tokenizer, max_length)
    folder = cache_dir() / "rows" / fingerprint(data, template, max_length, source, limit)
    with locked(folder):
        if not folder.is_dir():
            _build(folder, source, data, template, masker, limit)
    return _load(folder)


def tokenized(
    pairs: Iterator[tuple[str, Conversation]],
    template: ChatTemplate,
    masker: Masker,
    data: DataSection,
    account: Account,
) -> Iterator[tuple[str, Conversation, Tokens]]:
    """Rows of conversations, in order. A record in which nothing is trained is dropped and counted."""
    while batch := list(itertools.islice(pairs, _BATCH)):
        rendered = list(_rendered(batch, template, data, account))
        rows = masker([r for _, _, r in rendered], raw=account.format == "text") if rendered else []
        for (where, turns, _), row in zip(rendered, rows, strict=True):
            if row.trained == 0:
                account.untrained.append(where)
                continue
            account.rows += 1
            account.truncated += row.truncated
            account.tokens += len(row.input_ids)
            account.trained_tokens += row.trained
            yield where, turns, row


def _rendered(
    batch: list[tuple[str, Conversation]], template: ChatTemplate, data: DataSection, account: Account
) -> Iterator[tuple[str, Conversation, Rendered]]:
    for where, turns in batch:
        try:
            yield where, turns, template.render(turns)
        except Fault as fault:
            account.note_bad(f"{where}: {fault}", data.max_bad_records)


def fingerprint(
    data: DataSection, template: ChatTemplate, max_length: int | None, source: Source, limit: int | None
) -> str:
    """What the rows depend on: this code, the tokenizer, the template, the settings and the source."""
    tokenizer = template.tokenizer
    parts = {
        "code": CODE_VERSION,
        "source": source.fingerprint,
        "tokenizer": tokenizer.backend_tokenizer.to_str(),
        "special": [tokenizer.bos_token, tokenizer.eos_token],
        "template": tokenizer.chat_template,
        "max_length": max_length,
        "limit": limit,
        "hook": _hook_source(data.formatting),
        "data": data.model_dump(include={"format", "formatting", "max_bad_records"}),
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


def _hook_source(path: str | None) -> str | None:
    """The text of the module that holds the user's function, so that a change of it is seen."""
    if path is None:
        return None
    module = importlib.import_module(load_hook(path).__module__)
    return Path(module.__file__).read_text() if module.__file__ else path


def _build(
    folder: Path, source: Source, data: DataSection, template: ChatTemplate, masker: Masker, limit: int | None
) -> None:
    from datasets import Features, List, Value
    from datasets.arrow_writer import ArrowWriter

    ints = List(Value("int64"))
    features = Features({"input_ids": ints, "labels": ints, "where": Value("string"), "turns": Value("string")})
    account = Account()
    # The lock is ours, so a folder of that name is what a killed process left.
    unfinished = folder.with_name(folder.name + ".unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True, mode=0o700)
    try:
        with ArrowWriter(features=features, path=str(unfinished / "rows.arrow"), writer_batch_size=_BATCH) as writer:
            pairs = conversations(source, data, account, limit)
            for where, turns, row in tokenized(pairs, template, masker, data, account):
                text = json.dumps([(t.role, t.content) for t in turns], ensure_ascii=False)
                writer.write({"input_ids": row.input_ids, "labels": row.labels, "where": where, "turns": text})
            writer.finalize()
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise
    if account.rows == 0:
        shutil.rmtree(unfinished)
        raise DataError(f"data.dataset_name: {source.name}: {nothing_left(account)}")
    (unfinished / "account.json").write_text(json.dumps(asdict(account)))
    os.replace(unfinished, folder)


def nothing_left(account: Account) -> str:
    """Why no row is left, with the mend."""
    if account.untrained:
        return "no record has a response within train.max_length; raise it"
    return "no record is left; mend the data"


def _load(folder: Path) -> Prepared:
    from datasets import Dataset

    account = Account(**json.loads((folder / "account.json").read_text()))
    return Prepared(Dataset.from_file(str(folder / "rows.arrow")), account)
