"""The machine that a training is planned for: this one, or a node of the user's cluster. A plan is a pure function of it."""

from __future__ import annotations

import functools
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from peft_core.config import Settings
from peft_core.errors import ClusterError, DataError, InvalidArgument
from peft_core.planning.cost_model import PROCESS_BYTES
from peft_core.schemas.base_model import Base
from peft_core.schemas.cluster import ASK_ABOVE_BYTES, ClusterAnswer, ClusterNode, ClusterPlan, ClusterQuestion
from peft_core.schemas.dataset import SourceSummary
from peft_core.schemas.training import TrainingConfig
from peft_core.system.child_process import run_json_child
from peft_core.system.machine import (
    available_memory_bytes,
    cpu_multiplies_bfloat16,
    expected_device,
    usable_cores,
    why_no_cuda,
)
from peft_core.system.packages import require_ray

MAX_CPUS = 8  # that a training on a CPU of the cluster reserves; more make it little faster
MAX_CPUS_PER_GPU = 4
HOST_BYTES = PROCESS_BYTES + (2 << 30)  # of a process that computes on a GPU, without the base model that it loads
DATASET_BYTES_PER_TOKEN = 12  # of a dataset as JSON
PROBE_S = 150.0  # for which a cluster may take to answer
REMEMBERED_S = 120.0  # for which its answer may be used again

AskCluster = Callable[[str, Base], ClusterAnswer]  # (address, base model)


@dataclass(frozen=True)
class Target:
    """What a plan needs to know about a machine."""

    device: str  # expected; the training process decides
    cores: int  # physical ones that a training may use
    cpu_bfloat16: bool  # see `system.machine.cpu_multiplies_bfloat16`
    memory_bytes: int | None  # that a process can have, on an accelerator of the device; None: unknown
    memory: str = "the memory available now"  # what that is, for messages
    node: ClusterNode | None = None  # of a cluster

    @property
    def is_here(self) -> bool:
        return self.node is None


def this_machine(device: str) -> Target:
    return Target(
        device=device,
        cores=usable_cores(),
        cpu_bfloat16=cpu_multiplies_bfloat16(),
        memory_bytes=available_memory_bytes() if device == "cpu" else None,
    )


def require_device(config: TrainingConfig, settings: Settings) -> str | None:
    """Return the device to expect on this machine, or None for a training on the cluster.

    Raises:
        InvalidArgument: This machine does not have the requested device, or the user has set no cluster.
        ClusterError: Ray is not installed.
    """
    if config.run_on == "here":
        return _device_here(config)
    if settings.cluster is None:
        raise InvalidArgument(
            "config.run_on",
            "cluster",
            "the setting CODEBASE_GARDENER_CLUSTER has no address of a Ray cluster; it must be 'here' without one",
            suggestions=["Ask the user to set it, for instance to ray://HOST:10001, and to restart the server"],
        )
    if config.device == "mps":
        raise InvalidArgument("config.device", "mps", "with run_on = 'cluster' it must be auto, cuda or cpu")
    require_ray()
    return None


def _device_here(config: TrainingConfig) -> str:
    obstacles = {
        "mps": None if sys.platform == "darwin" else "MPS is available on Apple silicon only",
        "cuda": why_no_cuda(),
    }
    if (obstacle := obstacles.get(config.device)) is not None:
        allowed = ["auto", *(device for device, reason in obstacles.items() if reason is None), "cpu"]
        raise InvalidArgument("config.device", config.device, f"{obstacle}; allowed here: {', '.join(allowed)}")
    return expected_device(config.device)


def ask_cluster(address: str, base: Base) -> ClusterAnswer:
    """Ask a cluster what it has, in a process of its own: Ray takes seconds to import, and stays out of this one.

    Raises:
        ClusterError: It does not answer, or refuses.
    """
    return _ask(address, base.model_dump_json(), int(time.monotonic() // REMEMBERED_S))


@functools.lru_cache(maxsize=8)
def _ask(address: str, base: str, _when: int) -> ClusterAnswer:
    try:
        return run_json_child(
            "peft_core.cluster.probe",
            ClusterQuestion(address=address, base=Base.model_validate_json(base)),
            ClusterAnswer,
            timeout_s=PROBE_S,
            action="Asking the cluster",
            on_timeout=("Check that its nodes are alive: `ray status` on the head node",),
        )
    except DataError as error:
        raise ClusterError(error.message, code=error.code, suggestions=error.suggestions) from error


def on_cluster(config: TrainingConfig, answer: ClusterAnswer) -> Target:
    """Return the node to plan for. Ray may choose any node with such a device, so it is the weakest of them.

    Of nodes without a GPU, Ray chooses one with the memory that is reserved, so it is the one with the most memory.

    Raises:
        ClusterError: No node can train, or none has the requested device.
    """
    if not answer.usable:
        problems = dict.fromkeys(f"{node.name} {node.problem}" for node in answer.nodes)
        raise ClusterError(
            f"No node of the cluster at {answer.address} can train: {'; '.join(list(problems)[:3])}."[:390],
            code="cluster_no_node",
            suggestions=["Correct that on the nodes; docs/cluster.md says what they need"],
        )
    with_gpu = [node for node in answer.usable if node.device == "cuda" and node.gpus >= 1]
    if config.device == "cuda" and not with_gpu:
        raise ClusterError(
            f"No node of the cluster at {answer.address} has a GPU that torch can use.",
            code="cluster_no_gpu",
            suggestions=["Use config.device = 'auto', or add a node with a GPU"],
        )
    if with_gpu and config.device != "cpu":
        node = min(with_gpu, key=lambda node: (node.device_memory_bytes, node.cores))
        memory = node.device_memory_bytes or None
        return Target("cuda", node.cores, node.cpu_bfloat16, memory, f"the memory of the GPU on {node.name}", node)
    node = max(
        answer.usable, key=lambda node: (node.cpus >= 1, node.memory_bytes, node.cores)
    )  # a head node may have none
    cores = max(1, min(node.cores, MAX_CPUS))
    return Target("cpu", cores, node.cpu_bfloat16, node.memory_bytes, f"the memory of the node {node.name}", node)


def reserve(
    address: str, target: Target, base: Base, needed_bytes: int, nodes: Sequence[ClusterNode], *, gpus: int
) -> ClusterPlan:
    """Return what a run of `needed_bytes` on the target reserves. `gpus`: how many, if it computes on such.

    If no node has so many GPUs, the run takes several nodes, as few as possible, with equally many of each.

    Raises:
        ClusterError: No node has as much, or too few have.
    """
    node = target.node
    assert node is not None  # noqa: S101 -- the target is a node
    if target.device == "cpu":
        plan = ClusterPlan(address=address, cpus=max(1, min(int(node.cpus), MAX_CPUS)), memory_bytes=needed_bytes)
    else:
        cpus = max(1, min(int(node.cpus // max(1.0, node.gpus)), MAX_CPUS_PER_GPU))
        memory = HOST_BYTES + base.size_bytes
        count = _nodes_for(gpus, nodes)
        plan = ClusterPlan(
            address=address, nodes=count, gpus=gpus // count, cpus=gpus // count * cpus, memory_bytes=memory
        )
    if len(can_run := [each for each in nodes if each.can_run(plan)]) < plan.nodes:
        raise ClusterError(
            f"No node of the cluster at {address} can ever run this training: it needs {plan.in_words}, and the largest, "
            f"{node.name}, has {node.in_words} for Ray.",
            code="cluster_too_small",
            suggestions=["Use a smaller base_model, rank or max_length, or add a larger node"],
        )
    lacks_base = not all(node.has_base for node in can_run)
    return plan.model_copy(update={"may_send_bytes": max(ASK_ABOVE_BYTES, base.size_bytes if lacks_base else 0)})


def _nodes_for(gpus: int, nodes: Sequence[ClusterNode]) -> int:
    """Return the smallest number of nodes that have so many GPUs together, each the same number; 1 if none has."""
    for count in range(1, len(nodes) + 1):
        if gpus % count == 0 and sum(node.gpus >= gpus // count and not node.problem for node in nodes) >= count:
            return count
    return 1


def describe(
    plan: ClusterPlan,
    target: Target,
    base: Base,
    source: SourceSummary,
    nodes: Sequence[ClusterNode],
    *,
    continues: bool = False,
) -> tuple[str, int]:
    """Return where a job will train and what is sent there, in words, and the bytes that are sent."""
    can_run = [node for node in nodes if node.can_run(plan)]
    gpu = f" ({target.node.device_name})" if target.node is not None and target.node.device_name else ""
    places = (
        f"{plan.nodes if plan.nodes > 1 else 'one'} of {len(can_run)} nodes"
        if len(can_run) > 1
        else f"the node {can_run[0].name}"
    )
    data_bytes = DATASET_BYTES_PER_TOKEN * source.estimated_tokens
    base_bytes = 0 if all(node.has_base for node in can_run) else base.size_bytes
    sent = (
        f"the examples that the data are cut into (about {_size(data_bytes)}), held-out files, names, and the settings"
    )
    sent += (
        ", the adapter that it continues and the examples that this one and its parents learned" if continues else ""
    )
    sent += (
        f", and the base model ({_size(base_bytes)}), which not all nodes have"
        if base_bytes
        else "; the base model is there"
    )
    is_known = any(node.free_gpus or node.free_cpus for node in nodes)  # a Ray client may not be given it
    busy = is_known and not any(node.free_gpus >= plan.gpus and node.free_cpus >= plan.cpus for node in can_run)
    waits = " They are in use now, so it waits." if busy else ""
    return (
        f"It trains on {places} of the cluster at {plan.address} and reserves {plan.in_words}{gpu}.{waits} Sent there: {sent}.",
        data_bytes + base_bytes,
    )


def _size(size_bytes: int) -> str:
    return f"{size_bytes / 1e9:.1f} GB" if size_bytes >= 1e9 else f"{max(0.1, size_bytes / 1e6):.1f} MB"
