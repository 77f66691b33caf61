"""What a checkpoint says of itself: nothing of it can be changed, cut short or taken away without being found."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from sft_dist.checkpoints import folder as folders
from sft_dist.checkpoints import manifest
from sft_dist.checkpoints.files import write_bytes
from sft_dist.checkpoints.manifest import Manifest

FILES = {"rank-00000.safetensors": bytes(range(256)) * 3, "common.json": b'{"shapes": {}}', "empty": b""}
ABOUT = Manifest(
    step=70, tokens=12345, trained_tokens=678, world_size=2, strategy="fsdp2", rows_per_step=16, recipe_hash="ab" * 32,
    data="cd" * 16, nodes=2, versions={"torch": "2.13.0", "bitsandbytes": None},
    metrics={"eval_loss": 1.25, "eval_ж": 0.1},
)  # fmt: skip


def written(folder: Path) -> Manifest:
    """A complete checkpoint in a folder."""
    folder.mkdir(parents=True)
    about = replace(ABOUT, files={name: write_bytes(folder / name, content) for name, content in FILES.items()})
    (folder / manifest.NAME).write_text(about.to_json())
    return about


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run") / "checkpoint-70"
    written(folder)
    return folder


def fault(checkpoint: Path) -> str | None:
    """What a start finds wrong with it."""
    try:
        held = manifest.read(checkpoint)
    except ValueError as error:
        return str(error)
    return manifest.size_fault(checkpoint, held) or manifest.content_fault(checkpoint, held)


def changed(file: Path, content: bytes) -> str | None:
    """What is found wrong while a file of the checkpoint has another content."""
    before = file.read_bytes()
    file.write_bytes(content)
    try:
        return fault(file.parent)
    finally:
        file.write_bytes(before)


def test_what_is_written_is_read(tmp_path: Path) -> None:
    about = written(tmp_path / "checkpoint-70")
    held = manifest.read(tmp_path / "checkpoint-70")
    assert held == about
    assert held.bytes == sum(len(content) for content in FILES.values())
    assert fault(tmp_path / "checkpoint-70") is None


def test_checksums_are_those_of_the_files(checkpoint: Path) -> None:
    held = manifest.read(checkpoint)
    for name, content in FILES.items():
        assert held.files[name].xxh3_128 == xxhash.xxh3_128(content).hexdigest() == manifest.checksum(checkpoint / name)
        assert held.files[name].bytes == len(content)


def test_a_file_of_many_chunks_has_the_checksum_of_the_whole(tmp_path: Path) -> None:
    content = bytes(range(251)) * 40_000
    assert len(content) > 2 * manifest._CHUNK
    file = write_bytes(tmp_path / "file", content)
    assert file.xxh3_128 == xxhash.xxh3_128(content).hexdigest() == manifest.checksum(tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == content


@settings(deadline=None)
@given(st.data())
def test_any_changed_byte_of_a_file_is_found(checkpoint: Path, data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(["rank-00000.safetensors", "common.json"]))
    content = bytearray(FILES[name])
    content[data.draw(st.integers(0, len(content) - 1))] ^= data.draw(st.integers(1, 255))
    assert changed(checkpoint / name, bytes(content)) == f"{name} is damaged: its checksum is another"


@settings(deadline=None)
@given(st.data())
def test_any_changed_byte_of_the_manifest_is_found(checkpoint: Path, data: st.DataObject) -> None:
    """But one between the words, such as a tab for a space, which changes nothing that it says."""
    file = checkpoint / manifest.NAME
    before = file.read_bytes()
    content = bytearray(before)
    content[data.draw(st.integers(0, len(content) - 1))] ^= data.draw(st.integers(1, 255))
    said = changed(file, bytes(content))
    try:
        same = json.loads(content) == json.loads(before)
    except ValueError:
        same = False
    assert said is None if same else said is not None and said.startswith(manifest.NAME)


def test_every_bit_of_the_manifest_counts(checkpoint: Path, tmp_path: Path) -> None:
    before = (checkpoint / manifest.NAME).read_bytes()
    told = json.loads(before)
    for place in range(len(before)):
        content = bytearray(before)
        content[place] ^= 1
        (tmp_path / manifest.NAME).write_bytes(content)
        try:
            manifest.read(tmp_path)
        except ValueError:
            continue
        assert json.loads(content) == told


@settings(deadline=None)
@given(st.data())
def test_any_file_cut_short_is_found_at_a_glance(checkpoint: Path, data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(["rank-00000.safetensors", "common.json"]))
    length = data.draw(st.integers(0, len(FILES[name]) - 1))
    said = changed(checkpoint / name, FILES[name][:length])
    assert said == f"{name} has {length:,} bytes instead of {len(FILES[name]):,}"


@settings(deadline=None)
@given(st.data())
def test_a_manifest_cut_short_is_found(checkpoint: Path, data: st.DataObject) -> None:
    content = (checkpoint / manifest.NAME).read_bytes()
    # The line's end is no part of what it says.
    cut = content[: data.draw(st.integers(0, len(content) - 2))]
    assert (changed(checkpoint / manifest.NAME, cut) or "").startswith(manifest.NAME)


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_is_found(tmp_path: Path, name: str) -> None:
    written(tmp_path / "checkpoint-70")
    (tmp_path / "checkpoint-70" / name).unlink()
    assert fault(tmp_path / "checkpoint-70") == f"{name}: No such file or directory"
    assert folders.complete(tmp_path) == {}


def test_without_its_manifest_it_is_none(tmp_path: Path) -> None:
    written(tmp_path / "checkpoint-70")
    (tmp_path / "checkpoint-70" / manifest.NAME).unlink()
    assert fault(tmp_path / "checkpoint-70") == "manifest.json is missing"


@pytest.mark.parametrize("content", [b"", b"[]", b"null", b"{}", b"17", b"\xff\xfe"])
def test_what_is_no_manifest_is_told_in_words(checkpoint: Path, content: bytes) -> None:
    assert (changed(checkpoint / manifest.NAME, content) or "").startswith(manifest.NAME)


def test_a_later_format_is_named(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    held = manifest.read(checkpoint)
    monkeypatch.setattr(manifest, "FORMAT", 2)
    later = held.to_json()
    monkeypatch.undo()
    said = changed(checkpoint / manifest.NAME, later.encode())
    assert said == "manifest.json has the format 2; this version of sft-dist reads 1"


@settings(max_examples=50, deadline=None)
@given(
    st.builds(
        Manifest,
        step=st.integers(0, 10**9),
        tokens=st.integers(0, 10**15),
        trained_tokens=st.integers(0, 10**15),
        world_size=st.integers(1, 4096),
        strategy=st.text(),
        rows_per_step=st.integers(1, 10**6),
        recipe_hash=st.text(),
        data=st.text(),
        metrics=st.dictionaries(st.text(), st.floats(allow_nan=False)),
        files=st.dictionaries(st.text(), st.builds(manifest.File, st.integers(0, 2**62), st.text())),
    )
)
def test_any_manifest_is_read_as_it_was_written(tmp_path_factory: pytest.TempPathFactory, about: Manifest) -> None:
    folder = tmp_path_factory.mktemp("any")
    (folder / manifest.NAME).write_text(about.to_json())
    assert manifest.read(folder) == about
