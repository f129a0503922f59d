"""Ask a cluster's nodes what they are: a ClusterQuestion (JSON) on standard input, a ClusterAnswer or an ErrorInfo on standard
output.

    echo '{"address": "ray://host:10001"}' | python -m peft_core.cluster.probe

Every node answers for its versions, its memory and the base model. What torch computes on takes seconds to find out, so one
node of each kind answers for all.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from peft_core.cluster import connection
from peft_core.cluster.bases import identity
from peft_core.schemas.base_model import Base
from peft_core.schemas.cluster import ClusterAnswer, ClusterNode, ClusterQuestion
from peft_core.system.child_process import answer_request
from peft_core.system.failures import TaskKind

import ray  # isort: skip
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy  # isort: skip

TASK = TaskKind(
    name="question to the cluster",
    crash_code="cluster_probe_failed",
    log="standard error",
    memory_advice=("Close other programs.",),
)
ANSWER_S = 90.0  # for which all nodes together may take; importing torch from a slow disk takes half of it
_PACKAGE = "peft-mcp"
_FACTS = ("device", "device_name", "device_memory_bytes")  # equal for all nodes of a kind


def answer(question: ClusterQuestion) -> ClusterAnswer:
    """Connect, and ask.

    Raises:
        ClusterError: The cluster cannot be connected to.
    """
    connection.connect(question.address)
    try:
        nodes = ask_nodes(question.base, with_device=True)
    finally:
        connection.disconnect()
    return ClusterAnswer(address=question.address, nodes=nodes)


def ask_nodes(base: Base | None, *, with_device: bool = False, timeout_s: float = ANSWER_S) -> tuple[ClusterNode, ...]:
    """Return every living node, with what it says about itself. This process must be connected.

    Args:
        base: The base model to look for on each node.
        with_device: Whether nodes are to say what torch computes on.
        timeout_s: For which the nodes may take.
    """
    alive = [node for node in ray.nodes() if node["Alive"]]
    wanted = None if base is None else (base.model_dump_json(), identity(base))
    asked: set[tuple[Any, ...]] = set()
    questions = {}
    for node in alive:
        deep = with_device and _kind(node) not in asked
        asked.add(_kind(node))
        strategy = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
        task = ray.remote(_make_question()).options(num_cpus=0, max_retries=0, scheduling_strategy=strategy)
        questions[node["NodeID"]] = task.remote(wanted, deep)
    answers = _collect(questions, timeout_s)
    nodes = [_node(node, answers[node["NodeID"]]) for node in alive]
    known = {_kind(node): answer for node in alive if "device" in (answer := answers[node["NodeID"]])}
    return tuple(
        described.model_copy(update={name: facts[name] for name in _FACTS})
        if (facts := known.get(_kind(node))) is not None
        else described
        for node, described in zip(alive, nodes, strict=True)
    )


def _make_question() -> Callable[..., dict[str, Any]]:
    """Return the function that runs on a node. It is sent as code, not by name, because a node may lack this package."""

    def question(wanted: tuple[str, str] | None, deep: bool) -> dict[str, Any]:
        import platform  # noqa: PLC0415 -- sent as code
        import socket  # noqa: PLC0415
        from importlib.metadata import PackageNotFoundError, version  # noqa: PLC0415

        import ray  # noqa: PLC0415
        from ray._private.state import available_resources_per_node  # noqa: PLC0415 -- it has no public name

        found: dict[str, Any] = {"name": socket.gethostname(), "versions": {"python": platform.python_version()}}
        for package in ("peft-mcp", "torch", "transformers", "peft", "ray"):
            try:
                found["versions"][package] = version(package)
            except PackageNotFoundError:
                continue
        free = available_resources_per_node().get(ray.get_runtime_context().get_node_id(), {})
        found |= {"free_cpus": free.get("CPU", 0.0), "free_gpus": free.get("GPU", 0.0)}
        try:
            from peft_core.cluster.node import describe  # noqa: PLC0415
        except ImportError as error:
            return {**found, "error": str(error)}
        return {**found, **describe(wanted, with_device=deep)}

    return question


def _collect(questions: dict[str, Any], timeout_s: float) -> dict[str, dict[str, Any]]:
    """Return the nodes' answers; that of a node which gives none is an error."""
    deadline = time.monotonic() + timeout_s
    answers: dict[str, dict[str, Any]] = {}
    for node_id, reference in questions.items():
        try:
            answers[node_id] = ray.get(reference, timeout=max(0.1, deadline - time.monotonic()))
        except connection.LOST as error:
            if not isinstance(error, ray.exceptions.GetTimeoutError):
                raise
            answers[node_id] = {"error": f"it did not answer within {timeout_s:.0f} s"}
        except ray.exceptions.RayError as error:
            answers[node_id] = {"error": f"{type(error).__name__}: {str(error).strip().rpartition(chr(10))[2]}"[:300]}
    return answers


def _node(node: dict[str, Any], answer: dict[str, Any]) -> ClusterNode:
    resources = node["Resources"]
    facts = {name: value for name, value in answer.items() if name in ClusterNode.model_fields}
    return ClusterNode(
        **{
            "node_id": node["NodeID"],
            "name": node["NodeManagerHostname"],
            "is_head": "node:__internal_head__" in resources,
            "problem": _problem(answer),
            "cpus": resources.get("CPU", 0.0),
            "gpus": resources.get("GPU", 0.0),
            "memory_bytes": int(resources.get("memory", 0)),
            **facts,
        }
    )


def _problem(answer: dict[str, Any]) -> str:
    """Return why a node cannot train, as the end of a sentence that begins with its name; "" if it can."""
    theirs, ours = answer.get("versions", {}).get(_PACKAGE), own_version()
    if theirs is None and ("versions" in answer or "error" not in answer):
        return f"has no {_PACKAGE}; it needs version {ours}"
    if theirs is not None and theirs != ours:
        return f"has {_PACKAGE} {theirs}, but this machine has {ours}; both must be equal"
    if "error" in answer:
        return f"cannot be used: {answer['error']}"
    absent = [package for package in ("torch", "transformers", "peft") if package not in answer["versions"]]
    return f"lacks {', '.join(absent)}" if absent else ""


def own_version() -> str:
    """Return the version of this package, here."""
    try:
        return version(_PACKAGE)
    except PackageNotFoundError:  # it runs from a source tree
        return "unknown"


def _kind(node: dict[str, Any]) -> tuple[Any, ...]:
    """Return what nodes of one kind have in common: their GPUs, processors and gigabytes of memory."""
    resources = node["Resources"]
    types = sorted(name for name in resources if name.startswith("accelerator_type:"))
    return (resources.get("CPU"), resources.get("GPU"), round(resources.get("memory", 0) / 1e9), *types)


if __name__ == "__main__":
    sys.exit(answer_request(ClusterQuestion, answer, TASK))
