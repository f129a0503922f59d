"""Find models in Ollama's store by their names, from its files and without its server.

A name leads to a manifest (JSON), which lists the digests of blobs: one GGUF file with the weights, and small texts. The layout
is in types/model/name.go and manifest/ of https://github.com/ollama/ollama. `manifests-v2` is a later form, with one manifest
for each kind of runner and another default host; it is searched first, as Ollama does.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from peft_core.errors import BaseCheckpointError, HeaderError
from peft_core.system.allowed_paths import real
from peft_core.system.files import read_small, refuse_json_bomb

PREFIX = "ollama:"
MAX_MANIFEST_BYTES = 4 << 20  # an MLX model has a layer for each tensor
MAX_MANIFEST_VALUES = 200_000
MAX_TEXT_BYTES = 1 << 20  # of a template, a system prompt, parameters
MAX_NAMES = 1000  # that are listed
_PART = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,79}", re.ASCII)
_HOST = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.:-]{0,349}", re.ASCII)
_DIGEST = re.compile(r"sha256[:-]([0-9a-fA-F]{64})", re.ASCII)
_DEFAULT_HOSTS = ("registry.ollama.ai", "ollama.com")  # the name differs between versions
_OTHER_HOSTS = ("hf.co", "huggingface.co")  # never meant by a name without host
_NAMESPACE, _TAG = "library", "latest"
_KINDS = ("manifests-v2", "manifests")
_LIST = "application/vnd.ollama.manifest.list.v2+json"
_LAYER = "application/vnd.ollama.image."
_SERVICE = Path("/usr/share/ollama/.ollama/models")  # of the service that Ollama's installer sets up on Linux


@dataclass(frozen=True)
class OllamaName:
    """A name `[[HOST/]NAMESPACE/]MODEL[:TAG]`; the host None is the default one."""

    host: str | None
    namespace: str
    model: str
    tag: str

    def __str__(self) -> str:
        """Return the name as `ollama list` shows it."""
        host = "" if self.host is None else f"{self.host}/"
        namespace = "" if self.host is None and self.namespace == _NAMESPACE else f"{self.namespace}/"
        return f"{host}{namespace}{self.model}:{self.tag}"


@dataclass(frozen=True)
class OllamaModel:
    """A model in the store: its weights (a GGUF file), and the files of its texts by kind (template, params, system, ...)."""

    name: OllamaName
    weights: Path
    texts: Mapping[str, Path]
    digest: str  # sha256 of the manifest, which Ollama calls the model's id

    def text(self, kind: str) -> str | None:
        """Return a text of the model, such as its template; None if it has none.

        Raises:
            HeaderError: It is too long or unreadable.
        """
        path = self.texts.get(kind)
        return None if path is None else read_small(path, MAX_TEXT_BYTES).decode("utf-8", errors="replace")


def parse_ollama_name(text: str) -> OllamaName | None:
    """Parse a name, with or without the prefix `ollama:`; None if `text` cannot be one."""
    name = text[len(PREFIX) :] if text[: len(PREFIX)].lower() == PREFIX else text
    tag = _TAG
    if name.rfind(":") > name.rfind("/"):
        name, _, tag = name.rpartition(":")
    *before, model = name.split("/")
    if len(before) > 2:
        return None
    host = before[0] if len(before) == 2 else None
    namespace = before[-1] if before else _NAMESPACE
    if "." in namespace or not all(_PART.fullmatch(part) for part in (namespace, model, tag)):
        return None
    if host is not None and (".." in host or not _HOST.fullmatch(host)):
        return None
    return OllamaName(None if host in _DEFAULT_HOSTS else host, namespace, model, tag)


def store_directories() -> list[Path]:
    """Return where Ollama stores its models: `OLLAMA_MODELS`, or else the user's and the Linux service's directory."""
    chosen = os.environ.get("OLLAMA_MODELS", "").strip()
    try:
        return [Path(chosen).expanduser().absolute()] if chosen else [Path.home() / ".ollama" / "models", _SERVICE]
    except RuntimeError:  # the home directory is unknown
        return [] if chosen else [_SERVICE]


def store_places() -> list[Path]:
    """Return the directories with the store's files. The blobs may be on another disk, behind a link."""
    return [place for root in store_directories() for place in (root, root / "blobs")]


def find_ollama(name: OllamaName) -> OllamaModel | None:
    """Find a model; None if the store has none of this name. Names in another case are found too, as Ollama does.

    Raises:
        BaseCheckpointError: It is there, but its manifest is damaged, its weights are missing, or they are no GGUF file.
    """
    for root in store_directories():
        manifest = _manifest_of(root, name)
        if manifest is None:
            same = [other for other in _names_in(root) if str(other).lower() == str(name).lower()]
            manifest = _manifest_of(root, same[0]) if same else None
            name = same[0] if same else name
        if manifest is not None:
            return _read_model(root, manifest, name)
    return None


def find_ollama_by_weights(weights: Path) -> OllamaModel | None:
    """Return a model in the store whose weights are this file; None if there is none."""
    places = {real(root / "blobs") for root in store_directories()}
    if real(weights).parent not in places:
        return None
    for name in installed_names():
        try:
            model = find_ollama(name)
        except (BaseCheckpointError, HeaderError):
            continue
        if model is not None and real(model.weights) == real(weights):
            return model
    return None


def installed_names() -> list[OllamaName]:
    """Return the names of the models in the store, sorted; at most `MAX_NAMES`."""
    names = {str(name): name for root in store_directories() for name in _names_in(root)}
    return [names[key] for key in sorted(names)]


# -- manifests ---------------------------------------------------------------------------------------------------------


def _manifest_of(root: Path, name: OllamaName) -> Path | None:
    """Return the path of a model's manifest; None if there is none."""
    for kind in _KINDS:
        hosts = [name.host] if name.host is not None else _hosts(root / kind)
        for host in hosts:
            path = root / kind / host / name.namespace / name.model / name.tag
            if os.path.isfile(path):  # noqa: PTH113 -- Path.is_file raises where a directory is unreadable
                return path
    return None


def _hosts(directory: Path) -> list[str]:
    """Return the hosts that a name without host may mean: the default ones, or the only one, whatever its name is."""
    hosts = [
        host for host in _entries(directory) if _HOST.fullmatch(host) and ":" not in host and host not in _OTHER_HOSTS
    ]
    known = [host for host in _DEFAULT_HOSTS if host in hosts]
    return known or (hosts if len(hosts) == 1 else [])


def _names_in(root: Path) -> Iterator[OllamaName]:
    count = 0
    for kind in _KINDS:
        default = _hosts(root / kind)
        for host in _entries(root / kind):
            for namespace in _entries(root / kind / host):
                for model in _entries(root / kind / host / namespace):
                    for tag in _entries(root / kind / host / namespace / model):
                        name = parse_ollama_name(f"{host}/{namespace}/{model}:{tag}")
                        if name is not None:
                            yield OllamaName(None, *_rest(name)) if host in default else name
                            count += 1
                        if count >= MAX_NAMES:
                            return


def _rest(name: OllamaName) -> tuple[str, str, str]:
    return name.namespace, name.model, name.tag


def _entries(directory: Path) -> list[str]:
    try:
        with os.scandir(directory) as entries:
            return sorted(entry.name for entry in islice(entries, 10 * MAX_NAMES) if not entry.name.startswith("."))
    except OSError:
        return []


def _read_model(root: Path, path: Path, name: OllamaName) -> OllamaModel:
    raw = _read(root, path, name, "manifest")
    manifest = _parsed(raw, path, name)
    if manifest.get("mediaType") == _LIST or "manifests" in manifest:
        manifest = _child(root, manifest, name)
    layers = _layers(manifest, name)
    kinds = {kind for kind, _, _ in layers}
    _refuse_other_contents(kinds, name)
    models = [(digest, size) for kind, digest, size in layers if kind == "model"]
    if len(models) != 1:
        raise _unusable(name, f"its manifest has {len(models)} layers with weights; must be one")
    weights = _blob(root, models[0][0], name)
    if not os.path.isfile(weights):  # noqa: PTH113 -- the same
        raise _unusable(name, f"its weights are missing (blobs/{weights.name})", _pull(name))
    size = weights.stat().st_size
    if models[0][1] not in (None, size):
        raise _unusable(name, f"its weights have {size} bytes instead of {models[0][1]}", _pull(name))
    texts = {kind: _blob(root, digest, name) for kind, digest, _ in layers if kind in _TEXTS}
    return OllamaModel(name, weights, texts, hashlib.sha256(raw).hexdigest())


_TEXTS = ("template", "system", "params", "license", "messages")


def _child(root: Path, listed: Mapping[str, Any], name: OllamaName) -> Mapping[str, Any]:
    """Return the manifest for GGUF files of a list with one manifest for each runner."""
    children = listed.get("manifests")
    children = [child for child in children if isinstance(child, dict)] if isinstance(children, list) else []
    chosen = next(
        (
            c
            for c in children
            if c.get("format") == "gguf" or (c.get("runner") in ("llamacpp", "ggml") and "format" not in c)
        ),
        None,
    )
    if chosen is None:
        raise _unusable(name, _MLX, _OTHER)
    if chosen.get("layers"):
        return dict(chosen)
    blob = _blob(root, chosen.get("digest"), name)
    return _parsed(_read(root, blob, name, "manifest"), blob, name)


_MLX = "it is stored for Apple's MLX engine (one layer for each tensor), not as a GGUF file"
_OTHER = "Pull a GGUF version of it, or give a model directory, a .gguf file or a hub id"


def _refuse_other_contents(kinds: set[str], name: OllamaName) -> None:
    if "adapter" in kinds:
        raise _unusable(
            name,
            "it is a base model with a LoRA adapter, whose updates would be missing",
            "Give the model that it was created from: `ollama show --modelfile NAME` names it",
        )
    if "projector" in kinds:
        raise _unusable(name, "it is a vision-language model with a projector, which is not supported", _OTHER)
    if "model" not in kinds:
        reason = (
            _MLX if "tensor" in kinds else "it has no weights on this machine, as models in Ollama's cloud have none"
        )
        raise _unusable(name, reason, _OTHER)


def _layers(manifest: Mapping[str, Any], name: OllamaName) -> list[tuple[str, Any, int | None]]:
    """Return (kind, digest, size) of each layer."""
    layers = manifest.get("layers")
    if not isinstance(layers, list) or not all(
        isinstance(layer, dict) and isinstance(layer.get("mediaType"), str) for layer in layers
    ):
        raise _unusable(name, "its manifest is damaged: it has no list of layers", _pull(name))
    return [
        (
            layer["mediaType"].removeprefix(_LAYER),
            layer.get("digest"),
            layer["size"] if type(layer.get("size")) is int else None,
        )
        for layer in layers
    ]


def _parsed(raw: bytes, path: Path, name: OllamaName) -> Mapping[str, Any]:
    try:
        refuse_json_bomb(raw, path, MAX_MANIFEST_VALUES)
        value = json.loads(raw)
    except (HeaderError, ValueError, RecursionError) as error:
        reason = error.problem if isinstance(error, HeaderError) else "it is not JSON"
        raise _unusable(name, f"its manifest is damaged: {reason}", _pull(name)) from error
    if isinstance(value, dict):
        return value
    raise _unusable(name, "its manifest is damaged: it is no JSON object", _pull(name))


def _read(root: Path, path: Path, name: OllamaName, what: str) -> bytes:
    """Read a small file of the store; a link is followed inside the store only."""
    target = real(path)
    if not any(target.is_relative_to(real(root / place)) for place in ("blobs", *_KINDS)):
        raise _unusable(name, f"its {what} is a link that leads out of the store")
    try:
        return read_small(target, MAX_MANIFEST_BYTES)
    except HeaderError as error:
        raise _unusable(name, f"its {what} {error.problem}", _pull(name)) from error


def _blob(root: Path, digest: object, name: OllamaName) -> Path:
    """Return the path of a blob, whose name is its digest and nothing else."""
    match = _DIGEST.fullmatch(digest) if isinstance(digest, str) else None
    if match is None:
        raise _unusable(name, f"its manifest is damaged: {digest!r:.100} is no digest", _pull(name))
    path = root / "blobs" / f"sha256-{match[1]}"
    if not real(path).is_relative_to(real(root / "blobs")):
        raise _unusable(name, f"its blob {path.name} is a link that leads out of the store")
    return path


def _pull(name: OllamaName) -> str:
    return f"Fetch it again with `ollama pull {name}`"


def _unusable(name: OllamaName, reason: str, *suggestions: str) -> BaseCheckpointError:
    return BaseCheckpointError(
        f"The Ollama model {name} cannot be used: {reason}.",
        code="base_model_unusable",
        suggestions=suggestions,
        details={"model": str(name)},
    )
