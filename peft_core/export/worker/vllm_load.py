"""Have a running vLLM load an exported adapter, and compare what it computes with PEFT."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from peft_core.errors import VllmError
from peft_core.export.request import VllmPlan
from peft_core.export.worker.compare import HeldOutText, Reference
from peft_core.export.worker.job import Job
from peft_core.llamacpp.worker.lora_pairs import Array
from peft_core.schemas.export import LoadedInVllm
from peft_core.vllm import VllmClient, key_from_environment

LIMIT = 0.35  # nats; as for 8 bits, since a server may compute in 16 or 8. Measured in float32: 0.0000


def load_in_vllm(job: Job, plan: VllmPlan) -> LoadedInVllm:
    """Load the published directory. What vLLM does not do is a reason in the result: the export itself has succeeded."""
    name = plan.model or job.name
    result = LoadedInVllm(address=plan.address, model=name, loaded=False)
    client = VllmClient(plan.address, api_key=key_from_environment() if plan.sends_key else None)
    job.say(f"loading the adapter into vLLM at {plan.address}")
    try:
        result = result.model_copy(update={"version": client.version()})
        base = _load(client, name, job)
    except VllmError as error:
        return result.model_copy(update={"reason": " ".join([error.message, *(f"{s}." for s in error.suggestions)])})
    result = result.model_copy(update={"loaded": True, "base_model": base})
    if job.compared is None:
        return result.model_copy(update={"reason": "It was not compared there, because PEFT's results are missing."})
    try:
        return _compare(client, result, *job.compared)
    except VllmError as error:
        return result.model_copy(update={"reason": f"It was not compared there: {error.message}"})


def _load(client: VllmClient, name: str, job: Job) -> str:
    """Load it under the name, and return the name of its base model there."""
    models = client.models()
    if name in models:
        if models[name] is None:
            raise VllmError(f"vLLM serves a base model under the name {name}.", suggestions=["Give another model_name"])
        if not job.request.overwrite:
            raise VllmError(
                f"vLLM has an adapter {name} already.", suggestions=["Give another model_name, or set overwrite=true"]
            )
        client.unload(name)
    client.load(name, job.request.directory)
    models = client.models()
    if name not in models:
        raise VllmError(f"vLLM has accepted the adapter, but does not list {name}.")
    return models[name] or ""


def _compare(client: VllmClient, result: LoadedInVllm, text: HeldOutText, ours: Reference) -> LoadedInVllm:
    """Ask for the next tokens' log-probabilities; unload the adapter if they are not PEFT's."""
    difference = _difference(client, result.model, text, ours.with_adapter)
    without = _difference(client, result.base_model, text, ours.without_adapter) if result.base_model else None
    figures = {
        "positions": text.positions,
        "mean_difference": round(difference, 5),
        "base_difference": None if without is None else round(without, 5),
    }
    if difference < LIMIT:
        return result.model_copy(update=figures)
    client.unload(result.model)
    cause = "its base model differs" if without is not None and without >= LIMIT else "the adapter differs"
    reason = f"vLLM computes something else ({cause}: log-probabilities differ by {difference:.2f}), so it was unloaded again."
    return result.model_copy(update={**figures, "loaded": False, "reason": reason})


def _difference(client: VllmClient, model: str, text: HeldOutText, ours: Sequence[Array]) -> float:
    """Return the mean difference of the next tokens' log-probabilities."""
    differences = [
        np.abs(
            np.asarray(client.log_probs(model, document)) - rows_TV[np.arange(len(document) - 1), list(document[1:])]
        )
        for document, rows_TV in zip(text.documents, ours, strict=True)
    ]
    return float(np.mean(np.concatenate(differences), dtype=np.float64))
