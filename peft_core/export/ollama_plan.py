"""Plan an export to Ollama: the model's name, the server, and whether it takes an adapter or a whole model."""

from __future__ import annotations

import os
import re
from pathlib import Path

from peft_core.base_models.ollama_store import OllamaModel, find_ollama_by_weights, parse_ollama_name
from peft_core.config import Settings
from peft_core.errors import InvalidArgument
from peft_core.export.request import OllamaPlan
from peft_core.ollama import DEFAULT_ADDRESS, OllamaClient, OllamaStatus, canonical
from peft_core.schemas.base_model import Base
from peft_core.schemas.export import ExportOptions
from peft_core.system.addresses import is_on_this_machine, local_address

LORA = "lora"
_ALLOWED = "must be [NAMESPACE/]NAME[:TAG] of letters, digits, '.', '-' and '_'"


def plan_ollama(adapter: Path, base: Base, options: ExportOptions, settings: Settings) -> tuple[OllamaPlan, bool]:
    """Return the plan, and whether the server takes a LoRA file beside this base model.

    Raises:
        InvalidArgument: The name is refused, is the base model's, or is taken.
    """
    name = _model_name(options.model_name, adapter, base, settings)
    address, refusal = _address(settings)
    status = OllamaStatus(address=address, reachable=False, reason=refusal)
    if not refusal:
        status = OllamaClient(address).status()
    if not status.reachable:
        return OllamaPlan(model=name, address=None, reason=status.reason), False
    if status.is_too_old:
        reason = f"Ollama {status.version} at {address} is too old; 0.5.5 or later is needed."
        return OllamaPlan(model=name, address=None, reason=reason, version=status.version), False
    stored = find_ollama_by_weights(base.path) if base.format == "gguf" else None
    own = _own_name(stored, status)
    _require_free_name(name, own, status, overwrite=options.overwrite)
    plan = OllamaPlan(model=name, address=address, version=status.version, base_model=own)
    return plan, status.takes_adapters and base.format == "gguf"


def _model_name(requested: str | None, adapter: Path, base: Base, settings: Settings) -> str:
    """Return the name to create: the requested one, or one made of base model and project.

    Editors choose the format of a fill-in-the-middle prompt by the name of the base model in it.
    """
    if requested is None:
        trained_here = adapter.is_relative_to(settings.paths.projects)
        project = adapter.parent.parent.name if trained_here else adapter.name
        short = re.sub(r"[^a-z0-9.-]+", "-", f"{base.name.rpartition('/')[2]}-{project}".lower())
        requested = short.removesuffix("-latest").strip(".-")[:80] or "adapter"
    name = parse_ollama_name(requested)
    if name is None or name.host is not None or requested.lower().startswith("ollama:"):
        raise InvalidArgument("model_name", requested, _ALLOWED, suggestions=["Omit it to name it after the project"])
    return str(name)


def _address(settings: Settings) -> tuple[str, str]:
    """Return the address of Ollama, and why it is not used if it is not."""
    if settings.ollama_base_url:
        return local_address(settings.ollama_base_url), ""
    address = local_address(os.environ.get("OLLAMA_HOST", "") or DEFAULT_ADDRESS)
    if is_on_this_machine(address):
        return address, ""
    return address, (
        f"OLLAMA_HOST names another machine ({address}), and what the adapter has learned does not leave this one; set "
        "CODEBASE_GARDENER_OLLAMA_BASE_URL to allow it."
    )


def _own_name(stored: OllamaModel | None, status: OllamaStatus) -> str | None:
    """Return the server's name of the base model, if it is the very model that is in the store."""
    if stored is None:
        return None
    digests = {canonical(name): digest.removeprefix("sha256:") for name, digest in status.models.items()}
    return str(stored.name) if digests.get(canonical(str(stored.name))) == stored.digest else None


def _require_free_name(name: str, own: str | None, status: OllamaStatus, *, overwrite: bool) -> None:
    taken = canonical(name) in map(canonical, status.models)
    if own is not None and canonical(own) == canonical(name):
        raise InvalidArgument("model_name", name, "it is the name of the base model itself", code="model_exists")
    if taken and not overwrite:
        raise InvalidArgument(
            "model_name",
            name,
            "Ollama has a model of this name already, and it is not replaced unless overwrite=true",
            code="model_exists",
            suggestions=["Give another model_name", "Or set overwrite=true"],
        )
