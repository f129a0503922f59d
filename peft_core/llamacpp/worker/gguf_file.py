"""Write GGUF files of any size piece by piece, and take over the metadata of an existing file.

The `gguf` package is not used for this: its reader takes five seconds for a vocabulary of 49k tokens and trusts the file, and
its writer cannot take over metadata that it has not parsed. The format is specified at
https://github.com/ggml-org/ggml/blob/master/docs/gguf.md.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

from peft_core.base_models.gguf import read_gguf_header
from peft_core.errors import HeaderError, sanitize
from peft_core.llamacpp.worker.lora_pairs import Array
from peft_core.system.files import open_regular, read_exactly

ALIGNMENT = 32
VERSION = 3
_U32, _I32, _F32, _BOOL, _STRING, _ARRAY = 4, 5, 6, 7, 8, 9
_SCALAR_BYTES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
_MAX_TEXT = 1 << 20  # of a description that is taken over; a chat template has a few thousand characters

Value = int | float | bool | str | Sequence[str] | Sequence[int] | Sequence[float]


@dataclass(frozen=True, slots=True)
class GgufTensor:
    """A tensor to write. The shape is in torch's order, outermost axis first."""

    name: str
    shape: tuple[int, ...]
    kind: GGMLQuantizationType

    @property
    def nbytes(self) -> int:
        per_block, block_bytes = GGML_QUANT_SIZES[self.kind]
        return math.prod(self.shape) // per_block * block_bytes


def write_gguf(
    stream: BinaryIO,
    metadata: Mapping[str, bytes],
    tensors: Sequence[GgufTensor],
    data: Iterable[Iterable[Array]],
) -> None:
    """Write a file.

    Args:
        stream: Opened for writing.
        metadata: Encoded values by key; see `encode` and `copy_metadata`.
        tensors: Their names, shapes and types.
        data: For each tensor, its content in blocks.
    """
    stream.write(b"GGUF" + struct.pack("<IQQ", VERSION, len(tensors), len(metadata)))
    stream.writelines(_text(key) + value for key, value in metadata.items())
    position = 0
    for tensor in tensors:
        axes = struct.pack(f"<{len(tensor.shape)}Q", *reversed(tensor.shape))
        stream.write(_text(tensor.name) + struct.pack("<I", len(tensor.shape)) + axes)
        stream.write(struct.pack("<IQ", tensor.kind.value, position))
        position += -(-tensor.nbytes // ALIGNMENT) * ALIGNMENT
    stream.write(bytes(-stream.tell() % ALIGNMENT))
    for tensor, blocks in zip(tensors, data, strict=True):
        written = 0
        for block in blocks:
            written += stream.write(np.ascontiguousarray(block).data.cast("B"))
        assert written == tensor.nbytes, tensor.name  # noqa: S101 -- a mistake of the caller
        stream.write(bytes(-written % ALIGNMENT))


def encode(value: Value) -> bytes:
    """Encode a metadata value with its type: numbers in 32 bits."""
    if isinstance(value, Sequence) and not isinstance(value, str):
        kind, items = _array_items(list(value))
        return struct.pack("<IIQ", _ARRAY, kind, len(value)) + items
    kind, raw = _scalar(value)
    return struct.pack("<I", kind) + raw


def _array_items(values: list[Any]) -> tuple[int, bytes]:
    if values and all(type(value) is int for value in values):
        return _I32, struct.pack(f"<{len(values)}i", *values)
    encoded = [_scalar(value) for value in values]
    return (encoded[0][0] if encoded else _STRING), b"".join(raw for _, raw in encoded)


def _scalar(value: bool | float | str) -> tuple[int, bytes]:
    match value:
        case bool():
            return _BOOL, struct.pack("<?", value)
        case int():
            return _U32, struct.pack("<I", value)
        case float():
            return _F32, struct.pack("<f", value)
        case _:
            return _STRING, _text(value)


def copy_metadata(path: Path) -> dict[str, bytes]:
    """Return the metadata of a GGUF file, encoded as it is, except that descriptions (`general.*`) lose control characters.

    Of a split model, the first file has the metadata.

    Raises:
        HeaderError: The file is not well-formed.
    """
    header = read_gguf_header(path)  # checks every count and length
    end = min((tensor.start for tensor in header.tensors.values()), default=header.size)
    with open_regular(path, follow_links=True) as descriptor:
        raw = read_exactly(descriptor, end, 0, path)
    try:
        return _pairs(raw)
    except struct.error as error:
        raise HeaderError(path, "has changed while it was read") from error


def _pairs(raw: bytes) -> dict[str, bytes]:
    count = struct.unpack_from("<Q", raw, 16)[0]
    position, pairs = 24, {}
    for _ in range(count):
        size = struct.unpack_from("<Q", raw, position)[0]
        key = raw[position + 8 : position + 8 + size].decode("utf-8", "replace")
        begin = position + 8 + size
        position = _end_of_value(raw, begin)
        value = raw[begin:position]
        if key.startswith("general.") and value[:4] == struct.pack("<I", _STRING):
            value = encode(sanitize(value[12 : 12 + _MAX_TEXT].decode("utf-8", "replace"), limit=None, keep="\n"))
        pairs[sanitize(key, limit=None)] = value
    return pairs


def _end_of_value(raw: bytes, position: int) -> int:
    """Return where the value ends whose type begins at `position`."""
    kind = struct.unpack_from("<I", raw, position)[0]
    position += 4
    if kind == _STRING:
        return position + 8 + int(struct.unpack_from("<Q", raw, position)[0])
    if kind != _ARRAY:
        return position + _SCALAR_BYTES[kind]
    item, count = struct.unpack_from("<IQ", raw, position)
    position += 12
    if item != _STRING:
        return position + int(count) * _SCALAR_BYTES[item]
    unpack = struct.Struct("<Q").unpack_from
    for _ in range(count):
        position += 8 + unpack(raw, position)[0]
    return position


def _text(text: str) -> bytes:
    raw = text.encode()
    return struct.pack("<Q", len(raw)) + raw
