"""Read each file of an adapter once: the configuration, the headers and, on request, the weights.

The files are untrusted: links are not followed (but those of the Hugging Face cache to its own files), only regular files are
opened, and sizes are bounded. All problems are collected, not only the first. If the weights are kept, the bytes that are
checked are the bytes that are loaded, so replacing a file after the check has no effect.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from peft_core.adapters.config_check import LoraSettings, check_settings
from peft_core.adapters.directory import layout_of, missing_files
from peft_core.adapters.findings import error
from peft_core.adapters.layout import MLX, PEFT, Layout
from peft_core.adapters.manifest import CONFIG, Manifest, read_manifest
from peft_core.adapters.mlx_config import check_mlx_settings
from peft_core.adapters.weight_check import WeightCheck
from peft_core.base_models.checkpoint_info import TensorInfo
from peft_core.base_models.hub_cache import blob_of
from peft_core.base_models.safetensors import ADAPTER_LIMITS, SafetensorsHeader, parse_header
from peft_core.errors import HeaderError, sanitize
from peft_core.schemas.results import Reason
from peft_core.system.files import open_regular, read_exactly, read_small

MAX_CONFIG_BYTES = 256 << 10
MAX_WEIGHTS_BYTES = 4 << 30  # limit for reading: a sparse file of any size costs an attacker nothing
# The server checks weights in its threads, and the C library keeps freed memory for each thread: whole files would pile up.
PIECE_BYTES = 64 << 10  # a multiple of each number's width

WeightsUse = Literal["skip", "scan", "keep"]


@dataclass(frozen=True, repr=False)
class AdapterFiles:
    """The content of an adapter's directory. A field is None if its file is missing or was rejected; see `reasons`."""

    directory: Path
    settings: LoraSettings | None
    tensors: Mapping[str, TensorInfo] | None
    sha256: str | None  # of the weights' file; None if it was not read
    weights: bytes | None  # the complete file, whose parsed header is `tensors`; None if it was not kept
    weight_reasons: tuple[Reason, ...] | None  # what is wrong with the values; None if they were not read
    manifest: Manifest | None
    base_hint: str | None  # the base model's name in the configuration: only shown to people, never used as a path
    reasons: tuple[Reason, ...]
    layout: Layout = PEFT

    @property
    def weights_size(self) -> int:
        """Return the size of all tensors in bytes, according to the header."""
        return sum(tensor.size for tensor in (self.tensors or {}).values())


def read_adapter(directory: Path, *, weights: WeightsUse = "skip") -> AdapterFiles:
    """Read everything that the check needs, opening each file once. Problems become findings, never exceptions.

    Args:
        directory: The adapter's directory.
        weights: Whether the weights are left unread, checked in pieces of `PIECE_BYTES`, or checked and kept in memory.
            They are not read if their header is malformed.
    """
    layout = layout_of(directory)
    reasons = missing_files(directory)
    manifest = read_manifest(directory)
    recorded = manifest.files if manifest is not None else {}

    config: dict[str, Any] | None = None
    settings: LoraSettings | None = None
    if os.path.lexists(directory / CONFIG):
        try:
            raw = read_small(blob_of(directory / CONFIG), MAX_CONFIG_BYTES)
            reasons += _compare_hash(CONFIG, hashlib.sha256(raw).hexdigest(), recorded)
            config = _parse_config(raw, directory / CONFIG)
        except HeaderError as problem:
            reasons.append(_unreadable(problem, CONFIG))
        else:
            settings, findings = check_mlx_settings(config) if layout is MLX else check_settings(config)
            reasons += findings

    read: _Weights | None = None
    if os.path.lexists(directory / layout.weights):
        try:
            read = _read_weights(blob_of(directory / layout.weights), weights)
        except HeaderError as problem:
            reasons.append(_unreadable(problem, layout.weights))
    if read is not None and read.sha256 is not None:
        reasons += _compare_hash(layout.weights, read.sha256, recorded)

    hint = config.get("model" if layout is MLX else "base_model_name_or_path") if config is not None else None
    return AdapterFiles(
        directory=directory,
        settings=settings,
        tensors=read.tensors if read is not None else None,
        sha256=read.sha256 if read is not None else None,
        weights=read.kept if read is not None else None,
        weight_reasons=read.reasons if read is not None else None,
        manifest=manifest,
        base_hint=hint if isinstance(hint, str) and hint else None,
        reasons=tuple(reasons),
        layout=layout,
    )


def read_adapter_config(directory: Path) -> dict[str, Any]:
    """Read the adapter's configuration without checking its settings.

    Raises:
        HeaderError: the file is missing, a link, larger than 256 KB, or not a JSON object with unique names.
    """
    path = blob_of(directory / CONFIG)
    return _parse_config(read_small(path, MAX_CONFIG_BYTES), path)


@dataclass(frozen=True, repr=False)
class _Weights:
    tensors: Mapping[str, TensorInfo]
    sha256: str | None = None  # of the whole file; None, as the next two, if only its header was read
    reasons: tuple[Reason, ...] | None = None
    kept: bytes | None = None


def _read_weights(path: Path, use: WeightsUse) -> _Weights:
    with open_regular(path, follow_links=False) as descriptor:
        header = parse_header(descriptor, path, limits=ADAPTER_LIMITS)
        if use == "skip":
            return _Weights(header.tensors)
        if header.size > MAX_WEIGHTS_BYTES:
            raise HeaderError(path, f"has {header.size} bytes, but at most {MAX_WEIGHTS_BYTES} can be loaded")
        if use == "scan":
            return _scan(header, lambda start, size: read_exactly(descriptor, size, start, path))
        kept = read_exactly(descriptor, header.size, 0, path)
    # Parse these bytes again: the file may have changed since the header was read.
    header = parse_header(kept, path, limits=ADAPTER_LIMITS)
    return replace(_scan(header, lambda start, size: kept[start : start + size]), kept=kept)


def _scan(header: SafetensorsHeader, read: Callable[[int, int], bytes]) -> _Weights:
    """Hash a file and check its values in one pass. `read(start, size)` returns a part of it.

    The header's parser has made sure that the tensors follow each other to the file's end without gaps.
    """
    digest, check = hashlib.sha256(), WeightCheck()
    tensors = sorted(header.tensors.values(), key=lambda tensor: (tensor.start, tensor.size))
    for start, size in _pieces(0, header.size - sum(tensor.size for tensor in tensors)):
        digest.update(read(start, size))
    for tensor in tensors:
        for start, size in _pieces(tensor.start, tensor.size):
            piece = read(start, size)
            digest.update(piece)
            check.add(tensor, piece)
    return _Weights(header.tensors, digest.hexdigest(), tuple(check.findings()))


def _pieces(start: int, size: int) -> Iterator[tuple[int, int]]:
    """Yield start and size of each piece; an empty tensor is one empty piece."""
    end = start + size
    for begin in range(start, max(end, start + 1), PIECE_BYTES):
        yield begin, min(PIECE_BYTES, end - begin)


def _parse_config(raw: bytes, path: Path) -> dict[str, Any]:
    def unique_names(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) != len(pairs):
            raise HeaderError(path, "contains a setting twice, and JSON parsers differ in which of the two they use")
        return result

    try:
        config = json.loads(raw.decode("utf-8-sig"), object_pairs_hook=unique_names)
    except (ValueError, RecursionError) as problem:
        raise HeaderError(path, "is not JSON") from problem
    if not isinstance(config, dict):
        raise HeaderError(path, "is not a JSON object")
    return config


def _compare_hash(name: str, found: str, recorded: Mapping[str, str]) -> list[Reason]:
    """Return an error if a file's hash differs from the manifest's. Nothing else reveals an edited alpha."""
    expected = recorded.get(name)
    if expected is None or found == expected:
        return []
    message = f"{name} was altered after training: its SHA-256 differs from the one in the manifest."
    fix = "Restore the file, or train again"
    return [error("altered", message, found=found, expected=sanitize(expected), where=name, fix=fix)]


def _unreadable(problem: HeaderError, name: str) -> Reason:
    if problem.code == "git_lfs_pointer":
        fix = "Download the file itself with `git lfs pull`"
        return error("git_lfs_pointer", problem.message, where=name, fix=fix)
    fix = "Download the adapter again, or train it again"
    if "symbolic link" in problem.message:
        fix = "Give a directory with the files themselves: `cp -rL` copies one and replaces links by files"
    return error("bad_file", problem.message, where=name, fix=fix)
