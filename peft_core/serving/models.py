"""The names under which adapters and base models are served."""

from __future__ import annotations

from collections.abc import Sequence

from peft_core.adapters.names import base_model_name, model_name
from peft_core.schemas.results import AdapterSummary
from peft_core.schemas.serving import ServedModel


def served_models(adapters: Sequence[AdapterSummary]) -> list[ServedModel]:
    """Return each project's current adapter, and then the base models of all of them."""
    current = [adapter for adapter in adapters if adapter.current]
    models = {
        name: ServedModel(
            name=name,
            project_id=adapter.project_id,
            base_model=adapter.base_model,
            adapter_path=adapter.adapter_path,
        )
        for adapter in current
        for name in [model_name(adapter.base_model, adapter.project_id)]
    }
    for adapter in current:
        name = base_model_name(adapter.base_model)
        models.setdefault(name, ServedModel(name=name, project_id=None, base_model=adapter.base_model))
    return list(models.values())
