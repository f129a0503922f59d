"""Find a base model on the node where a run takes place, or install there what was sent through the object store."""

from __future__ import annotations

import hashlib
import math
import shutil
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from peft_core.base_models.checkpoint import read_checkpoint
from peft_core.base_models.fingerprint import fingerprint
from peft_core.base_models.resolve import candidates, resolve
from peft_core.base_models.tokenizer_files import TOKENIZER
from peft_core.cluster.shelves import fetch
from peft_core.config import Settings
from peft_core.errors import ClusterError, PeftMcpError
from peft_core.schemas.base_model import Base
from peft_core.system.files import open_regular, read_exactly
from peft_core.system.lock import FileLock

_SENT_FILES = ("*.json", "*.jinja", "tokenizer.model")  # of a model directory, besides its weights: no code, no pickles
_SLACK_BYTES = 256 << 20  # tokenizer and configuration, which `Base.size_bytes` does not count


def identity(base: Base) -> str:
    """Return a hash of what a training depends on: architecture, sampled weights, and the vocabulary.

    Raises:
        BaseCheckpointError, HeaderError: Its files cannot be read.
    """
    path = base.path
    checkpoint = read_checkpoint(path)
    if checkpoint.format == "gguf":
        vocabulary, end = path, min((tensor.start for file, tensor in checkpoint.stored if file == path), default=0)
    else:
        vocabulary = path / TOKENIZER
        end = vocabulary.stat().st_size
    with open_regular(vocabulary, follow_links=True) as descriptor:
        digest = hashlib.sha256(read_exactly(descriptor, end, 0, vocabulary)).hexdigest()
    found = fingerprint(path)
    parts = f"{checkpoint.format} {found.architecture} {found.sample} {digest}"
    return hashlib.sha256(parts.encode()).hexdigest()


def files_to_send(base: Base) -> list[tuple[str, Path]]:
    """Return the files of a base model by name: its weights, and of a directory also configuration and tokenizer."""
    files = {file.name: file for file, _ in read_checkpoint(base.path).stored}
    if base.format == "gguf":
        files[base.path.name] = base.path  # the first file of a split model may have no tensors
    else:
        files |= {path.name: path for pattern in _SENT_FILES for path in base.path.glob(pattern) if path.is_file()}
    return sorted(files.items())


def locate(base: Base, wanted: str, settings: Settings) -> Path | None:
    """Return where this node has the base model with the identity `wanted`: by path, name, hub id, or sent earlier."""
    for candidate in _candidates(base, wanted, settings):
        try:
            found = candidate()
            if found.format == base.format and identity(found) == wanted:
                return found.path
        except (PeftMcpError, OSError):
            continue
    return None


def install(base: Base, wanted: str, holder: Any, settings: Settings) -> Path:
    """Fetch a base model into this node's data directory, and check that it is the wanted one.

    One process of a node fetches it; the others wait for it.

    Raises:
        ClusterError: `cluster_base_differs`, `cluster_node_disk`, `cluster_transfer`.
    """
    target = _sent(wanted, settings)
    target.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(target.parent / ".lock") as lock:
        lock.acquire(math.inf)
        if (found := locate(base, wanted, settings)) is not None:
            return found
        free = shutil.disk_usage(target.parent).free
        if free < base.size_bytes + _SLACK_BYTES:
            raise ClusterError(
                f"The node has {free / 1e9:.1f} GB of free disk space, but {base.name} has {base.size_bytes / 1e9:.1f} GB.",
                code="cluster_node_disk",
                suggestions=["Free disk space on the node, or set CODEBASE_GARDENER_DATA_DIR there to a larger disk"],
            )
        temporary = Path(tempfile.mkdtemp(prefix=".receiving-", dir=target.parent))
        try:
            fetch(
                holder,
                "base",
                temporary,
                max_bytes=base.size_bytes + _SLACK_BYTES,
                what=f"The base model {base.name}",
            )
            _require_same(base, wanted, _model_in(temporary, base))
            shutil.rmtree(target, ignore_errors=True)  # one that has been damaged, or `locate` would have found it
            temporary.rename(target)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    return _model_in(target, base)


def _candidates(base: Base, wanted: str, settings: Settings) -> Iterator[Callable[[], Base]]:
    offline = settings.model_copy(update={"allow_downloads": False})
    yield partial(resolve, str(base.path), offline)
    yield from candidates(base.name, base.revision, offline)
    yield partial(resolve, base.ref, offline)
    sent = _sent(wanted, settings)
    if sent.is_dir():
        yield lambda: resolve(str(_model_in(sent, base)), offline.model_copy(update={"allowed_roots": None}))


def _sent(wanted: str, settings: Settings) -> Path:
    return settings.paths.cluster_bases / wanted[:24]


def _model_in(directory: Path, base: Base) -> Path:
    return directory / base.path.name if base.format == "gguf" else directory


def _require_same(base: Base, wanted: str, path: Path) -> None:
    try:
        same = identity(base.model_copy(update={"path": path})) == wanted
    except (PeftMcpError, OSError):
        same = False
    if not same:
        raise ClusterError(
            f"The files that were sent as {base.name} are not this base model: their fingerprint differs.",
            code="cluster_base_differs",
            suggestions=["Call train_adapter again: it reads the base model's files anew"],
        )
