"""Put a job on a cluster: ask the nodes, send what is missing, create the coordinator, submit the run."""

from __future__ import annotations

import secrets
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import ActorAlreadyExistsError

from peft_core.base_models.fingerprint import fingerprint
from peft_core.cluster import shelves
from peft_core.cluster.bases import files_to_send, identity
from peft_core.cluster.coordinator import BaseHolder, Coordinator, actor_options
from peft_core.cluster.preparation import prepare_dataset, task_files
from peft_core.cluster.probe import ask_nodes
from peft_core.cluster.remote_run import NAMESPACE
from peft_core.cluster.several_nodes import NodeLost
from peft_core.cluster.transfer import files_below
from peft_core.errors import ClusterError, sanitize
from peft_core.paths import JobPaths
from peft_core.schemas.base_model import Base
from peft_core.schemas.cluster import ClusterNode, ClusterPlan
from peft_core.schemas.counts import counted
from peft_core.schemas.task import TrainingTask
from peft_core.system.cancellation import StopFlag

Report = Callable[[str], None]
_WAIT_S = 1.0  # between two questions whether another bridge has sent the base model


def submit(task: TrainingTask, plan: ClusterPlan, name: str, report: Report, stop: StopFlag) -> Any:
    """Start the job's run on the cluster, to which this process is connected; return its coordinator, named `name`.

    Nothing is sent before every node has been asked for its versions.

    Raises:
        ClusterError: `cluster_no_package`, `cluster_no_node`, `cluster_base_large`, `cluster_base_differs`.
        DataError: The data cannot be used.
        Cancelled: On request.
    """
    base = task.request.base
    report("asking the nodes of the cluster")
    nodes = ask_nodes(base)
    suitable = suitable_nodes(nodes, plan)
    stop.check()
    prepare_dataset(task, report)
    stop.check()
    wanted = identity(base)
    holder = None if all(node.has_base for node in suitable) else _send_base(base, wanted, plan, report, stop)
    coordinator: Any = ray.remote(Coordinator).options(**actor_options(name)).remote(task.job_id)
    try:
        _send_task(coordinator, task, wanted, report)
        stop.check()
        options, minutes = _options(plan, nodes, task.job_id), task.request.config.max_minutes
        ray.get(coordinator.start.remote(options, holder, minutes, plan.nodes))
    except BaseException:
        with suppress(Exception):  # the cluster may be gone
            ray.kill(coordinator)
        raise
    return coordinator


def _send_task(coordinator: Any, task: TrainingTask, wanted: str, report: Report) -> None:
    """Send the task, the dataset, and the checkpoint of an earlier run if there is one."""
    paths = JobPaths(task.job_dir)
    with tempfile.TemporaryDirectory(prefix=".sending-", dir=paths.root) as directory:
        files = task_files(task, wanted, Path(directory))
        total = sum(path.stat().st_size for _, path in files)
        report(f"sending {total / 1e6:.1f} MB to the cluster")
        shelves.send(coordinator, "task", files)
    if (paths.checkpoint / "state.pt").is_file():
        shelves.send(coordinator, "checkpoint", checkpoint_files(paths))


def checkpoint_files(paths: JobPaths) -> list[tuple[str, Path]]:
    """Return the files that a run continues from, by name."""
    scores = [(path.name, path) for path in (paths.base_scores, paths.parent_scores) if path.is_file()]
    return [*files_below(paths.checkpoint, "checkpoint/"), *scores]


def suitable_nodes(nodes: Sequence[ClusterNode], plan: ClusterPlan) -> list[ClusterNode]:
    """Return the nodes that can ever run the job.

    Raises:
        ClusterError: `cluster_no_package`: none has the same version of this package; `cluster_no_node`: none is large enough.
    """
    usable = [node for node in nodes if not node.problem]
    if not usable or any(node.is_head and node.problem for node in nodes):  # the coordinator runs on the head node
        reasons = list(dict.fromkeys(f"{node.name} {node.problem}" for node in nodes if node.problem))
        raise ClusterError(
            f"The cluster cannot train: {sanitize('; '.join(reasons[:3]), limit=250)}.",
            code="cluster_no_package",
            suggestions=["Install the same version of peft-mcp on the nodes as here, for the Python that Ray runs in"],
        )
    suitable = [node for node in usable if node.can_run(plan)]
    if len(suitable) >= plan.nodes:
        return suitable
    if suitable:
        raise ClusterError(
            f"The training needs {plan.in_words}, and the cluster has {counted(len(suitable), 'such node')}.",
            code="cluster_no_node",
            suggestions=["Set CODEBASE_GARDENER_CLUSTER_GPUS to what fewer nodes have, or add a node"],
        )
    largest = max(usable, key=lambda node: (node.gpus, node.cpus >= 1, node.memory_bytes, node.cpus))
    raise ClusterError(
        f"No node of the cluster has {plan.in_words}; the largest, {largest.name}, has {largest.in_words}.",
        code="cluster_no_node",
        suggestions=["Use a smaller base_model, rank or max_length, or add a node"],
    )


def _options(plan: ClusterPlan, nodes: Sequence[ClusterNode], job_id: str) -> dict[str, Any]:
    """Return the options of the run as a Ray task, which Ray repeats after the loss of a node; the coordinator limits that."""
    options: dict[str, Any] = {
        "num_gpus": plan.gpus,
        "num_cpus": plan.cpus,
        "memory": plan.memory_bytes or None,
        "max_retries": -1,
        "retry_exceptions": [NodeLost],
        "name": f"peft-mcp {job_id}",
    }
    if refused := [node.node_id for node in nodes if node.problem]:
        options["label_selector"] = {"ray.io/node-id": f"!in({','.join(refused)})"}
    return options


def _holder(name: str) -> Any:
    """Return the actor of this name, or create it. Ray's `get_if_exists` raises when two bridges create it together."""
    while True:
        with suppress(ValueError):  # there is none
            return ray.get_actor(name, namespace=NAMESPACE)
        with suppress(ActorAlreadyExistsError):
            holder: Any = ray.remote(BaseHolder).options(**actor_options(name)).remote()
            ray.get(holder.lease.remote())
            return holder


def _send_base(base: Base, wanted: str, plan: ClusterPlan, report: Report, stop: StopFlag) -> str:
    """Send a base model to the cluster, unless another job has sent it; return the name of the actor that has it."""
    if base.size_bytes > plan.may_send_bytes:
        raise ClusterError(
            f"The cluster does not have the base model {base.name}; {base.size_bytes / 1e9:.1f} GB must be sent.",
            code="cluster_base_large",
            suggestions=[
                "Call train_adapter again and agree to that",
                "Or download it on the nodes with `hf download`, or copy it to the same path there",
            ],
        )
    if not fingerprint(base.path).same_weights(base.fingerprint):
        raise ClusterError(
            f"The files of the base model {base.name} have changed since the request: their fingerprint differs.",
            code="cluster_base_differs",
            suggestions=["Call train_adapter again: it reads the base model's files anew"],
        )
    name = f"peft-mcp-base-{wanted[:24]}"
    holder = _holder(name)
    me = secrets.token_hex(8)
    while True:
        claim: Any = ray.get(holder.claim.remote(me))
        if claim == "sealed":
            return name
        stop.check()
        if claim == "wait":
            report(f"another job is sending {base.name} to the cluster")
            time.sleep(_WAIT_S)
            continue

        def progress(sent: int, total: int) -> None:
            stop.check()
            report(f"sending {base.name} to the cluster: {sent / 1e6:.0f} of {total / 1e6:.0f} MB")

        shelves.send(holder, "base", files_to_send(base), progress)
