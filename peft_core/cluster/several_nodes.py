"""A run on several nodes: one Ray task leads it, as that of a run on one node, and has a partner on each of the other nodes.

All of them start `accelerate launch`, whose processes meet at the leader's node and then train as several processes of one node
do. The first process belongs to the leader and alone writes events, checkpoints and the adapter. So a partner has nothing to
send: it fetches the same files, and computes.

Ray Train is not used for this: it calls a function in workers of its own and needs storage that all nodes share, while a
training here is a process with events, signals and checkpoints, whose files the coordinator keeps.
"""

from __future__ import annotations

import socket
from collections.abc import Callable
from contextlib import suppress
from typing import Any, NamedTuple

import ray
from ray.exceptions import RayError
from ray.util import get_current_placement_group, placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

WAIT_S = 0.5
_RESOURCES = {"num_gpus": "GPU", "num_cpus": "CPU", "memory": "memory"}


class NodeLost(Exception):
    """A partner's node is lost: Ray repeats the leader, and with it the partners, from the newest checkpoint."""


class Rendezvous(NamedTuple):
    """Where the processes of a run meet, and which of its nodes this one is."""

    address: str
    port: int
    nodes: int
    rank: int

    @property
    def arguments(self) -> list[str]:
        """The arguments of `accelerate launch`."""
        return [
            *("--num_machines", str(self.nodes), "--machine_rank", str(self.rank), "--same_network"),
            *("--main_process_ip", self.address, "--main_process_port", str(self.port)),
        ]


def group_of_nodes(options: dict[str, Any], nodes: int) -> tuple[Any, dict[str, Any]]:
    """Reserve a task's resources on each of several nodes; return the group and the options of the task on the first one."""
    bundle = {name: options[option] for option, name in _RESOURCES.items() if options.get(option)}
    selector = options.get("label_selector")
    group = placement_group(
        [bundle] * nodes, strategy="STRICT_SPREAD", bundle_label_selector=[selector] * nodes if selector else None
    )
    rest = {name: value for name, value in options.items() if name != "label_selector"}
    return group, {**rest, "scheduling_strategy": PlacementGroupSchedulingStrategy(group, 0)}


class Partners:
    """The tasks beside the leader's, which calls this in its own task."""

    def __init__(self, options: dict[str, Any], nodes: int) -> None:
        self._options, self._nodes = options, nodes
        self._group: Any = get_current_placement_group()
        self._runs: list[Any] = []

    def wait_for_nodes(self, may_continue: Callable[[], bool]) -> bool:
        """Wait until each node is there, so that the processes do not wait for each other; return whether that was wanted."""
        pending = [self._submit(_is_there, rank) for rank in range(1, self._nodes)]
        while pending:
            if not may_continue():
                return False
            _, pending = ray.wait(pending, num_returns=len(pending), timeout=WAIT_S)
        return True

    def start(self, run: Callable[..., Any], *arguments: Any) -> Rendezvous:
        """Start `run(*arguments, rendezvous)` on each of the other nodes, and return the leader's rendezvous."""
        with socket.socket() as probe:
            probe.bind(("", 0))
            meeting = Rendezvous(ray.util.get_node_ip_address(), probe.getsockname()[1], self._nodes, 0)
        self._runs = [
            self._submit(run, rank, *arguments, meeting._replace(rank=rank)) for rank in range(1, self._nodes)
        ]
        return meeting

    def have_failed(self) -> bool:
        """Return whether a partner has ended, and not well."""
        ended, _ = ray.wait(self._runs, num_returns=len(self._runs), timeout=0)
        with suppress(NodeLost):
            return any(why for why in map(_why_ended, ended))
        return True

    def why_failed(self, timeout_s: float, *, may_be_lost: bool) -> str:
        """Wait until the partners have ended, for at most `timeout_s`; return why one has failed, "" if none has.

        `may_be_lost`: the run has ended, so that it does not matter any more.

        Raises:
            NodeLost: the node of one is lost.
        """
        ended, _ = ray.wait(self._runs, num_returns=len(self._runs), timeout=timeout_s)
        try:
            return next(filter(None, map(_why_ended, ended)), "")
        except NodeLost:
            if may_be_lost:
                return ""
            raise

    def end(self) -> None:
        """End partners that still run; each ends its worker."""
        for run in self._runs:
            ray.cancel(run)

    def _submit(self, function: Callable[..., Any], rank: int, *arguments: Any) -> Any:
        strategy = PlacementGroupSchedulingStrategy(self._group, rank)
        options = {**self._options, "max_retries": 0, "scheduling_strategy": strategy}
        return ray.remote(function).options(**options).remote(*arguments)


def _why_ended(run: Any) -> str:
    try:
        return str(ray.get(run))
    except RayError as error:
        raise NodeLost(str(error).strip().rpartition("\n")[2]) from error


def _is_there() -> None:
    """End as soon as the node is there."""
