"""What W&B has on the disk: the log of an offline run, as a killed process left it.

The file is a LevelDB log (blocks of 32 KiB, records cut at their ends) of protocol buffers, after seven bytes that
name it.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

_NAME = b":W&B"
_NAME_BYTES = 7
_BLOCK = 1 << 15
# Checksum, size, and whether the piece is a whole record or its first, middle or last part.
_HEAD = struct.Struct("<IHB")
_WHOLE, _FIRST, _MIDDLE, _LAST = 1, 2, 3, 4


def last_step(path: Path) -> int:
    """The highest step that a `.wandb` file holds, -1 for none. What is torn or unreadable counts as not there."""
    from google.protobuf.message import DecodeError  # type: ignore[import-untyped, unused-ignore]
    from wandb.proto.wandb_internal_pb2 import Record  # type: ignore[attr-defined, unused-ignore]

    highest = -1
    try:
        with open(path, "rb") as file:
            for payload in _payloads(file):
                record = Record.FromString(payload)
                if record.HasField("history"):
                    highest = max(highest, record.history.step.num)
    except (OSError, DecodeError):
        pass
    return highest


def _payloads(file: BinaryIO) -> Iterator[bytes]:
    block = file.read(_BLOCK)
    at = _NAME_BYTES if block.startswith(_NAME) else len(block)
    record = b""
    while block:
        while at + _HEAD.size <= len(block):
            _, size, kind = _HEAD.unpack_from(block, at)
            at += _HEAD.size + size
            if not _WHOLE <= kind <= _LAST or at > len(block):
                break
            piece = block[at - size : at]
            record = piece if kind in (_WHOLE, _FIRST) else record + piece
            if kind in (_WHOLE, _LAST):
                yield record
        block, at = file.read(_BLOCK), 0
