"""Have a running vLLM load an exported adapter, and compare what it computes with PEFT."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress

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
        had_one = _make_way(client, name, overwrite=job.request.overwrite)
    except VllmError as error:
        return result.model_copy(update={"reason": _in_words(error)})
    gone = (
        f" The earlier adapter {name} had been unloaded before, so vLLM does not serve it any more." if had_one else ""
    )
    try:
        client.load(name, job.request.directory)
        base = _base_of(client, name)
    except VllmError as error:
        return result.model_copy(update={"reason": f"{_in_words(error)}{gone}"})
    result = result.model_copy(update={"loaded": True, "base_model": base})
    if job.compared is None:
        return result.model_copy(update={"reason": "It was not compared there, because PEFT's results are missing."})
    try:
        compared = _compare(client, result, *job.compared)
    except VllmError as error:
        return result.model_copy(update={"reason": f"It was not compared there: {error.message}"})
    return compared if compared.loaded else compared.model_copy(update={"reason": f"{compared.reason}{gone}"})


def _in_words(error: VllmError) -> str:
    return " ".join([error.message, *(f"{suggestion}." for suggestion in error.suggestions)])


def _make_way(client: VllmClient, name: str, *, overwrite: bool) -> bool:
    """Unload an adapter of this name if `overwrite`; return whether there was one.

    Raises:
        VllmError: The name belongs to something that is not replaced, or that is not unloaded.
    """
    models = client.models()
    if name not in models:
        return False
    if models[name] is None:
        raise VllmError(f"vLLM serves a base model under the name {name}.", suggestions=["Give another model_name"])
    if not overwrite:
        raise VllmError(
            f"vLLM has an adapter {name} already.", suggestions=["Give another model_name, or set overwrite=true"]
        )
    try:
        client.unload(name)
    except VllmError as error:
        raise VllmError(
            f"The earlier adapter {name} could not be unloaded: {error.message}", suggestions=error.suggestions
        ) from error
    return True


def _base_of(client: VllmClient, name: str) -> str:
    """Return vLLM's name of the base model of an adapter that it has just accepted."""
    try:
        models = client.models()
    except VllmError as error:
        raise VllmError(f"vLLM has accepted {name}, but does not list its models: {error.message}") from error
    if name not in models:
        raise VllmError(f"vLLM has accepted the adapter, but does not list {name}.")
    return models[name] or ""


def _compare(client: VllmClient, result: LoadedInVllm, text: HeldOutText, ours: Reference) -> LoadedInVllm:
    """Ask for the next tokens' log-probabilities; unload the adapter if they are not PEFT's."""
    difference = _difference(client, result.model, text, ours.with_adapter)
    without = None
    if result.base_model:
        with suppress(VllmError):  # it only says more about the cause
            without = _difference(client, result.base_model, text, ours.without_adapter)
    result = result.model_copy(
        update={
            "positions": text.positions,
            "mean_difference": round(difference, 5),
            "base_difference": None if without is None else round(without, 5),
        }
    )
    if difference < LIMIT:
        return result
    cause = "" if without is None else "its base model differs: " if without >= LIMIT else "the adapter differs: "
    reason = f"vLLM computes something else ({cause}log-probabilities differ by {difference:.2f})"
    try:
        client.unload(result.model)
    except VllmError as error:
        return result.model_copy(update={"reason": f"{reason}, and it could not be unloaded again: {error.message}"})
    return result.model_copy(update={"loaded": False, "reason": f"{reason}, so it was unloaded again."})


def _difference(client: VllmClient, model: str, text: HeldOutText, ours: Sequence[Array]) -> float:
    """Return the mean difference of the next tokens' log-probabilities."""
    differences = [
        np.abs(
            np.asarray(client.log_probs(model, document)) - rows_TV[np.arange(len(document) - 1), list(document[1:])]
        )
        for document, rows_TV in zip(text.documents, ours, strict=True)
    ]
    return float(np.mean(np.concatenate(differences), dtype=np.float64))
