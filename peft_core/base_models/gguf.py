"""Read the header of a GGUF file: metadata and the list of tensors, without their data.

The format is specified at https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. The parser is our own because the
`gguf` package takes seconds for a vocabulary of 49k tokens, imports numpy, and trusts the file. It reads through a buffer,
because a process is killed if a file that it has memory-mapped shrinks.
"""

from __future__ import annotations

import math
import os
import re
import struct
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from peft_core.base_models.checkpoint_info import TensorInfo
from peft_core.errors import HeaderError
from peft_core.system.files import open_regular, read_exactly

# Each type number maps to (name, elements per block, bytes per block).
GGML_TYPES: dict[int, tuple[str, int, int]] = {
    0: ("F32", 1, 4), 1: ("F16", 1, 2), 2: ("Q4_0", 32, 18), 3: ("Q4_1", 32, 20), 6: ("Q5_0", 32, 22),
    7: ("Q5_1", 32, 24), 8: ("Q8_0", 32, 34), 9: ("Q8_1", 32, 40), 10: ("Q2_K", 256, 84), 11: ("Q3_K", 256, 110),
    12: ("Q4_K", 256, 144), 13: ("Q5_K", 256, 176), 14: ("Q6_K", 256, 210), 15: ("Q8_K", 256, 292),
    16: ("IQ2_XXS", 256, 66), 17: ("IQ2_XS", 256, 74), 18: ("IQ3_XXS", 256, 98), 19: ("IQ1_S", 256, 50),
    20: ("IQ4_NL", 32, 18), 21: ("IQ3_S", 256, 110), 22: ("IQ2_S", 256, 82), 23: ("IQ4_XS", 256, 136),
    24: ("I8", 1, 1), 25: ("I16", 1, 2), 26: ("I32", 1, 4), 27: ("I64", 1, 8), 28: ("F64", 1, 8),
    29: ("IQ1_M", 256, 56), 30: ("BF16", 1, 2), 34: ("TQ1_0", 256, 54), 35: ("TQ2_0", 256, 66),
    39: ("MXFP4", 32, 17), 40: ("NVFP4", 64, 36), 41: ("Q1_0", 128, 18),
}  # fmt: skip
# The types that gguf.quants can dequantise.
DEQUANTISABLE = frozenset({
    "F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ1_S", "IQ1_M",
    "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "IQ4_NL", "IQ4_XS", "TQ1_0", "TQ2_0", "MXFP4", "NVFP4",
})  # fmt: skip
_SCALARS = {
    0: struct.Struct("<B"), 1: struct.Struct("<b"), 2: struct.Struct("<H"), 3: struct.Struct("<h"),
    4: struct.Struct("<I"), 5: struct.Struct("<i"), 6: struct.Struct("<f"), 7: struct.Struct("<?"),
    10: struct.Struct("<Q"), 11: struct.Struct("<q"), 12: struct.Struct("<d"),
}  # fmt: skip
_STRING, _ARRAY = 8, 9
_MAGIC = b"GGUF"
_SHARD = re.compile(
    r"(?P<name>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})(?P<suffix>\.gguf)", re.ASCII | re.IGNORECASE | re.DOTALL
)
MAX_SHARDS = 1000
_U64 = struct.Struct("<Q")
_CHUNK = 4 << 20

# These limits are far above every real model; a count beyond them is an attack or an accident.
MAX_HEADER_BYTES = 128 << 20
MAX_PAIRS = 1 << 16
MAX_TENSORS = 1 << 17
MAX_ARRAY_ITEMS = 4_000_000  # in all arrays of a file; the largest have 262k tokens and twice as many merges
MAX_STRING_BYTES = 1 << 20  # per string; a longer metadata value (an embedded tokenizer.json) is skipped
MAX_TOTAL_STRING_BYTES = 16 << 20  # in all strings of a file that are not skipped, including keys and names
MAX_KEY_BYTES = (1 << 16) - 1
MAX_NAME_BYTES = 256
MAX_DIMENSIONS = 4
MAX_ALIGNMENT = 1 << 16
MAX_ELEMENTS = 1 << 48


@dataclass(frozen=True, slots=True)
class ArrayInfo:
    """An array or an overlong string that was skipped. `kind` is GGUF's number of the element type."""

    kind: int
    count: int


Value = int | float | bool | str | ArrayInfo | tuple[int | float | bool | str, ...]


@dataclass(frozen=True)
class GgufHeader:
    """Metadata and tensors of a file, and its size in bytes. Shapes are in torch's order, outermost axis first."""

    metadata: dict[str, Value]
    tensors: dict[str, TensorInfo]
    size: int

    def text(self, key: str) -> str | None:
        value = self.metadata.get(key)
        return value if isinstance(value, str) else None

    def integer(self, key: str) -> int | None:
        value = self.metadata.get(key)
        return value if isinstance(value, int) and not isinstance(value, bool) else None

    def number(self, key: str) -> float | None:
        value = self.metadata.get(key)
        return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None

    def count(self, key: str) -> int | None:
        """Return the length of an array, whether it was read or skipped; None if there is no such array."""
        value = self.metadata.get(key)
        if isinstance(value, ArrayInfo):
            return value.count
        return len(value) if isinstance(value, tuple) else None


def is_gguf(path: Path) -> bool:
    """Return whether a file begins as a GGUF file does. Ollama and others give them names without the suffix.

    Raises:
        HeaderError: It cannot be read.
    """
    with open_regular(path, follow_links=True) as descriptor:
        return os.pread(descriptor, len(_MAGIC), 0) == _MAGIC


def shard_paths(path: Path) -> tuple[Path, ...]:
    """Return the files of a model that is split into several, in order, by the name of one of them; otherwise `path` alone.

    llama.cpp writes and reads such files as NAME-00001-of-00003.gguf.
    """
    match = _SHARD.fullmatch(path.name)
    if match is None or not 1 <= int(match["number"]) <= int(match["count"]) <= MAX_SHARDS:
        return (path,)
    return tuple(
        path.with_name(f"{match['name']}-{number:05}-of-{match['count']}{match['suffix']}")
        for number in range(1, int(match["count"]) + 1)
    )


def read_gguf_header(path: Path, *, arrays: Collection[str] = ()) -> GgufHeader:
    """Read metadata and tensor entries. Arrays are only counted, except those named in `arrays`.

    Raises:
        HeaderError: The file is not a GGUF file of version 2 or 3, or it is malformed.
    """
    with open_regular(path, follow_links=True) as descriptor:
        reader = _Reader(descriptor, path)
        magic, version = reader.take(4), reader.u32()
        if magic != _MAGIC:
            raise reader.error("is not a GGUF file")
        if version not in (2, 3):
            big_endian = int.from_bytes(version.to_bytes(4, "little"), "big") in (2, 3)
            raise reader.error(
                "is a big-endian GGUF file; must be little-endian"
                if big_endian
                else f"has GGUF version {version}; must be 2 or 3"
            )
        tensor_count, pair_count = reader.u64(), reader.u64()
        if tensor_count > MAX_TENSORS or pair_count > MAX_PAIRS:
            raise reader.error(
                f"claims {tensor_count} tensors and {pair_count} metadata entries; "
                f"must be at most {MAX_TENSORS} and {MAX_PAIRS}"
            )
        metadata: dict[str, Value] = {}
        for _ in range(pair_count):
            key = reader.string(MAX_KEY_BYTES)
            if key in metadata:
                raise reader.error(f"metadata key {key[:80]!r} occurs twice")
            metadata[key] = reader.value(keep=key in arrays)
        entries = [reader.tensor() for _ in range(tensor_count)]
        alignment = metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or not 0 < alignment <= MAX_ALIGNMENT or alignment & (alignment - 1):
            raise reader.error(f"its alignment is {alignment!r}; must be a power of two up to {MAX_ALIGNMENT}")
        data_start = -(-reader.position // alignment) * alignment
        return GgufHeader(metadata, _located(entries, data_start, alignment, reader), reader.size)


def _located(entries: list[TensorInfo], data_start: int, alignment: int, reader: _Reader) -> dict[str, TensorInfo]:
    """Return the tensors with absolute offsets, after checking that they are inside the file and do not overlap."""
    tensors: dict[str, TensorInfo] = {}
    position = data_start
    for entry in sorted(entries, key=lambda entry: (entry.start, entry.size)):
        start = data_start + entry.start
        if entry.name in tensors:
            raise reader.error(f"tensor {entry.name!r} occurs twice")
        if entry.start % alignment:
            raise reader.error(f"tensor {entry.name!r} is not aligned to {alignment} bytes")
        if start < position:
            raise reader.error(f"tensor {entry.name!r} overlaps another tensor")
        position = start + entry.size
        if position > reader.size:
            raise reader.error(
                f"is truncated: tensor {entry.name!r} ends at byte {position}, but the file at byte {reader.size}"
            )
        tensors[entry.name] = TensorInfo(entry.name, entry.dtype, entry.shape, start, entry.size)
    return {entry.name: tensors[entry.name] for entry in entries}


class _Reader:
    """A cursor over the beginning of a file, which buffers one chunk instead of the complete header."""

    def __init__(self, descriptor: int, path: Path) -> None:
        self.size = os.fstat(descriptor).st_size
        self.position = 0
        self._descriptor = descriptor
        self._path = path
        self._buffer = b""
        self._start = 0  # where the buffer begins in the file
        self._items_left = MAX_ARRAY_ITEMS
        self._string_bytes_left = MAX_TOTAL_STRING_BYTES

    def error(self, problem: str) -> HeaderError:
        return HeaderError(self._path, problem)

    def take(self, size: int) -> bytes:
        self._fill_buffer(size)
        begin = self.position - self._start
        self.position += size
        return self._buffer[begin : begin + size]

    def skip(self, size: int) -> None:
        self.position += size
        self._check_end(self.position)

    def u32(self) -> int:
        return int.from_bytes(self.take(4), "little")

    def u64(self) -> int:
        return int.from_bytes(self.take(8), "little")

    def string(self, limit: int = MAX_STRING_BYTES) -> str:
        return self._text(self.u64(), limit)

    def _text(self, size: int, limit: int = MAX_STRING_BYTES) -> str:
        if size > limit:
            raise self.error(f"a string has {size} bytes; must be at most {limit}")
        self._string_bytes_left -= size
        if self._string_bytes_left < 0:
            raise self.error(f"its strings have more than {MAX_TOTAL_STRING_BYTES} bytes in total, which is the limit")
        # llama.cpp is not strict here either: an invalid byte in a description is no reason to reject a model.
        return self.take(size).decode("utf-8", "replace")

    def value(self, *, keep: bool) -> Value:
        kind = self.u32()
        if kind == _ARRAY:
            return self._array(keep=keep)
        if kind == _STRING and (size := self.u64()) > MAX_STRING_BYTES:
            self.skip(size)
            return ArrayInfo(_STRING, size)
        return self._text(size) if kind == _STRING else self._scalar(kind)

    def tensor(self) -> TensorInfo:
        """Read one tensor entry; its `start` is relative to the data section."""
        name = self.string(MAX_NAME_BYTES)
        if not name.isprintable():
            raise self.error(f"a tensor has the invalid name {name!r}")
        dimensions = self.u32()
        if dimensions > MAX_DIMENSIONS:
            raise self.error(f"tensor {name!r} has {dimensions} dimensions; must be at most {MAX_DIMENSIONS}")
        shape = tuple(reversed([self.u64() for _ in range(dimensions)]))
        kind, start = self.u32(), self.u64()
        if kind not in GGML_TYPES:
            raise self.error(f"tensor {name!r} has the unknown type {kind}")
        dtype, per_block, block_bytes = GGML_TYPES[kind]
        elements = math.prod(shape)
        if elements > MAX_ELEMENTS or (shape[-1] if shape else 1) % per_block:
            raise self.error(f"tensor {name!r} has an invalid shape for {dtype}: {shape}")
        return TensorInfo(name, dtype, shape, start, elements // per_block * block_bytes)

    def _scalar(self, kind: int) -> int | float | bool | str:
        if kind == _STRING:
            return self.string()
        if kind not in _SCALARS:
            raise self.error(f"a metadata value has the unknown type {kind}")
        scalar = _SCALARS[kind]
        value: int | float | bool = scalar.unpack(self.take(scalar.size))[0]
        return value

    def _array(self, *, keep: bool) -> Value:
        kind, count = self.u32(), self.u64()
        if kind != _STRING and kind not in _SCALARS:
            raise self.error(f"an array has the element type {kind}, which is not supported")
        if count > self._items_left:
            raise self.error(
                f"an array of {count} elements exceeds the limit of {MAX_ARRAY_ITEMS} elements in all arrays"
            )
        self._items_left -= count
        if keep:
            return tuple(self._scalar(kind) for _ in range(count))
        if kind == _STRING:
            self._skip_strings(count)
        else:
            self.skip(count * _SCALARS[kind].size)
        return ArrayInfo(kind, count)

    def _skip_strings(self, count: int) -> None:
        """Skip `count` strings. This is the hot loop, hence the local variables."""
        unpack, position, available = _U64.unpack_from, self.position - self._start, len(self._buffer)
        for _ in range(count):
            if position + 8 > available:
                self.position = self._start + position
                self._fill_buffer(8)
                position, available = self.position - self._start, len(self._buffer)
            position += 8 + unpack(self._buffer, position)[0]
        self.position = self._start + position
        self._check_end(self.position)

    def _fill_buffer(self, size: int) -> None:
        """Fill the buffer unless it contains `size` bytes from the cursor on."""
        end = self.position + size
        if end <= self._start + len(self._buffer):
            return
        self._check_end(end)
        self._start = self.position
        length = min(max(size, _CHUNK), self.size - self._start)
        self._buffer = read_exactly(self._descriptor, length, self._start, self._path)

    def _check_end(self, end: int) -> None:
        if end > self.size:
            raise self.error("is truncated: it ends inside its header")
        if end > MAX_HEADER_BYTES:
            raise self.error(f"its header is longer than {MAX_HEADER_BYTES} bytes, which is the limit")
