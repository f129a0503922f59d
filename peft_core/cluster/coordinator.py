"""What stays on the cluster's head node while a job runs: the coordinator of the job, and the holder of a base model's files.

Both are detached, named Ray actors in the namespace `peft-mcp`. They outlive the bridges, and end by themselves when nothing
has used them for long. Their methods take and return plain values only. Files are kept as pieces in Ray's object store, which
moves them to disk when memory is short; they belong to the actor, so they survive the node that sent them.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import ray
import structlog
from ray.util import remove_placement_group

from peft_core.cluster.remote_run import NAMESPACE, train
from peft_core.cluster.several_nodes import group_of_nodes
from peft_core.cluster.transfer import Listing

HEAD = {"node:__internal_head__": 0.001}  # a resource that only the head node has
MAX_EVENT_BYTES = 256 << 20  # of all events of a job
MAX_ATTEMPTS = 4  # runs in a row that end without a newer checkpoint, for instance because nodes are lost
SILENT_S = 15.0  # a run that has reported nothing for so long is lost, or on its way to another node
CLAIM_S = 60.0  # a bridge that has sent no piece of a base for so long has died: another one may send it
LEASE_S = 60.0  # between two signs of life of a coordinator to its holder
_LINES_PER_ANSWER, _BYTES_PER_ANSWER = 500, 4 << 20

log = structlog.get_logger(__name__)


class Shelves:
    """Files by their hash, and listings of them by name. A listing appears when all its files are there."""

    def __init__(self) -> None:
        self._pieces: dict[tuple[str, int], Any] = {}
        self._listings: dict[str, Listing] = {}

    def missing(self, listing: str) -> list[str]:
        """Return the hashes of the files that have yet to be sent."""
        files = Listing.model_validate_json(listing).files
        return [
            file.sha256
            for file in files
            if any((file.sha256, number) not in self._pieces for number in range(file.pieces))
        ]

    def put(self, sha256: str, number: int, piece: bytes) -> None:
        self._pieces[sha256, number] = ray.put(piece)

    def seal(self, shelf: str, listing: str) -> None:
        """Replace a shelf's listing, and drop all files that no shelf has.

        Raises:
            ValueError: Not all files are there.
        """
        if self.missing(listing):
            raise ValueError("a file has not been sent")
        self._listings[shelf] = Listing.model_validate_json(listing)
        kept = {file.sha256 for each in self._listings.values() for file in each.files}
        self._pieces = {key: piece for key, piece in self._pieces.items() if key[0] in kept}

    def listing(self, shelf: str) -> str | None:
        return self._listings[shelf].model_dump_json() if shelf in self._listings else None

    def piece(self, sha256: str, number: int) -> list[Any]:
        """Return a piece as a reference in a list: what asks fetches it from the object store itself."""
        return [self._pieces[sha256, number]]


class _Actor:
    """What both actors share: the shelves, as methods of an actor, and an end."""

    unused_s: float  # after which it ends

    def __init__(self) -> None:
        self._shelves = Shelves()
        self._used_at = time.monotonic()
        self._watch: asyncio.Task[None] | None = None

    async def missing(self, listing: str) -> list[str]:
        self._touch()
        return self._shelves.missing(listing)

    async def put(self, sha256: str, number: int, piece: bytes) -> None:
        self._touch()
        self._shelves.put(sha256, number, piece)

    async def seal(self, shelf: str, listing: str) -> None:
        self._touch()
        self._shelves.seal(shelf, listing)

    async def listing(self, shelf: str) -> str | None:
        self._touch()
        return self._shelves.listing(shelf)

    async def piece(self, sha256: str, number: int) -> list[Any]:
        self._touch()
        return self._shelves.piece(sha256, number)

    def _touch(self) -> None:
        self._used_at = time.monotonic()
        self._watch = self._watch or asyncio.create_task(self._end_when_unused())

    async def _end_when_unused(self) -> None:
        while time.monotonic() - self._used_at < self.unused_s:
            self._minute()
            await asyncio.sleep(LEASE_S)
        os._exit(0)

    def _minute(self) -> None:
        """Do what is to be done once a minute."""


class BaseHolder(_Actor):
    """A base model's files on their way to the nodes: sent to the cluster once, whatever the number of jobs."""

    unused_s = 1800.0

    def __init__(self) -> None:
        super().__init__()
        self._sender = ""

    async def claim(self, sender: str) -> str:
        """Return "sealed", or "send" to the one bridge that is to send the files, or "wait" to the others."""
        if self._shelves.listing("base") is not None:
            self._touch()
            return "sealed"
        if sender != self._sender and self._sender and time.monotonic() - self._used_at < CLAIM_S:
            return "wait"
        self._sender = sender
        self._touch()
        return "send"

    async def lease(self) -> None:
        """Stay: a coordinator may need the files once more, if its run moves to another node."""
        self._touch()


class Coordinator(_Actor):
    """One job on the cluster: its files, its events so far, its run, and at last the adapter.

    Its status is "new", "waiting" (for a node), "running", "stopping" or "ended". When it has ended, `outcome` is "completed",
    "failed", "stopped" or "lost", and `reason` says why it was lost, or how it failed.
    """

    unused_s = 14 * 86_400.0  # a laptop may stay closed for a while

    def __init__(self, job_id: str) -> None:
        super().__init__()
        self._job_id = job_id
        self._lines: list[bytes] = []
        self._bytes = 0
        self._status = "new"
        self._outcome = self._reason = self._log = self._node = ""
        self._max_minutes: float | None = None
        self._ends_at: float | None = None  # when the time limit is reached
        self._attempt = self._tries = self._checkpoint = 0
        self._reported_at = 0.0
        self._holder: Any = None
        self._run: Any = None  # reference to the remote run
        self._group: Any = None  # of the nodes of a run that has several
        self._end_of_run: asyncio.Task[None] | None = None
        self._changed = asyncio.Event()

    # ---- The bridge's side

    async def start(
        self, options: dict[str, Any], holder: str | None, max_minutes: float | None, nodes: int = 1
    ) -> None:
        """Submit the run.

        Args:
            options: Of the Ray task.
            holder: The name of the actor that has its base model; None: the nodes have it.
            max_minutes: After which the run is stopped, from its first beginning on.
            nodes: On which it trains; the task leads it on the first of them.
        """
        self._touch()
        if self._status != "new":
            return
        self._holder = None if holder is None else ray.get_actor(holder, namespace=NAMESPACE)
        self._status = "waiting"
        self._max_minutes = max_minutes
        if nodes > 1:
            self._group, options = group_of_nodes(options, nodes)
        me = ray.get_runtime_context().current_actor
        self._run = ray.remote(train).options(**options).remote(me, self._job_id, holder)
        self._end_of_run = asyncio.create_task(self._await_run())
        self._minute()

    async def follow(self, position: int, wait_s: float) -> dict[str, Any]:
        """Return the events from `position` on and how the job stands; wait for a change if there is none yet."""
        self._touch()
        if len(self._lines) <= position and self._status != "ended":
            self._changed.clear()
            with suppress(TimeoutError):
                await asyncio.wait_for(self._changed.wait(), wait_s)
        lines, size = [], 0
        for line in self._lines[position : position + _LINES_PER_ANSWER]:
            lines.append(line)
            size += len(line)
            if size > _BYTES_PER_ANSWER:
                break
        status = self._status
        if status == "running" and time.monotonic() - self._reported_at > SILENT_S:
            status = "waiting"
        return {
            "lines": lines,
            "total": len(self._lines),
            "status": status,
            "outcome": self._outcome,
            "reason": self._reason,
            "log": self._log,
            "node": self._node,
            "checkpoint": self._checkpoint,
        }

    async def stop(self) -> None:
        """End the run: with a checkpoint if it runs, immediately if it waits for a node."""
        self._touch()
        if self._status in ("new", "ended"):
            self._end("stopped")
        elif self._status == "waiting" or time.monotonic() - self._reported_at > SILENT_S:
            ray.cancel(self._run)
            self._end("stopped")
        else:
            self._status = "stopping"
            self._changed.set()

    # ---- The remote run's side

    async def begin(self, node: str) -> int | None:
        """Return the number of this attempt; None if the run is not wanted any more."""
        if self._status in ("stopping", "ended"):
            self._end("stopped")
            return None
        self._tries += 1
        if self._tries > MAX_ATTEMPTS:
            reason = f"{MAX_ATTEMPTS} attempts in a row ended without progress, the last one on {self._node}"
            self._end("lost", reason=reason)
            return None
        if self._ends_at is None and self._max_minutes is not None:
            self._ends_at = time.monotonic() + 60 * self._max_minutes
        self._attempt += 1
        self._node = node
        self._status = "running"
        self._reported_at = time.monotonic()
        self._changed.set()
        return self._attempt

    async def report(self, attempt: int, lines: list[bytes]) -> bool:
        """Take events. Return False if this attempt is to stop."""
        if attempt != self._attempt or self._status == "ended":
            return False
        self._reported_at = time.monotonic()
        self._bytes += sum(map(len, lines))
        if self._bytes > MAX_EVENT_BYTES:
            self._end("failed", reason=f"the run wrote more than {MAX_EVENT_BYTES} bytes of events")
            return False
        if lines:
            self._lines += lines
            self._changed.set()
        if self._ends_at is not None and time.monotonic() > self._ends_at and self._status == "running":
            self._status = "stopping"
            self._reason = f"The time limit was reached: config.max_minutes = {self._max_minutes:g}."
        return self._status != "stopping"

    async def checkpointed(self, attempt: int) -> None:
        """A newer checkpoint is on the shelf "checkpoint"."""
        if attempt == self._attempt:
            self._checkpoint += 1
            self._tries = 1
            self._changed.set()

    async def ended(self, attempt: int, outcome: str, reason: str, log_tail: str) -> None:
        if attempt == self._attempt and self._status != "ended":
            self._end(outcome, reason=reason, log_tail=log_tail)

    async def _await_run(self) -> None:
        """Wait for the end of the run. Ray repeats it after the loss of a node."""
        try:
            await self._run
            reason = "the run ended without saying how"
        except Exception as error:  # noqa: BLE001 -- whatever Ray raises: the bridge shows it
            log.warning("run_lost", job_id=self._job_id, error=str(error))
            reason = f"{type(error).__name__}: {str(error).strip().rpartition(chr(10))[2]}"[:500]
        if self._group is not None:
            remove_placement_group(self._group)  # or its resources stay reserved until the adapter is fetched
        if self._status != "ended":
            self._end("lost", reason=reason)

    def _end(self, outcome: str, *, reason: str = "", log_tail: str = "") -> None:
        if self._status != "ended":
            self._status, self._outcome, self._reason, self._log = "ended", outcome, reason or self._reason, log_tail
            self._changed.set()

    def _minute(self) -> None:
        if self._holder is not None and self._status != "ended":
            self._holder.lease.remote()


def actor_options(name: str) -> Mapping[str, Any]:
    """Return how both actors are created: named and detached, on the head node, and never restarted without their state."""
    return {
        "name": name,
        "namespace": NAMESPACE,
        "lifetime": "detached",
        "num_cpus": 0,
        "resources": HEAD,
        "max_restarts": 0,
        "max_task_retries": 0,
    }
