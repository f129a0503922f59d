"""Read the header of a safetensors file, strictly, and without reading its tensors.

The parser is our own because `safetensors.safe_open` memory-maps a path (a file that shrinks kills the process, and may be
replaced after the check), has no limits on the number of tensors, and needs torch or numpy.

The format is specified at https://github.com/huggingface/safetensors#format: the header's length in 8 bytes, the header as
JSON, then the tensors' bytes without gaps and overlaps. Beyond that, the parser only limits sizes.
"""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from peft_core.base_models.checkpoint_info import TensorInfo
from peft_core.errors import HeaderError
from peft_core.system.files import open_regular, read_exactly, refuse_json_bomb

# Bits per element. The format has types of less than a byte; a tensor of such a type must fill a whole number of bytes.
DTYPE_BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
    "U16": 16, "I16": 16, "F16": 16, "BF16": 16,
    "U32": 32, "I32": 32, "F32": 32,
    "U64": 64, "I64": 64, "F64": 64, "C64": 64,
}  # fmt: skip
MAX_NAME_LENGTH = 512
MAX_DIMENSIONS = 8
MAX_ELEMENTS = 1 << 62


@dataclass(frozen=True)
class HeaderLimits:
    header_bytes: int
    tensors: int

    @property
    def json_values(self) -> int:
        """Return the limit of JSON values: a tensor has about fifteen, and there may be metadata."""
        return 20 * self.tensors + 20_000


ADAPTER_LIMITS = HeaderLimits(header_bytes=8 << 20, tensors=20_000)
BASE_LIMITS = HeaderLimits(header_bytes=32 << 20, tensors=100_000)


@dataclass(frozen=True)
class SafetensorsHeader:
    """Tensors and metadata of a file. `size` is the size of the file in bytes."""

    tensors: dict[str, TensorInfo]
    metadata: dict[str, str]
    size: int


def read_header(path: Path, *, limits: HeaderLimits = BASE_LIMITS, follow_links: bool = True) -> SafetensorsHeader:
    """Read names, types, shapes and offsets of all tensors.

    Pass `follow_links=False` for files of unknown origin. Links are followed by default because a Hugging Face cache has them.

    Raises:
        HeaderError: The file is not a safetensors file, or it is malformed.
    """
    with open_regular(path, follow_links=follow_links) as descriptor:
        return parse_header(descriptor, path, limits=limits)


def parse_header(opened: int | bytes, path: Path, *, limits: HeaderLimits = BASE_LIMITS) -> SafetensorsHeader:
    """Parse the header of an open file, given by its descriptor, or of a file's content. `path` is used in messages.

    Raises:
        HeaderError: The file is not a safetensors file, or it is malformed.
    """
    size = os.fstat(opened).st_size if isinstance(opened, int) else len(opened)

    def read(length: int, start: int) -> bytes:
        if isinstance(opened, int):
            return read_exactly(opened, length, start, path)
        return opened[start : start + length]

    if size < 10:  # the length and '{}'
        raise HeaderError(path, f"has {size} bytes, too few for a safetensors file")
    length = int.from_bytes(read(8, 0), "little")
    if length > size - 8:
        raise _not_safetensors(read(min(size, 64), 0), path)
    if length > limits.header_bytes:
        raise HeaderError(path, f"its header has {length} bytes; must be at most {limits.header_bytes}")
    raw = read(length, 8)
    refuse_json_bomb(raw, path, limits.json_values)
    entries = _parse_json(raw, path)
    metadata = _metadata(entries.pop("__metadata__", {}), path)
    if len(entries) > limits.tensors:
        raise HeaderError(path, f"lists {len(entries)} tensors; must be at most {limits.tensors}")
    data_start = 8 + length
    tensors = {name: _tensor(name, entry, data_start, path) for name, entry in entries.items()}
    _check_layout(tensors, data_start, size, path)
    return SafetensorsHeader(tensors, metadata, size)


def _not_safetensors(beginning: bytes, path: Path) -> HeaderError:
    if beginning.startswith(b"version https://git-lfs"):
        problem = "is a Git LFS pointer, not the file itself; fetch it with `git lfs pull`"
        return HeaderError(path, problem, code="git_lfs_pointer")
    return HeaderError(path, "is not a safetensors file, or is truncated (its header is longer than the file)")


def _parse_json(raw: bytes, path: Path) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) != len(pairs):
            raise ValueError("a name occurs twice")
        return result

    def refuse(constant: str) -> NoReturn:
        raise ValueError(f"{constant} is not JSON")

    if not raw.startswith(b"{"):
        raise HeaderError(path, "its header is not a JSON object")
    try:
        entries = json.loads(raw.decode("utf-8"), object_pairs_hook=unique, parse_constant=refuse)
    except RecursionError:
        raise HeaderError(path, "its header is nested too deeply") from None
    except ValueError as error:
        raise HeaderError(path, f"its header is not valid JSON ({error})") from error
    assert isinstance(entries, dict)  # noqa: S101 - it starts with a brace
    return entries


def _metadata(value: object, path: Path) -> dict[str, str]:
    if isinstance(value, dict) and all(isinstance(text, str) for text in value.values()):
        return value
    raise HeaderError(path, "its __metadata__ is not a mapping of strings")


def _tensor(name: str, entry: object, data_start: int, path: Path) -> TensorInfo:
    match entry:
        case {"dtype": str(dtype), "shape": list(shape), "data_offsets": [int(begin), int(end)], **rest} if not rest:
            pass
        case _:
            raise HeaderError(path, f"the entry of tensor {name!r} is malformed")
    if len(name) > MAX_NAME_LENGTH or not name.isprintable():
        raise HeaderError(path, f"a tensor has the invalid name {name[:80]!r}")
    if dtype not in DTYPE_BITS:
        raise HeaderError(path, f"tensor {name!r} has the unknown type {dtype[:32]!r}")
    if len(shape) > MAX_DIMENSIONS or not all(type(axis) is int and axis >= 0 for axis in shape):
        raise HeaderError(path, f"tensor {name!r} has an invalid shape")
    bits = math.prod(shape) * DTYPE_BITS[dtype]
    if (
        bits > MAX_ELEMENTS
        or bits % 8
        or type(begin) is bool
        or type(end) is bool
        or not 0 <= begin <= end <= MAX_ELEMENTS
    ):
        raise HeaderError(path, f"tensor {name!r} has an invalid size")
    if end - begin != bits // 8:
        raise HeaderError(path, f"tensor {name!r} has {end - begin} bytes, but its shape needs {bits // 8}")
    return TensorInfo(name, dtype, tuple(shape), data_start + begin, end - begin)


def _check_layout(tensors: dict[str, TensorInfo], data_start: int, size: int, path: Path) -> None:
    position = data_start
    for tensor in sorted(tensors.values(), key=lambda tensor: (tensor.start, tensor.size)):
        if tensor.start != position:
            kind = "a gap before" if tensor.start > position else "an overlap at"
            raise HeaderError(path, f"its data has {kind} tensor {tensor.name!r}")
        position += tensor.size
    if position != size:
        problem = "it is truncated" if position > size else "bytes follow the last tensor"
        raise HeaderError(path, f"its tensors end at byte {position}, but the file at byte {size}: {problem}")
