"""Read a base model's headers, and cache them until a file changes."""

from __future__ import annotations

import errno
import functools
import os
from pathlib import Path

from peft_core.base_models.checkpoint_info import Checkpoint, unusable
from peft_core.base_models.gguf import shard_paths
from peft_core.base_models.gguf_model import read_gguf_model
from peft_core.base_models.huggingface import read_directory

# For each file: its name, its size in bytes and its modification time in nanoseconds.
FileStates = tuple[tuple[str, int, int], ...]


def read_checkpoint(path: Path) -> Checkpoint:
    """Read configuration and tensor headers of a model directory or a .gguf file; cached until a file changes.

    Raises:
        BaseCheckpointError: The model cannot be used.
        HeaderError: A weights file is malformed.
    """
    return _read(path, file_states(path))


@functools.lru_cache(maxsize=128)  # more than `list_base_models` reads
def _read(path: Path, states: FileStates) -> Checkpoint:  # noqa: ARG001 - part of the cache key
    return read_directory(path) if path.is_dir() else read_gguf_model(path)


def file_states(path: Path) -> FileStates:
    """Return name, size and modification time of a model's files, as a cache key.

    Raises:
        BaseCheckpointError: The files cannot be listed.
    """
    try:
        if path.is_dir():
            with os.scandir(path) as entries:
                files = [(file.name, file.stat()) for file in entries if file.is_file()]
        else:
            files = [(shard.name, shard.stat()) for shard in shard_paths(path) if shard == path or shard.is_file()]
        stats = files or [(path.name, path.stat())]
    except OSError as error:
        if error.errno == errno.ENOMEM:
            raise MemoryError from error  # nothing is wrong with the file
        raise unusable(
            path, f"it cannot be read ({error.strerror})", "Check its permissions, or download it again"
        ) from error
    return tuple(sorted((name, state.st_size, state.st_mtime_ns) for name, state in stats))
