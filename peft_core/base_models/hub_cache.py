"""Models in the local Hugging Face cache, found without importing huggingface_hub (a quarter of a second).

Layout: https://huggingface.co/docs/huggingface_hub/guides/manage-cache.
models--ORG--NAME/{refs/main, snapshots/COMMIT/…, blobs/…}; the files of a snapshot are links into blobs.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

from peft_core.errors import BaseCheckpointError

_COMMIT = re.compile(r"[0-9a-f]{40}", re.ASCII)
_HUB_ID = re.compile(r"(?:[A-Za-z0-9][\w.-]{0,95}/)?[A-Za-z0-9][\w.-]{0,95}", re.ASCII)
_REVISION = re.compile(r"[A-Za-z0-9_][\w./-]{0,199}", re.ASCII)
# What a model needs and no more: no pickles, no second copies in other frameworks' formats or in subdirectories.
WANTED = ("*.safetensors", "*.json", "*.jinja", "tokenizer.model")
UNWANTED = ("*/*", "consolidated*", "*.fp16.safetensors")


@dataclass(frozen=True)
class HubRef:
    """`org/name` or `org/name@revision`; a revision is a branch, a tag or a whole commit."""

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
    """The hub id that `ref` may be; None where it cannot be one."""
    repo_id, at, revision = ref.partition("@")
    if not _HUB_ID.fullmatch(repo_id) or "--" in repo_id or ".." in repo_id:
        return None
    if at and (not _REVISION.fullmatch(revision) or ".." in revision):
        return None
    return HubRef(repo_id, revision if at else None)


def cache_directory() -> Path:
    """Where huggingface_hub keeps models, by the same variables in the same order."""
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
        if os.environ.get(name):
            return _expanded(os.environ[name])
    if os.environ.get("HF_HOME"):
        return _expanded(os.environ["HF_HOME"]) / "hub"
    return _expanded(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "huggingface" / "hub"


def find_snapshot(ref: HubRef) -> Snapshot | None:
    """The cached snapshot of a hub id; None where there is none."""
    repository = cache_directory() / f"models--{ref.repo_id.replace('/', '--')}"
    revision = ref.revision or "main"
    commit = revision if _COMMIT.fullmatch(revision) else _read_ref(repository / "refs" / revision)
    if commit is None or not (repository / "snapshots" / commit).is_dir():
        return None
    return Snapshot(repository / "snapshots" / commit, ref.repo_id, commit)


def snapshot_at(path: Path) -> Snapshot | None:
    """The snapshot that a path into the cache denotes, so that its name and commit are known."""
    if path.parent.name != "snapshots" or not _COMMIT.fullmatch(path.name):
        return None
    kind, *parts = path.parent.parent.name.split("--")
    return Snapshot(path, "/".join(parts), path.name) if kind == "models" and 1 <= len(parts) <= 2 else None


def cached_models() -> list[str]:
    """Hub ids in the cache that have a snapshot."""
    try:
        with os.scandir(cache_directory()) as entries:
            names = sorted(entry.name for entry in entries if entry.name.startswith("models--"))
    except OSError:
        return []
    cached = [name for name in names if (cache_directory() / name / "snapshots").is_dir()]
    return [name.removeprefix("models--").replace("--", "/") for name in cached]


def download(ref: HubRef) -> Snapshot:
    """Fetch a model into the cache: blocking, minutes. Only ever called where the user has allowed downloads.

    Raises:
        BaseCheckpointError: it does not exist, asks for a login, or the network failed.
    """
    from huggingface_hub import snapshot_download  # noqa: PLC0415 - a quarter of a second that only a download needs
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError  # noqa: PLC0415

    try:
        path = Path(
            snapshot_download(
                ref.repo_id,
                revision=ref.revision,
                allow_patterns=list(WANTED),
                ignore_patterns=list(UNWANTED),
            ),
        )
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise BaseCheckpointError(
            f"The base model {ref} could not be downloaded: {str(error).strip().splitlines()[0]}",
            code="base_model_download",
            suggestions=(
                f"Check the id at https://huggingface.co/{ref.repo_id} and the network",
                "For a model that asks for agreement, log in first with `hf auth login`",
            ),
        ) from error
    return Snapshot(path, ref.repo_id, path.name)


def is_offline() -> bool:
    """Whether huggingface_hub itself was told not to use the network."""
    return any(
        os.environ.get(name, "").upper() in {"1", "ON", "YES", "TRUE"}
        for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
    )


def _read_ref(path: Path) -> str | None:
    try:
        with path.open("rb") as file:
            commit = file.read(64).decode("ascii", "replace").strip()
    except OSError:
        return None
    return commit if _COMMIT.fullmatch(commit) else None


def _expanded(text: str) -> Path:
    return Path(os.path.expandvars(text)).expanduser().absolute()
