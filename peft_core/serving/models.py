"""The names under which adapters and base models are served."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from peft_core.adapters.names import base_model_name, model_name, with_hash
from peft_core.schemas.results import AdapterSummary
from peft_core.schemas.serving import ServedModel


def served_models(adapters: Sequence[AdapterSummary]) -> list[ServedModel]:
    """Return each project's current adapter, and then the base models of all of them. No two have the same name.

    Several that would have one name all get a hash, in any order: otherwise a new adapter could take the name that an editor
    uses for another. Only a base model keeps its name beside adapters.
    """
    current = [adapter for adapter in adapters if adapter.current]
    bases: dict[tuple[str, str], AdapterSummary] = {}  # the newest adapter on each
    for adapter in current:
        bases.setdefault((adapter.base_model, adapter.base_id), adapter)
    of_bases = Counter(base_model_name(name) for name, _ in bases)
    of_adapters = Counter(model_name(adapter.base_model, adapter.project_id) for adapter in current)

    def adapter_name(adapter: AdapterSummary) -> str:
        name = model_name(adapter.base_model, adapter.project_id)
        is_free = of_adapters[name] == 1 and name not in of_bases
        return name if is_free else with_hash(name, f"{adapter.base_model}\0{adapter.project_id}")

    def base_name(adapter: AdapterSummary) -> str:
        name = base_model_name(adapter.base_model)
        return name if of_bases[name] == 1 else with_hash(name, f"{adapter.base_model}\0{adapter.base_id}")

    return [
        ServedModel(
            name=adapter_name(adapter),
            project_id=adapter.project_id,
            base_model=adapter.base_model,
            adapter_path=adapter.adapter_path,
            loaded_with=adapter.project_id,
        )
        for adapter in current
    ] + [
        ServedModel(
            name=base_name(adapter),
            project_id=None,
            base_model=adapter.base_model,
            loaded_with=adapter.project_id,
        )
        for adapter in bases.values()
    ]


def default_model(models: Sequence[ServedModel], project_id: str | None) -> str | None:
    """Return the name of what answers requests that name no model: this project's adapter if it has one, else the newest.

    `models`: as `served_models` returns them. None if nothing is served.
    """
    adapters = [model for model in models if model.project_id is not None]
    own = [model for model in adapters if model.project_id == project_id]
    return next((model.name for model in own or adapters), None)
