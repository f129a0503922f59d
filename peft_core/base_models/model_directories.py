"""Find the GGUF files that other programs have downloaded: LM Studio, llama.cpp and the Hugging Face cache."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path

MAX_DEPTH = 4  # PUBLISHER/MODEL/FILE; in the Hugging Face cache REPOSITORY/snapshots/COMMIT/FILE
MAX_ENTRIES = 20_000  # that are looked at
_NOT_FIRST = re.compile(r"-(?!00001)\d{5}-of-\d{5}\.gguf$", re.ASCII | re.IGNORECASE)


def lm_studio_directories() -> list[Path]:
    """Return where LM Studio stores models: `~/.lmstudio/models`, and the place of its earlier versions."""
    home = _home()
    return [] if home is None else [home / ".lmstudio" / "models", home / ".cache" / "lm-studio" / "models"]


def llama_cpp_directories() -> list[Path]:
    """Return where llama.cpp's programs store what they download: `LLAMA_CACHE`, or else the user's cache directory."""
    chosen, home = os.environ.get("LLAMA_CACHE", "").strip(), _home()
    if chosen:
        return [Path(chosen).absolute()]
    if home is None:
        return []
    if sys.platform == "darwin":
        return [home / "Library" / "Caches" / "llama.cpp"]
    return [Path(os.environ.get("XDG_CACHE_HOME") or home / ".cache").absolute() / "llama.cpp"]


def gguf_directories() -> list[Path]:
    return [*lm_studio_directories(), *llama_cpp_directories()]


def gguf_files(directory: Path) -> Iterator[Path]:
    """Yield the GGUF files of models below a directory, sorted: of a split model the first file, and no projectors.

    Links to directories are not followed.
    """
    budget = MAX_ENTRIES
    for root, directories, files in os.walk(directory):
        depth = len(Path(root).relative_to(directory).parts)
        budget -= len(directories) + len(files)
        directories[:] = sorted(name for name in directories if not name.startswith(".") and name != "blobs")
        if depth >= MAX_DEPTH - 1 or budget < 0:
            directories.clear()
        for name in sorted(files):
            if name.lower().endswith(".gguf") and "mmproj" not in name.lower() and not _NOT_FIRST.search(name):
                yield Path(root, name)


def _home() -> Path | None:
    try:
        return Path.home()
    except RuntimeError:  # the home directory is unknown
        return None
