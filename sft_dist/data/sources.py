"""Sources of records: hub data sets, local files and folders, and the built-in data sets.

A source yields :class:`RawRecord` one after the other, so that memory stays bounded by one record.
Each carries the place it came from, for messages.
"""

from __future__ import annotations

import difflib
import glob
import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from sft_dist.config import DataSection, Recipe
from sft_dist.data import python_docs, python_docs_pairs
from sft_dist.data.files import RawRecord, read_file
from sft_dist.errors import DataError

BUILT_INS = {"python-docs": python_docs, "python-docs-pairs": python_docs_pairs}
SUFFIXES = (".json", ".jsonl", ".ndjson", ".parquet", ".csv", ".jsonl.gz", ".json.gz")


@dataclass(frozen=True)
class Source:
    """A split of a data set: its name for messages, its identity for caches, and its records."""

    name: str
    fingerprint: str
    raw: Callable[[], Iterator[RawRecord]]
    """Records as they are read; lines of JSON are not parsed yet."""

    def records(self) -> Iterator[RawRecord]:
        """The records with their fields."""
        return map(RawRecord.parsed, self.raw())


def open_source(data: DataSection, split: str, key: str = "data.dataset_name") -> Source:
    """The source of one split.

    `split` is a split's name, or, for a held-out set, the path of a local file or folder.
    `key` is the recipe key that messages name. Raises :class:`DataError`.
    """
    if is_local(split):
        return _files_source(_local_files(split, None, key), split)
    name = data.dataset_name
    if is_built_in(name):
        return _built_in_source(name, split, key)
    if is_local(name):
        return _files_source(_local_files(name, split, key), name)
    return _hub_source(data, split, key)


def test_split_of(recipe: Recipe) -> str | None:
    """The held-out split: the recipe's, or the one that a built-in data set comes with."""
    data = recipe.data
    if data.dataset_test_split is None and is_built_in(data.dataset_name) and not data.test_split_size:
        return "test"
    return data.dataset_test_split


def is_built_in(name: str) -> bool:
    """Whether a name means a data set that is made on the spot, with splits `train` and `test`."""
    return name in BUILT_INS


def is_local(name: str) -> bool:
    """Whether a name means a path: it exists, has a data file's ending, or is written as a path."""
    return (
        name.startswith((".", "/", "~"))
        or name.lower().endswith(SUFFIXES)
        or glob.has_magic(name)
        or (not is_built_in(name) and Path(name).exists())
    )


def local_files(name: str, split: str | None, key: str) -> list[Path]:
    """The data files that a local name stands for. Raises :class:`DataError` when there are none."""
    return _local_files(name, split, key)


def _local_files(name: str, split: str | None, key: str) -> list[Path]:
    path = Path(name).expanduser()
    if glob.has_magic(name) and not path.exists():
        found = sorted(Path(p) for p in glob.glob(str(path), recursive=True))
        if not found:
            raise DataError(f"{key}: no file matches {name!r}; mend the pattern")
        return found
    if path.is_dir():
        return _folder_files(path, split, key)
    if not path.exists():
        raise DataError(f"{key}: no such file: {name}{_near(path)}")
    if not path.name.lower().endswith(SUFFIXES):
        raise DataError(f"{key}: {name}: unknown ending; use one of {', '.join(SUFFIXES)}")
    return [path]


def _near(path: Path) -> str:
    if not path.parent.is_dir():
        return f" (nor is there a folder {path.parent})"
    near = difflib.get_close_matches(path.name, [p.name for p in path.parent.iterdir()], n=1)
    return f", did you mean {path.parent / near[0]}" if near else "; give the path of a file or a folder"


def _folder_files(folder: Path, split: str | None, key: str) -> list[Path]:
    """All data files below a folder; only those of the split where the names tell splits apart."""
    every = sorted(p for p in folder.rglob("*") if p.is_file() and p.name.lower().endswith(SUFFIXES))
    if not every:
        raise DataError(f"{key}: folder {folder} holds no data file ({', '.join(SUFFIXES)})")
    if split is None:
        return every
    of_split = [p for p in every if _split_of(p.relative_to(folder)) == split]
    if of_split:
        return of_split
    named = sorted({s for p in every if (s := _split_of(p.relative_to(folder))) is not None})
    if split == "train":
        return [p for p in every if _split_of(p.relative_to(folder)) is None] or every
    raise DataError(
        f"{key}: folder {folder} has no split {split!r}; "
        + (f"it has {', '.join(named)}" if named else "name a file, or set data.test_split_size instead")
    )


def _split_of(path: Path) -> str | None:
    """The split that a file's name or folder tells: `train-0001.parquet`, `test/part.jsonl`."""
    for word in (*path.parts[:-1], path.name.split(".")[0]):
        head = word.lower().replace("_", "-").split("-")[0]
        if head in ("train", "test", "validation", "valid", "eval", "dev"):
            return "validation" if head in ("valid", "dev") else head
    return None


def _files_source(files: list[Path], name: str) -> Source:
    def records() -> Iterator[RawRecord]:
        for file in files:
            yield from read_file(file)

    digest = hashlib.sha256()
    for file in files:
        stat = file.stat()
        digest.update(f"{file.resolve()}\0{stat.st_size}\0{stat.st_mtime_ns}\n".encode())
    return Source(name, digest.hexdigest(), records)


def _built_in_source(name: str, split: str, key: str) -> Source:
    made_by = BUILT_INS[name]
    if split not in made_by.SPLITS:
        raise DataError(f"{key}: {name} has no split {split!r}; it has {', '.join(made_by.SPLITS)}")

    def records() -> Iterator[RawRecord]:
        for number, row in enumerate(made_by.build(split), 1):
            yield RawRecord(f"{name}/{split}: record {number}", row)

    return Source(f"{name}/{split}", f"{made_by.fingerprint()}/{split}", records)


def _hub_source(data: DataSection, split: str, key: str) -> Source:
    import datasets

    name = data.dataset_name
    try:
        rows = datasets.load_dataset(
            name, data.dataset_config, split=split, revision=data.dataset_revision, streaming=data.streaming
        )
    except datasets.exceptions.DatasetNotFoundError as error:
        raise DataError(f"{key}: no data set {name!r} on the hub, or no right to read it (set HF_TOKEN)") from error
    except (ConnectionError, OSError) as error:
        raise DataError(
            f"{key}: {name!r} is no local file, and the hub cannot be reached from here; "
            "give a path, or prepare the data where there is a network"
        ) from error
    except ValueError as error:
        raise DataError(f"{key}: {name}: {str(error).splitlines()[0]}") from error

    def records() -> Iterator[RawRecord]:
        for number, row in enumerate(rows, 1):
            yield RawRecord(f"{name}/{split}: record {number}", dict(row))

    # `_fingerprint` is how `datasets` itself tells one version of a table from another; a stream has none that lasts.
    version = f"{name} {data.dataset_config} {data.dataset_revision}" if data.streaming else rows._fingerprint
    return Source(f"{name}/{split}", str(version), records)
