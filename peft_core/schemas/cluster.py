"""Trainings on a Ray cluster: what a job reserves there, and what the cluster's nodes are."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from peft_core.schemas.base_model import Base
from peft_core.schemas.frozen import FrozenModel

ASK_ABOVE_BYTES = 2_000_000_000  # a base model that is larger is sent only if the person has agreed


class ClusterPlan(FrozenModel):
    """Where a job runs on a cluster, and what it reserves on each of its nodes, of which it usually needs one."""

    address: str  # of the setting when the job was planned: "ray://host:10001", "host:6379" or "auto"
    nodes: Annotated[int, Field(ge=1)] = 1
    gpus: Annotated[int, Field(ge=0)] = 0
    cpus: Annotated[int, Field(ge=1)] = 1
    memory_bytes: Annotated[int, Field(ge=0)] = 0  # 0: none is reserved
    may_send_bytes: Annotated[int, Field(ge=0)] = ASK_ABOVE_BYTES  # of the base model, if a node does not have it

    @property
    def in_words(self) -> str:
        """What is reserved, such as "1 GPU, 4 CPUs and 2.0 GB of memory"."""
        words = resources_in_words(self.gpus, self.cpus, self.memory_bytes)
        return words if self.nodes == 1 else f"{words} on each of {self.nodes} nodes"

    @property
    def processes(self) -> int:
        """How many processes train: one for each GPU, or one on each node without any."""
        return self.nodes * max(1, self.gpus)


class ClusterQuestion(FrozenModel):
    """What `peft_core.cluster.probe` is asked."""

    address: str
    base: Base | None = None  # which nodes have it?


class ClusterNode(FrozenModel):
    """A node of a cluster: what Ray can reserve on it, and what torch computes on there."""

    node_id: str
    name: str  # of its host
    is_head: bool = False
    problem: str = ""  # why it cannot train, as a sentence; empty if it can
    cpus: float = 0.0  # that Ray can reserve in total
    gpus: float = 0.0
    memory_bytes: int = 0
    free_cpus: float = 0.0  # that nothing has reserved now
    free_gpus: float = 0.0
    versions: dict[str, str] = Field(default_factory=dict)  # by package; "python" and "ray" as well
    device: str = "cpu"  # that torch uses there: "cuda" or "cpu"
    device_name: str = ""  # of a GPU
    device_memory_bytes: int = 0  # of one GPU
    cores: int = 1  # that torch uses there
    cpu_bfloat16: bool = False  # see `system.machine.cpu_multiplies_bfloat16`
    has_base: bool | None = None  # None: it was not asked for, or is not known

    @property
    def in_words(self) -> str:
        """What Ray can reserve on it in total."""
        return resources_in_words(self.gpus, self.cpus, self.memory_bytes)

    def can_run(self, plan: ClusterPlan) -> bool:
        """Return whether it can ever run a job: it has no problem, and as much as the job reserves."""
        is_large_enough = self.gpus >= plan.gpus and self.cpus >= plan.cpus and self.memory_bytes >= plan.memory_bytes
        return is_large_enough and not self.problem


class ClusterAnswer(FrozenModel):
    """What the probe found out."""

    address: str
    nodes: tuple[ClusterNode, ...]

    @property
    def usable(self) -> tuple[ClusterNode, ...]:
        return tuple(node for node in self.nodes if not node.problem)


def resources_in_words(gpus: float, cpus: float, memory_bytes: int) -> str:
    """Return "1 GPU, 4 CPUs and 2.0 GB of memory"; without GPUs if there are 0."""
    amounts = [(gpus, "GPU"), (cpus, "CPU")] if gpus else [(cpus, "CPU")]
    words = [f"{amount:g} {name}{'' if amount == 1 else 's'}" for amount, name in amounts]
    return f"{', '.join(words)} and {memory_bytes / 1e9:.1f} GB of memory"
