"""Follow a job's run on the cluster: start it or attach to it, pass on its events, fetch its checkpoints and its adapter."""

from __future__ import annotations

import json
import secrets
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import ray
import structlog
from pydantic import ValidationError
from ray.exceptions import RayTaskError

from peft_core.cluster import connection, shelves
from peft_core.cluster.bridge import listen
from peft_core.cluster.remote_run import NAMESPACE
from peft_core.cluster.submission import submit
from peft_core.errors import ClusterError, sanitize
from peft_core.paths import JobPaths
from peft_core.schemas.cluster import ClusterPlan
from peft_core.schemas.events import (
    EVENT,
    AdapterWritten,
    CheckpointSaved,
    DatasetPrepared,
    DeviceChecked,
    Evaluated,
    Event,
    HeldOutMeasured,
    JobFailed,
    MemorySaved,
    PhaseStarted,
    RateLowered,
    RunPlanned,
    StepCompleted,
    StoppedEarly,
)
from peft_core.schemas.frozen import FrozenModel
from peft_core.schemas.results import ErrorInfo, Phase
from peft_core.schemas.task import TrainingTask
from peft_core.system.cancellation import Cancelled, Interrupted, StopFlag
from peft_core.system.child_process import JsonLineWriter
from peft_core.system.files import atomic_write

MAX_ADAPTER_BYTES = 4 << 30
MAX_CHECKPOINT_BYTES = 16 << 30
FOLLOWED_CHECKPOINT_BYTES = 1 << 30  # a larger one is fetched at the end only
FOLLOW_S = 1.0  # for which the coordinator waits for an event; also how soon a signal is noticed
ANSWER_S = 30.0  # after which a coordinator that does not answer counts as unreachable
RETRY_S = 2.0  # between two attempts to connect
WAITING_S = 3.0  # after which a run that has no node yet is reported as waiting
_TEMPORARY = (".receiving-*", ".sending-*", ".tokenizer-*")  # directories in that of the job
_CHECKPOINT_FILES = ("base_scores.json", "parent_scores.json")
# A worker emits these. Any other, such as JobCompleted with a path of this machine, is not the cluster's to say.
_FROM_A_RUN = (
    PhaseStarted, DatasetPrepared, DeviceChecked, RunPlanned, StepCompleted, HeldOutMeasured, CheckpointSaved, StoppedEarly,
    RateLowered, MemorySaved, Evaluated, AdapterWritten, JobFailed,
)  # fmt: skip

log = structlog.get_logger(__name__)


class Record(FrozenModel):
    """JOB/cluster.json: what a later bridge of the job needs to know."""

    name: str  # of the coordinator
    written: str = ""  # the last event, once JOB/adapter is complete
    abandoned_at: str = ""  # the address of a cluster that could not be asked to stop the run


def run(task: TrainingTask, emit: JsonLineWriter, stop: StopFlag, *, patience_s: float) -> int:
    """Train on the cluster, and return the exit code: 0 with an adapter, 1 after `JobFailed`.

    Raises:
        Cancelled: The run was stopped, as requested.
        Interrupted: The run is lost, or out of reach.
        PeftMcpError: The run could not be started.
    """
    plan = task.request.cluster
    assert plan is not None  # noqa: S101 -- the bridge has checked it
    return Attachment(task, plan, emit, stop, patience_s).run()


class Attachment:
    """A job, its run on the cluster, and the connection to it."""

    def __init__(
        self, task: TrainingTask, plan: ClusterPlan, emit: JsonLineWriter, stop: StopFlag, patience_s: float
    ) -> None:
        self._task, self._plan, self._emit, self._stop, self._patience_s = task, plan, emit, stop, patience_s
        self._paths = JobPaths(task.job_dir)
        self._record: Record | None = read_record(self._paths.cluster)
        self._coordinator: Any = None
        self._phase = Phase.PREPARING_DATA
        self._detail = ""
        self._last: AdapterWritten | JobFailed | None = None  # held back until everything else is done
        self._checkpoint = 0  # number of the newest one that was fetched
        self._stop_requested = False
        self._waiting_since: float | None = None

    def run(self) -> int:
        self._delete_left_behind()
        if (written := self._adapter_is_here()) is not None:
            self._emit(written)
            return 0
        if self._record is None:
            self._report("connecting to the cluster")
            self._connect()
        else:
            if self._record.abandoned_at:
                self._record = self._record.model_copy(update={"abandoned_at": ""})
                self._save()
            self._reconnect()
        self._stop_abandoned()
        self._remove_remains()
        if self._coordinator is None:
            self._start()
        return self._finish(self._follow())

    def _delete_left_behind(self) -> None:
        """Delete what an earlier bridge of the job was sending or receiving when it detached or was killed."""
        for pattern in _TEMPORARY:
            for directory in self._paths.root.glob(pattern):
                shutil.rmtree(directory, ignore_errors=True)

    # ---- Starting and attaching

    def _connect(self) -> None:
        """Connect to the cluster, and find the job's coordinator, if it has one.

        Raises:
            ClusterError: See `connection.connect`.
        """
        connection.connect(self._plan.address)
        listen(self._stop)  # Ray has replaced the handlers
        self._coordinator = None
        if self._record is not None:
            with suppress(ValueError):  # there is no such actor
                self._coordinator = ray.get_actor(self._record.name, namespace=NAMESPACE)

    def _reconnect(self) -> None:
        """Connect to a cluster on which the job may run, for as long as patience lasts.

        Raises:
            Interrupted: It does not answer, or refuses.
        """
        deadline = time.monotonic() + self._patience_s
        since = time.strftime("%H:%M")
        while True:
            connection.disconnect()
            try:
                return self._connect()
            except ClusterError as error:
                is_silent = error.code == "cluster_unreachable"
                if not is_silent or time.monotonic() > deadline or self._stop.requested:
                    raise Interrupted(f"{error.message} {self._leave()}") from error
            self._report(f"the cluster has not answered since {since}; the training continues there")
            self._stop_or_sleep()

    def _leave(self) -> str:
        """Return what becomes of a run that is out of reach; if it was to stop, the next bridge that connects stops it."""
        if not self._stop.requested:
            return "If the training still runs there, resuming attaches to it."
        assert self._record is not None  # noqa: S101 -- without one, nothing runs there
        self._record = self._record.model_copy(update={"abandoned_at": self._plan.address})
        self._save()
        if self._stop_requested:
            return "The training there was asked to stop before."
        return (
            "So it could not be asked to stop the training, which may continue there: the next training from here that uses "
            "this cluster stops it, and resuming attaches to it."
        )

    def _stop_abandoned(self) -> None:
        """End the runs of other jobs that were cancelled here while this cluster did not answer."""
        for path in self._paths.root.parent.glob(f"*/{self._paths.cluster.name}"):
            record = read_record(path)
            if path == self._paths.cluster or record is None or record.abandoned_at != self._plan.address:
                continue
            try:
                ray.kill(ray.get_actor(record.name, namespace=NAMESPACE))  # its run ends with it
            except connection.LOST:
                return  # the next bridge tries again
            except (ValueError, connection.GONE):
                log.info("abandoned_run_has_ended", name=record.name)
            path.unlink(missing_ok=True)

    def _stop_or_sleep(self) -> None:
        deadline = time.monotonic() + RETRY_S
        while not self._stop.requested and time.monotonic() < deadline:
            time.sleep(0.1)

    def _start(self) -> None:
        """Submit the run, under a name that is recorded first: a killed bridge leaves nothing that the next one cannot find."""
        self._record = Record(name=f"peft-mcp-{secrets.token_hex(4)}-{self._task.job_id}")
        self._save()
        try:
            self._coordinator = submit(self._task, self._plan, self._record.name, self._report, self._stop)
        except BaseException:
            self._paths.cluster.unlink()  # nothing runs there
            raise

    def _remove_remains(self) -> None:
        """Remove a run that was never submitted, or that was stopped for an earlier bridge, which did not live to see it."""
        if self._coordinator is None:
            return
        answer = self._call("follow", 0, 0.0)
        if answer["status"] == "new" or (answer["outcome"] == "stopped" and not answer["reason"]):
            self._fetch_checkpoint(answer, limit=MAX_CHECKPOINT_BYTES)
            self._delete()

    def _adapter_is_here(self) -> Event | None:
        """Return the last event if an earlier bridge has fetched the adapter, but the runner has not published it."""
        if self._record is None or not self._record.written or not self._paths.adapter.is_dir():
            return None
        return EVENT.validate_json(self._record.written)

    # ---- Following

    def _follow(self) -> dict[str, Any]:
        """Pass on all events and fetch checkpoints until the run has ended; return the coordinator's last answer."""
        position = 0
        while True:
            if self._stop.requested and not self._stop_requested:
                self._call("stop")
                self._stop_requested = True
            answer = self._ask(position)
            for line in answer["lines"]:
                self._pass_on(line)
            position += len(answer["lines"])
            if answer["status"] == "ended" and position >= answer["total"]:
                return answer
            self._fetch_checkpoint(answer, limit=FOLLOWED_CHECKPOINT_BYTES)
            self._report_waiting(answer)

    def _ask(self, position: int) -> dict[str, Any]:
        answer: dict[str, Any] = self._call("follow", position, FOLLOW_S)
        return answer

    def _call(self, method: str, *arguments: Any) -> Any:
        """Call the coordinator; connect again if the connection is lost.

        Raises:
            Interrupted: The coordinator is gone, or out of reach.
        """
        while True:
            try:
                return ray.get(getattr(self._coordinator, method).remote(*arguments), timeout=ANSWER_S)
            except connection.LOST as error:
                log.warning("connection_lost", error=str(error)[:500])
            except connection.GONE as error:
                raise self._gone() from error
            self._reconnect()
            if self._coordinator is None:
                raise self._gone()

    def _gone(self) -> Interrupted:
        return Interrupted(
            f"The cluster at {sanitize(self._plan.address)} has lost the training: its head node was restarted. Resuming "
            "starts it again there, from the last checkpoint that was fetched."
        )

    def _pass_on(self, line: bytes) -> None:
        try:
            event = EVENT.validate_json(line)
        except ValidationError as error:
            log.warning("unusable_event", line=line[:200], error=str(error))
            return
        if not isinstance(event, _FROM_A_RUN):
            log.warning("unexpected_event", kind=event.kind)
        elif isinstance(event, AdapterWritten | JobFailed):
            self._last = event
        else:
            if isinstance(event, PhaseStarted):
                self._phase, self._detail = event.phase, event.detail
            self._emit(event)

    def _report_waiting(self, answer: dict[str, Any]) -> None:
        """Say that the run has no node, once that has taken a moment."""
        if answer["status"] != "waiting":
            self._waiting_since = None
            return
        now = time.monotonic()
        self._waiting_since = self._waiting_since or now
        if now - self._waiting_since > WAITING_S:
            lost = f"after the loss of {sanitize(answer['node'])}, " if answer["node"] else ""
            self._report(f"{lost}waiting for {self._needed()} on the cluster")

    def _needed(self) -> str:
        gpus, cpus = self._plan.gpus, self._plan.cpus
        free, total = ray.available_resources(), ray.cluster_resources()
        if gpus:
            return f"{gpus} free GPU{'' if gpus == 1 else 's'} ({free.get('GPU', 0):g} of {total.get('GPU', 0):g} are free)"
        return f"{cpus} free CPU{'' if cpus == 1 else 's'} ({free.get('CPU', 0):g} of {total.get('CPU', 0):g} are free)"

    def _report(self, detail: str) -> None:
        """Emit the phase with a detail, if that has changed."""
        if detail != self._detail:
            self._detail = detail
            self._emit(PhaseStarted(phase=self._phase, detail=detail))

    # ---- The end

    def _finish(self, answer: dict[str, Any]) -> int:
        outcome = answer["outcome"]
        if outcome != "completed":
            self._fetch_checkpoint(answer, limit=MAX_CHECKPOINT_BYTES)
        if outcome == "completed" and isinstance(self._last, AdapterWritten):
            self._fetch_adapter(self._last)
            self._delete()
            self._emit(self._last)
            return 0
        sys.stderr.write(sanitize(answer["log"], limit=None, keep="\n\t"))
        self._delete()
        if outcome == "stopped" and self._stop.requested:
            raise Cancelled
        if outcome == "stopped":
            raise Interrupted(sanitize(answer["reason"], limit=300) or "The training was stopped on the cluster.")
        if outcome == "lost":
            raise Interrupted(f"The training was lost on the cluster: {sanitize(answer['reason'], limit=300)}.")
        self._emit(self._last if isinstance(self._last, JobFailed) else self._failure(answer["reason"]))
        return 1

    def _failure(self, reason: str) -> JobFailed:
        text = sanitize(reason, limit=300) or "The training process on the cluster ended without a result."
        return JobFailed(error=ErrorInfo(code="killed", message=text, suggestions=(f"See the log: {self._paths.log}",)))

    def _fetch_adapter(self, written: AdapterWritten) -> None:
        """Write JOB/adapter, complete or not at all.

        Raises:
            ClusterError: Its files are not what the cluster said, or too large.
        """
        assert self._record is not None  # noqa: S101 -- the run has ended
        with self._receiving("adapter", MAX_ADAPTER_BYTES) as received:
            if any(path.is_dir() for path in received.iterdir()):
                raise ClusterError("The adapter was refused: it has directories.", code="cluster_transfer")
            shutil.rmtree(self._paths.adapter, ignore_errors=True)
            received.rename(self._paths.adapter)
        self._record = self._record.model_copy(update={"written": written.model_dump_json()})
        self._save()

    def _fetch_checkpoint(self, answer: dict[str, Any], *, limit: int) -> None:
        """Replace JOB/checkpoint by the newest one of the run, if it is not larger than the limit in bytes.

        A checkpoint that cannot be fetched now, for instance because the next one has replaced it, does not stop the run.
        """
        if answer["checkpoint"] == self._checkpoint:
            return
        try:
            with self._receiving("checkpoint", limit) as received:
                _require_checkpoint(received)
                shutil.rmtree(self._paths.checkpoint, ignore_errors=True)
                (received / "checkpoint").rename(self._paths.checkpoint)
                for name in _CHECKPOINT_FILES:
                    with suppress(FileNotFoundError):
                        (received / name).replace(self._paths.root / name)
        except (ClusterError, RayTaskError, *connection.LOST, connection.GONE) as error:
            log.warning("checkpoint_not_fetched", error=str(error)[:500])
        else:
            self._checkpoint = answer["checkpoint"]

    @contextmanager
    def _receiving(self, shelf: str, limit: int) -> Iterator[Path]:
        """Fetch a shelf into a directory that is removed afterwards, unless it was renamed."""
        directory = Path(tempfile.mkdtemp(prefix=".receiving-", dir=self._paths.root))
        try:
            what = f"The {shelf} from the cluster"
            if shelves.fetch(self._coordinator, shelf, directory, max_bytes=limit, what=what) is None:
                raise ClusterError(f"{what} is missing.", code="cluster_transfer")
            yield directory
        finally:
            shutil.rmtree(directory, ignore_errors=True)

    def _delete(self) -> None:
        """Remove the job from the cluster."""
        with suppress(*connection.LOST, connection.GONE):
            ray.kill(self._coordinator)
        self._coordinator = None

    def _save(self) -> None:
        assert self._record is not None  # noqa: S101 -- there is one to save
        atomic_write(self._paths.cluster, self._record.model_dump_json())


def _require_checkpoint(received: Path) -> None:
    names = {path.name for path in received.iterdir()}
    if not names <= {"checkpoint", *_CHECKPOINT_FILES} or not (received / "checkpoint").is_dir():
        raise ClusterError("The checkpoint was refused: it has other files.", code="cluster_transfer")


def read_record(path: Path) -> Record | None:
    """Return the record of an earlier bridge; None if there is none, or it is damaged."""
    try:
        return Record.model_validate(json.loads(path.read_bytes()))
    except (OSError, ValueError):
        return None
