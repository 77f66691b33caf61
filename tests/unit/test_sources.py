"""Files and folders as sources, and each fault of theirs as one line."""

from __future__ import annotations

import csv
import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sft_dist.config import DataSection
from sft_dist.data.account import Account
from sft_dist.data.conversations import conversations
from sft_dist.data.sources import RawRecord, open_source
from sft_dist.errors import DataError

ROWS = [{"instruction": f"q{i}", "output": f"a{i}"} for i in range(5)]


def read(path: Path | str, split: str = "train", **data: Any) -> list[RawRecord]:
    section = DataSection(dataset_name=str(path), **data)
    return list(open_source(section, split).records())


def jsonl(path: Path, rows: list[Any] | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in (ROWS if rows is None else rows)))
    return path


def write_json(path: Path) -> None:
    path.write_text(json.dumps(ROWS, indent=1))


def write_gzip(path: Path) -> None:
    with gzip.open(path, "wt") as file:
        file.writelines(json.dumps(row) + "\n" for row in ROWS)


def write_parquet(path: Path) -> None:
    pq.write_table(pa.Table.from_pylist(ROWS), path)


def write_csv(path: Path) -> None:
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, ["instruction", "output"])
        writer.writeheader()
        writer.writerows(ROWS)


@pytest.mark.parametrize(
    ("name", "write"),
    [
        ("d.json", write_json),
        ("d.jsonl", jsonl),
        ("d.json", jsonl),
        ("d.jsonl.gz", write_gzip),
        ("d.parquet", write_parquet),
        ("d.csv", write_csv),
    ],
)
def test_every_kind_of_file_gives_the_same_records(tmp_path: Path, name: str, write: Any) -> None:
    write(tmp_path / name)
    assert [r.fields for r in read(tmp_path / name)] == ROWS
    assert [r.fields for r in read(tmp_path)] == ROWS


def test_a_folder_is_read_in_the_order_of_its_names_and_by_split(tmp_path: Path) -> None:
    jsonl(tmp_path / "train-0001.jsonl", ROWS[2:4])
    jsonl(tmp_path / "train-0000.jsonl", ROWS[:2])
    jsonl(tmp_path / "test" / "part.jsonl", ROWS[4:])
    assert [r.fields for r in read(tmp_path)] == ROWS[:4]
    assert [r.fields for r in read(tmp_path, "test")] == ROWS[4:]
    with pytest.raises(DataError, match=r"has no split 'validation'; it has test, train"):
        read(tmp_path, "validation")


def test_a_glob_and_a_held_out_file(tmp_path: Path) -> None:
    jsonl(tmp_path / "a.jsonl", ROWS[:2])
    jsonl(tmp_path / "b.jsonl", ROWS[2:])
    assert [r.fields for r in read(tmp_path / "*.jsonl")] == ROWS
    assert [r.fields for r in read(tmp_path / "a.jsonl", str(tmp_path / "b.jsonl"))] == ROWS[2:]


def test_the_fingerprint_follows_the_file(tmp_path: Path) -> None:
    section = DataSection(dataset_name=str(jsonl(tmp_path / "d.jsonl")))
    first = open_source(section, "train").fingerprint
    assert open_source(section, "train").fingerprint == first
    jsonl(tmp_path / "d.jsonl", ROWS[:1])
    assert open_source(section, "train").fingerprint != first


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("trane.jsonl", "no such file: {folder}/trane.jsonl, did you mean {folder}/train.jsonl"),
        ("zzz.parquet", "no such file: {folder}/zzz.parquet; give the path"),
        ("none/x.json", "no such file: {folder}/none/x.json (nor is there a folder {folder}/none)"),
        ("empty", "folder {folder}/empty holds no data file"),
        ("notes.txt", "{folder}/notes.txt: unknown ending; use one of .json,"),
        ("*.csv", "no file matches '{folder}/*.csv'"),
    ],
)
def test_paths_that_lead_nowhere(tmp_path: Path, name: str, said: str) -> None:
    jsonl(tmp_path / "train.jsonl")
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(DataError) as caught:
        read(tmp_path / name)
    assert str(caught.value).startswith("data.dataset_name: " + said.format(folder=tmp_path))


def test_broken_json_is_named_by_its_line(tmp_path: Path) -> None:
    file = tmp_path / "d.jsonl"
    file.write_text('{"text": "a"}\n{"text": \n{"text": "c"}\n')
    records = read(file)
    assert [r.fields is None for r in records] == [False, True, False]
    assert records[1].where == f"{file}:2"
    assert records[1].fault is not None
    assert records[1].fault.startswith("broken JSON: ")
    array = tmp_path / "d.json"
    array.write_text('[{"text": "a"},\n {"text": }]')
    with pytest.raises(DataError, match=r"d\.json:2: broken JSON: Expecting value"):
        read(array)


def test_files_that_are_not_what_their_ending_says(tmp_path: Path) -> None:
    (tmp_path / "d.parquet").write_bytes(b"not parquet at all")
    with pytest.raises(DataError, match=r"d\.parquet: broken Parquet"):
        read(tmp_path / "d.parquet")
    (tmp_path / "d.jsonl").write_bytes(b'{"text": "\xff"}\n')
    with pytest.raises(DataError, match=r"d\.jsonl: not UTF-8 at byte"):
        read(tmp_path / "d.jsonl")
    (tmp_path / "d.csv").write_text("instruction,output\na,b,c\n")
    assert read(tmp_path / "d.csv")[0].fault == "1 fields too many"
    jsonl(tmp_path / "e.jsonl", [5, ["a"]])
    assert read(tmp_path / "e.jsonl")[0].fault == "a record must be an object with columns, got int"


def good(path: Path, **data: Any) -> tuple[list[str], Account]:
    section = DataSection(dataset_name=str(path), **data)
    account = Account()
    return [where for where, _ in conversations(open_source(section, "train"), section, account)], account


def test_the_first_bad_record_is_refused_with_its_number(tmp_path: Path) -> None:
    file = jsonl(tmp_path / "d.jsonl", [ROWS[0], {"instruction": "q", "output": 5}, ROWS[1]])
    with pytest.raises(DataError, match=r"d\.jsonl:2: output must be a string, got int; mend it, or skip"):
        good(file)


def test_bad_records_are_skipped_counted_and_named_up_to_the_limit(tmp_path: Path) -> None:
    bad = {"instruction": "q", "output": "a\ud800"}
    file = jsonl(tmp_path / "d.jsonl", [ROWS[0], bad, ROWS[1], bad])
    wheres, account = good(file, max_bad_records=2)
    assert wheres == [f"{file}:1", f"{file}:3"]
    assert (account.records, len(account.bad)) == (4, 2)
    assert account.bad[1] == f"{file}:4: output holds a lone surrogate at character 2"
    with pytest.raises(DataError, match=r"d\.jsonl:4: .* bad record number 2, and data\.max_bad_records is 1"):
        good(file, max_bad_records=1)


def test_an_empty_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="holds no record"):
        good(jsonl(tmp_path / "d.jsonl", []))


def test_a_hook_reads_records_of_any_shape(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_hooks.py").write_text(
        "def qa(record):\n    return {'prompt': record['q'], 'completion': record['a']}\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    file = jsonl(tmp_path / "d.jsonl", [{"q": "1", "a": "2"}])
    _, account = good(file, formatting="my_hooks:qa")
    assert account.format == "prompt_completion"
    with pytest.raises(DataError, match=r"data\.formatting: my_hooks:nothing: .*must be package\.module:function"):
        good(file, formatting="my_hooks:nothing")
