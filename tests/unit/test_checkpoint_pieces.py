"""Tensors as stretches: cut without loss, and read back in whatever other stretches, bit for bit."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from sft_dist.checkpoints import writer
from sft_dist.checkpoints.files import write_tensors
from sft_dist.checkpoints.pieces import WEIGHT, Piece, Reader, dealt, fill
from sft_dist.errors import UserError

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.int32, torch.int16,
          torch.int8, torch.uint8, torch.bool)  # fmt: skip
# Names that a parameter may have, and the sign that parts a key.
NAMES = ("model.layers.0.weight", "lm_head", "base@model", "größe.bias", "7")


def bits(dtype: torch.dtype, count: int, seed: int = 0) -> torch.Tensor:
    """Any bits at all: of the floats, NaNs and infinities too."""
    draw = torch.Generator().manual_seed(seed)
    size = torch.empty(0, dtype=dtype).element_size()
    raw = torch.randint(0, 2 if dtype == torch.bool else 256, (count * size,), dtype=torch.uint8, generator=draw)
    return raw.view(dtype)


def same(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two flat tensors have the same type and the same bits."""
    return one.dtype == other.dtype and one.shape == other.shape and torch.equal(raw(one), raw(other))


def raw(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(torch.uint8)


def file_of(folder: Path, rank: int, pieces: Sequence[Piece]) -> Path:
    path = folder / f"rank-{rank:05d}.safetensors"
    write_tensors(path, [writer._flat(piece) for piece in pieces])
    return path


TENSORS = st.lists(st.tuples(st.sampled_from(DTYPES), st.integers(0, 40)), max_size=6)


def pieces_of(tensors: Sequence[tuple[torch.dtype, int]]) -> list[Piece]:
    return [
        Piece(NAMES[number % len(NAMES)], f"kind{number}", 0, bits(dtype, count, number))
        for number, (dtype, count) in enumerate(tensors)
    ]


@settings(deadline=None)
@given(TENSORS, st.integers(1, 9))
def test_every_element_is_dealt_once(tensors: list[tuple[torch.dtype, int]], world: int) -> None:
    pieces = pieces_of(tensors)
    shares = [dealt(pieces, rank, world) for rank in range(world)]
    for whole in pieces:
        mine = [piece for share in shares for piece in share if (piece.name, piece.kind) == (whole.name, whole.kind)]
        at = 0
        for piece in mine:
            assert piece.start == at and piece.tensor.numel() > 0
            at += piece.tensor.numel()
        assert at == whole.tensor.numel()
        if mine:
            assert same(torch.cat([piece.tensor for piece in mine]), whole.tensor)
    total = sum(piece.tensor.nbytes for piece in pieces)
    largest = max((piece.tensor.element_size() for piece in pieces), default=0)
    for share in shares:
        assert abs(sum(piece.tensor.nbytes for piece in share) - total / world) <= largest


@settings(deadline=None)
@given(st.integers(1, 30), st.integers(0, 50), st.integers(1, 5), st.integers(1, 5))
def test_a_share_can_be_dealt_again(count: int, start: int, first: int, second: int) -> None:
    """As rows that several nodes hold alike: each deals out a stretch that begins somewhere in its tensor."""
    whole = Piece("a", WEIGHT, start, torch.arange(count))
    found = [piece for outer in range(first) for piece in dealt([whole], outer, first)]
    again = [piece for share in found for inner in range(second) for piece in dealt([share], inner, second)]
    assert [int(value) + start for piece in again for value in piece.tensor] == list(range(start, start + count))
    assert all(int(piece.tensor[0]) == piece.start - start for piece in again)


def test_a_piece_is_a_view(tmp_path: Path) -> None:
    whole = torch.zeros(10)
    (piece,) = dealt([Piece("a", WEIGHT, 0, whole)], 1, 2)
    whole[7] = 3.0
    assert piece.start == 5 and piece.tensor[2] == 3.0


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_what_many_wrote_is_read_in_any_stretches(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    tensors = data.draw(TENSORS.filter(lambda each: any(count for _, count in each)))
    pieces = pieces_of(tensors)
    world = data.draw(st.integers(1, 5))
    folder = tmp_path_factory.mktemp("pieces")
    files = [file_of(folder, rank, dealt(pieces, rank, world)) for rank in range(world)]
    reader = Reader(data.draw(st.permutations(files)))
    for whole in pieces:
        count = whole.tensor.numel()
        if not count:
            continue
        assert reader.size(whole.name, whole.kind) == count
        assert reader.dtype(whole.name, whole.kind) == whole.tensor.dtype
        # Another partition than the one it was written in.
        edges = sorted({0, count, *data.draw(st.lists(st.integers(0, count), max_size=4))})
        for start, stop in itertools.pairwise(edges):
            assert same(reader.read(whole.name, whole.kind, start, stop), whole.tensor[start:stop])
        assert reader.read(whole.name, whole.kind, count, count).numel() == 0


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_each_type_comes_back_bit_for_bit(tmp_path: Path, dtype: torch.dtype) -> None:
    whole = bits(dtype, 101)
    files = [file_of(tmp_path, rank, dealt([Piece("w", WEIGHT, 0, whole)], rank, 3)) for rank in range(3)]
    assert same(Reader(files).read("w", WEIGHT, 0, 101), whole)
    # The files are those of the format: its own library reads them.
    parts = {int(key.split("@")[1]): part for file in files for key, part in load_file(file).items()}
    assert same(torch.cat([parts[start] for start in sorted(parts)]), whole)


def test_stretches_that_overlap_are_read_once(tmp_path: Path) -> None:
    whole = torch.arange(20)
    parts = [Piece("w", WEIGHT, start, whole[start:stop]) for start, stop in ((0, 9), (3, 5), (4, 15), (12, 20))]
    reader = Reader(file_of(tmp_path, rank, [part]) for rank, part in enumerate(parts))
    for start in range(20):
        for stop in range(start, 21):
            assert torch.equal(reader.read("w", WEIGHT, start, stop), whole[start:stop])


def test_a_rank_without_rows_writes_none_of_them(tmp_path: Path) -> None:
    """Of a tensor with fewer rows than ranks; its bytes are in the files of the others."""
    whole = torch.arange(6.0)
    parts = [Piece("w", WEIGHT, 0, whole[:4]), Piece("w", WEIGHT, 4, whole[4:]), Piece("w", WEIGHT, 6, whole[6:])]
    reader = Reader(file_of(tmp_path, rank, [part]) for rank, part in enumerate(parts))
    assert reader.size("w", WEIGHT) == 6
    assert torch.equal(reader.read("w", WEIGHT, 0, 6), whole)


def test_names_and_kinds(tmp_path: Path) -> None:
    pieces = [Piece(name, kind, 0, torch.zeros(2)) for name in NAMES for kind in (WEIGHT, "exp_avg")]
    reader = Reader([file_of(tmp_path, 0, pieces), file_of(tmp_path, 1, [])])
    assert set(reader.names()) == set(NAMES)
    assert all(name in reader and reader.kinds(name) == ["exp_avg"] for name in NAMES)
    assert "other" not in reader and reader.kinds("other") == []


def test_a_scalar_and_a_tensor_of_any_sizes_are_filled(tmp_path: Path) -> None:
    pieces = [Piece("w", WEIGHT, 0, torch.arange(24.0)), Piece("w", "rms", 0, torch.tensor([7.0]))]
    reader = Reader([file_of(tmp_path, 0, pieces)])
    scalar, rows, turned = torch.tensor(0.0), torch.zeros(2, 4, dtype=torch.bfloat16), torch.zeros(4, 2).t()
    fill(scalar, reader, "w", "rms", 0)
    fill(rows, reader, "w", WEIGHT, 16)
    fill(turned, reader, "w", WEIGHT, 8)
    fill(torch.empty(0), reader, "nothing", WEIGHT, 0)
    assert scalar == 7
    assert rows.tolist() == [[16, 17, 18, 19], [20, 21, 22, 23]]
    assert turned.tolist() == [[8, 9, 10, 11], [12, 13, 14, 15]]


@pytest.mark.parametrize(
    ("present", "start", "stop", "missing"),
    [
        ((1, 2), 0, 30, "0 to 30"),
        ((0, 2), 5, 30, "10 to 30"),
        ((0, 1), 0, 30, "20 to 30"),
        ((0, 2), 12, 18, "12 to 18"),
    ],
)
def test_a_missing_stretch_is_one_line(
    tmp_path: Path, present: tuple[int, ...], start: int, stop: int, missing: str
) -> None:
    whole = [Piece("w", WEIGHT, 0, torch.arange(30))]
    reader = Reader([file_of(tmp_path, rank, dealt(whole, rank, 3)) for rank in present])
    with pytest.raises(UserError) as caught:
        reader.read("w", WEIGHT, start, stop)
    assert str(caught.value) == (
        f"{tmp_path}: elements {missing} of w (weight) are not in its files; gather the files of all nodes in one "
        "folder"
    )
    # What is there is read all the same.
    here = present[0] * 10
    assert torch.equal(reader.read("w", WEIGHT, here, here + 10), torch.arange(here, here + 10))


def test_a_file_that_is_none_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "rank-00000.safetensors").write_bytes(b"no tensors at all")
    for name in ("rank-00000.safetensors", "absent.safetensors"):
        with pytest.raises(UserError, match=rf"{name}: cannot be read: .*; take another checkpoint") as caught:
            Reader([tmp_path / name])
        assert "\n" not in str(caught.value)
