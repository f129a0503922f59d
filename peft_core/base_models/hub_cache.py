"""Find models in the local Hugging Face cache by their hub id, and download them if the user has allowed it."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft_core.errors import BaseCheckpointError

_COMMIT = re.compile(r"[0-9a-f]{40}", re.ASCII)
_BLOB = re.compile(r"(?:\.\./)+blobs/[0-9a-f]{40}(?:[0-9a-f]{24})?", re.ASCII)
_HUB_ID = re.compile(r"(?:[A-Za-z0-9][\w.-]{0,95}/)?[A-Za-z0-9][\w.-]{0,95}", re.ASCII)
_REVISION = re.compile(r"[A-Za-z0-9_][\w./-]{0,199}", re.ASCII)
# These patterns exclude pickles, and further copies in other frameworks' formats or in subdirectories.
_FILES: dict[str, Any] = {
    "allow_patterns": ["*.safetensors", "*.json", "*.jinja", "tokenizer.model"],
    "ignore_patterns": ["*/*", "consolidated*", "*.fp16.safetensors"],
}


@dataclass(frozen=True)
class HubRef:
    """A reference `org/name` or `org/name@revision`; a revision is a branch, a tag or a full commit hash."""

    repo_id: str
    revision: str | None

    def __str__(self) -> str:
        return self.repo_id if self.revision is None else f"{self.repo_id}@{self.revision}"


@dataclass(frozen=True)
class Snapshot:
    path: Path
    repo_id: str
    commit: str


def parse_hub_ref(ref: str) -> HubRef | None:
    """Parse a hub id; None if `ref` cannot be one."""
    repo_id, separator, revision = ref.partition("@")
    if not _HUB_ID.fullmatch(repo_id) or "--" in repo_id or ".." in repo_id:
        return None
    if separator and (not _REVISION.fullmatch(revision) or ".." in revision):
        return None
    return HubRef(repo_id, revision if separator else None)


def cache_directory() -> Path:
    from huggingface_hub import constants  # noqa: PLC0415 -- takes 0.25 s

    return Path(constants.HF_HUB_CACHE)


def find_snapshot(ref: HubRef) -> Snapshot | None:
    """Return the cached snapshot of a hub id; None if it is not cached completely. Never uses the network."""
    from huggingface_hub import snapshot_download  # noqa: PLC0415 -- see cache_directory
    from huggingface_hub.errors import LocalEntryNotFoundError  # noqa: PLC0415 -- see cache_directory

    try:
        path = snapshot_download(ref.repo_id, revision=ref.revision, local_files_only=True, **_FILES)
    except (LocalEntryNotFoundError, OSError, ValueError):  # ValueError: not a hub id, or a damaged ref
        return None
    return snapshot_at(Path(path))


def snapshot_at(path: Path) -> Snapshot | None:
    """Return the snapshot at a path in the cache, whose parts name the model and the commit; None for any other path."""
    if path.parent.name != "snapshots" or not _COMMIT.fullmatch(path.name):
        return None
    kind, *name = path.parent.parent.name.split("--")
    return Snapshot(path, "/".join(name), path.name) if kind == "models" and 1 <= len(name) <= 2 else None


def blob_of(path: Path) -> Path:
    """Return the file to which a link in a snapshot of the cache leads; any other path, also any other link, as it is.

    A snapshot consists of links to the files of the same repository, whose names are their hashes.
    """
    try:
        target = str(path.readlink())
    except (OSError, ValueError):
        return path
    snapshot = next((parent for parent in path.parents if snapshot_at(parent) is not None), None)
    if snapshot is None or not _BLOB.fullmatch(target):
        return path
    blob = Path(os.path.normpath(path.parent / target))
    return blob if blob.parent == snapshot.parent.parent / "blobs" else path


def cached_models() -> list[str]:
    """Return the hub ids of the models in the cache. This reads the complete cache, so call it only for error messages."""
    from huggingface_hub import scan_cache_dir  # noqa: PLC0415 -- see cache_directory
    from huggingface_hub.errors import CacheNotFound  # noqa: PLC0415 -- see cache_directory

    try:
        repositories = scan_cache_dir(cache_directory()).repos
    except (CacheNotFound, OSError, ValueError):
        return []
    return sorted(repository.repo_id for repository in repositories if repository.repo_type == "model")


def download(ref: HubRef) -> Snapshot:
    """Fetch a model into the cache, which takes minutes. Call it only if the user has allowed downloads.

    Raises:
        BaseCheckpointError: The model does not exist or needs a login, or the network failed.
    """
    from huggingface_hub import snapshot_download  # noqa: PLC0415 -- see cache_directory
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError  # noqa: PLC0415 -- see cache_directory

    try:
        path = Path(snapshot_download(ref.repo_id, revision=ref.revision, **_FILES))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise BaseCheckpointError(
            f"The base model {ref} could not be downloaded: {str(error).strip().splitlines()[0]}",
            code="base_model_download",
            suggestions=(
                f"Check the id at https://huggingface.co/{ref.repo_id} and the network",
                "For a gated model, accept its terms on that page and log in with `hf auth login`",
            ),
        ) from error
    return Snapshot(path, ref.repo_id, path.name)


def is_offline() -> bool:
    """Return whether huggingface_hub is configured not to use the network (HF_HUB_OFFLINE)."""
    from huggingface_hub import constants  # noqa: PLC0415 -- see cache_directory

    return bool(constants.HF_HUB_OFFLINE)
