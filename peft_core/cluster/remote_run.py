"""A run on a node of the cluster: a Ray task that runs `peft_core.worker` there as a child process.

Ray repeats the task on another node if its own is lost; it then continues from the checkpoint that the coordinator has. The
worker ends with the task's process, as it ends with the runner elsewhere. Each run has a directory of its own, which is
removed at its end; directories of killed runs are removed when the next run starts on the node.
"""

from __future__ import annotations

import json
import math
import os
import queue
import shutil
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import ray
import structlog

from peft_core.cluster import bases, shelves
from peft_core.cluster.several_nodes import Partners, Rendezvous
from peft_core.cluster.transfer import files_below
from peft_core.config import Settings
from peft_core.errors import ClusterError, PeftMcpError
from peft_core.paths import JobPaths
from peft_core.schemas.cluster import ClusterPlan
from peft_core.schemas.events import JobFailed
from peft_core.schemas.task import TrainingTask
from peft_core.system.cancellation import CANCELLED_EXIT_CODE
from peft_core.system.child_process import NODE_VARIABLE, child_environment, describe_exit, python_module
from peft_core.system.failures import TaskKind, error_info
from peft_core.system.lock import FileLock

NAMESPACE = "peft-mcp"
MAX_TASK_BYTES = 8 << 30  # task, dataset and the adapter to continue from
MAX_CHECKPOINT_BYTES = 32 << 30
REPORT_S = 0.5  # between two reports, if there is nothing new
SIGN_OF_LIFE_S = 5.0
GRACE_S = 60.0  # between SIGTERM and SIGKILL: a micro-batch and a checkpoint
PARTNER_S = 30.0  # for which the end of a partner and that of the run may differ
MAX_LINE = 1 << 20  # bytes of an event
_LOG_TAIL_BYTES = 16 << 10
_WHY_CHARACTERS = 2000  # of a partner's log
_SECRETS = ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")  # a training needs no access to the cluster
TASK = TaskKind(
    name="run on the cluster",
    crash_code="cluster_run_crashed",
    log="the log of Ray's worker on that node",
    memory_advice=("Reserve more memory, or use a smaller base model.",),
)

log = structlog.get_logger(__name__)


def train(coordinator: Any, job_id: str, holder: str | None) -> None:
    """Run the job's training on this node. `holder`: the name of the actor that has its base model."""
    attempt = ray.get(coordinator.begin.remote(socket.gethostname()))
    if attempt is None:
        return
    settings = Settings()
    try:
        with _signs_of_life(coordinator, attempt), _directory(settings) as directory:
            _Run(coordinator, attempt, JobPaths(directory), settings, holder).run()
    except PeftMcpError as error:
        log.warning("run_failed", job_id=job_id, error=str(error))
        event = JobFailed(error=error_info(error, TASK))
        ray.get(coordinator.report.remote(attempt, [event.model_dump_json().encode()]))
        ray.get(coordinator.ended.remote(attempt, "failed", "", ""))


@contextmanager
def _signs_of_life(coordinator: Any, attempt: int) -> Iterator[None]:
    """Report regularly, so that the coordinator can tell a run that fetches gigabytes from one that is lost."""
    done = threading.Event()

    def report() -> None:
        while not done.wait(SIGN_OF_LIFE_S):
            coordinator.report.remote(attempt, [])

    threading.Thread(target=report, name="signs-of-life", daemon=True).start()
    try:
        yield
    finally:
        done.set()


class _Run:
    """One attempt of a job on this node."""

    def __init__(self, coordinator: Any, attempt: int, paths: JobPaths, settings: Settings, holder: str | None) -> None:
        self._coordinator, self._attempt = coordinator, attempt
        self._paths, self._settings, self._holder = paths, settings, holder
        self._partners: Partners | None = None

    def run(self) -> None:
        """Fetch the task, run the worker, pass on its events and checkpoints, and hand over the adapter.

        Raises:
            ClusterError: What was fetched is not what it should be, or the base model is not here.
        """
        task = self._fetch()
        if not self._find_partners(task):
            ray.get(self._coordinator.ended.remote(self._attempt, "stopped", "", ""))
            return
        meeting = None
        if self._partners is not None:
            meeting = self._partners.start(train_beside, self._coordinator, self._holder)
        with self._paths.log.open("wb") as log_file:
            worker = subprocess.Popen(  # noqa: S603 -- a module of ours
                command(task, self._paths.task, meeting),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=log_file,
                cwd=self._paths.root,
                env=_environment(launched=_plan_of(task).processes > 1),
            )
        try:
            is_wanted = self._follow(worker)
            code = worker.wait()
            why = self._partners.why_failed(PARTNER_S, may_be_lost=code == 0 or not is_wanted) if self._partners else ""
        finally:
            _end(worker)
            if self._partners is not None:
                self._partners.end()
        self._finish(code, is_wanted=is_wanted, why=why)

    def run_beside(self, rendezvous: Rendezvous) -> str:
        """Compute on one of several nodes; return why this has failed, "" if it has not."""
        task = self._fetch()
        with self._paths.log.open("wb") as log_file:
            worker = subprocess.Popen(  # noqa: S603 -- a module of ours
                command(task, self._paths.task, rendezvous),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=log_file,
                cwd=self._paths.root,
                env=_environment(launched=True),
            )
        try:
            code = worker.wait()
        finally:
            _end(worker)
        return f"{describe_exit(code)}: {_tail(self._paths.log)[-_WHY_CHARACTERS:]}" if code else ""

    def _find_partners(self, task: TrainingTask) -> bool:
        """Wait for the other nodes of a run that has several; return whether the run is still wanted."""
        plan = _plan_of(task)
        if plan.nodes == 1:
            return True
        resources = {"num_gpus": plan.gpus, "num_cpus": plan.cpus, "memory": plan.memory_bytes or None}
        self._partners = Partners(resources, plan.nodes)
        return self._partners.wait_for_nodes(lambda: bool(ray.get(self._coordinator.report.remote(self._attempt, []))))

    def _fetch(self) -> TrainingTask:
        """Write the task's files and the newest checkpoint, and return the task with the paths of this node."""
        root = self._paths.root
        shelves.fetch(self._coordinator, "task", root, max_bytes=MAX_TASK_BYTES, what="The task")
        shelves.fetch(
            self._coordinator, "checkpoint", root, max_bytes=MAX_CHECKPOINT_BYTES, what="The checkpoint of the run"
        )
        task = TrainingTask.model_validate_json(self._paths.task.read_text(encoding="utf-8"))
        wanted = (root / "base.sha256").read_text(encoding="ascii").strip()
        request = task.request
        changes: dict[str, Any] = {
            "base": request.base.model_copy(update={"path": self._base(task, wanted)}),
        }
        if request.continued is not None:
            changes["continued"] = request.continued.model_copy(update={"adapter_path": root / "parent"})
        here = task.model_copy(
            update={
                "request": request.model_copy(update=changes),
                "job_dir": root,
                "base_models_dir": self._settings.paths.base_models,
                "earlier_examples": tuple(root / "earlier" / file.name for file in task.earlier_examples),
                "data_dir": None,
                "allowed_roots": (root,),
            }
        )
        self._paths.task.write_text(here.model_dump_json(), encoding="utf-8")
        return here

    def _base(self, task: TrainingTask, wanted: str) -> Path:
        base = task.request.base
        if (found := bases.locate(base, wanted, self._settings)) is not None:
            return found
        if self._holder is None:
            raise ClusterError(
                f"The node {socket.gethostname()} does not have the base model {base.name}.",
                code="cluster_base_missing",
                suggestions=["Resume the training: the base model is then sent to the cluster"],
            )
        return bases.install(base, wanted, ray.get_actor(self._holder, namespace=NAMESPACE), self._settings)

    def _follow(self, worker: subprocess.Popen[bytes]) -> bool:
        """Pass on events until the worker has ended; return False if it was asked to stop."""
        assert worker.stdout is not None  # noqa: S101 -- it was requested as a pipe
        lines: queue.Queue[bytes | None] = queue.Queue(maxsize=10_000)
        threading.Thread(target=_read, args=(worker.stdout, lines), name="worker-events", daemon=True).start()
        is_wanted, kill_at, at_end = True, math.inf, False
        while not at_end:
            batch, at_end = _take(lines)
            may_continue = ray.get(self._coordinator.report.remote(self._attempt, batch))
            if is_wanted and not may_continue:
                is_wanted, kill_at = False, time.monotonic() + GRACE_S
                worker.terminate()
            if any(_kind(line) == "checkpoint_saved" for line in batch):
                self._send_checkpoint()
            if kill_at == math.inf and self._partners is not None and self._partners.have_failed():
                kill_at = time.monotonic() + PARTNER_S  # the worker notices, unless it still waits for that partner
            if time.monotonic() > kill_at:
                worker.kill()
        return is_wanted

    def _finish(self, code: int, *, is_wanted: bool, why: str) -> None:
        """Hand over what the worker has left, and say how it ended."""
        tail = _tail(self._paths.log)
        if code == 0:
            shelves.send(self._coordinator, "adapter", files_below(self._paths.adapter))
            outcome, reason = "completed", ""
        elif code == CANCELLED_EXIT_CODE or not is_wanted:  # a launcher has an exit code of its own
            self._send_checkpoint()
            outcome, reason = ("lost", "its worker was asked to stop on the node") if is_wanted else ("stopped", "")
        else:
            outcome = "failed"
            tail = f"{tail}\non another node: {why}" if why else tail
            reason = "" if code == 1 else f"The training process on {socket.gethostname()} {describe_exit(code)}."
        ray.get(self._coordinator.ended.remote(self._attempt, outcome, reason, tail))

    def _send_checkpoint(self) -> None:
        """Send the newest checkpoint, if there is one. Links fix its files, which the worker replaces, but never changes."""
        with tempfile.TemporaryDirectory(prefix="snapshot-", dir=self._paths.root) as snapshot:
            files: list[tuple[str, Path]] = []
            present = files_below(self._paths.checkpoint, "checkpoint/") if self._paths.checkpoint.is_dir() else []
            scores = [(path.name, path) for path in (self._paths.base_scores, self._paths.parent_scores)]
            for name, path in (*present, *scores):
                link = Path(snapshot) / path.name
                try:
                    os.link(path, link)
                except FileNotFoundError:
                    continue
                files.append((name, link))
            if any(name == "checkpoint/state.pt" for name, _ in files):
                shelves.send(self._coordinator, "checkpoint", files)
                ray.get(self._coordinator.checkpointed.remote(self._attempt))


def train_beside(coordinator: Any, holder: str | None, rendezvous: Rendezvous) -> str:
    """Compute on this node with the run that the rendezvous belongs to; return why this has failed, "" if it has not."""
    settings = Settings()
    try:
        with _directory(settings) as directory:
            return _Run(coordinator, 0, JobPaths(directory), settings, holder).run_beside(rendezvous)
    except PeftMcpError as error:
        return error.message


def command(task: TrainingTask, task_file: Path, rendezvous: Rendezvous | None = None) -> list[str]:
    """Return the command that trains: the worker, in one process for each GPU that was reserved."""
    processes = _plan_of(task).processes
    if processes == 1:
        return [*python_module("peft_core.worker"), str(task_file)]
    here = ("--num_machines", "1", "--main_process_port", "0")
    return [
        *(*python_module("accelerate.commands.launch"), "--multi_gpu", "--num_processes", str(processes)),
        *("--mixed_precision", "no", "--dynamo_backend", "no", *(rendezvous.arguments if rendezvous else here)),
        *("-m", "peft_core.worker", str(task_file)),
    ]


def _plan_of(task: TrainingTask) -> ClusterPlan:
    assert task.request.cluster is not None  # noqa: S101 -- it runs there
    return task.request.cluster


def _environment(*, launched: bool) -> dict[str, str]:
    environment = {**child_environment(launched=launched), NODE_VARIABLE: socket.gethostname()}
    return {name: value for name, value in environment.items() if name not in _SECRETS}


@contextmanager
def _directory(settings: Settings) -> Iterator[Path]:
    """Make a private directory for a run, and remove it afterwards. What killed runs have left is removed first."""
    runs = settings.paths.cluster_runs
    runs.mkdir(parents=True, exist_ok=True, mode=0o700)
    with FileLock(runs / ".lock") as everything:
        everything.acquire(math.inf)
        for left in runs.glob("run-*"):
            with FileLock(left / "lock") as lock:
                if lock.acquire():
                    shutil.rmtree(left, ignore_errors=True)
        directory = Path(tempfile.mkdtemp(prefix="run-", dir=runs))
        mine = FileLock(directory / "lock")
        mine.acquire()
    try:
        yield directory
    finally:
        shutil.rmtree(directory, ignore_errors=True)
        mine.release()


def _read(stream: IO[bytes], lines: queue.Queue[bytes | None]) -> None:
    """Read events in a thread, until the worker closes its output or writes a line without an end."""
    while (line := stream.readline(MAX_LINE)).endswith(b"\n"):
        lines.put(line)
    lines.put(None)
    stream.close()


def _take(lines: queue.Queue[bytes | None]) -> tuple[list[bytes], bool]:
    """Return the lines that have come, and whether they were the last; wait a moment for the first one."""
    batch: list[bytes] = []
    try:
        line = lines.get(timeout=REPORT_S)
        while line is not None:
            batch.append(line)
            line = lines.get_nowait()
    except queue.Empty:
        return batch, False
    return batch, True


def _kind(line: bytes) -> str:
    try:
        return str(json.loads(line)["kind"])
    except (ValueError, KeyError, TypeError):
        return ""  # the bridge refuses it


def _end(worker: subprocess.Popen[bytes]) -> None:
    """End a worker that still runs, because this run was cancelled or has lost its coordinator."""
    if worker.poll() is None:
        worker.terminate()
        try:
            worker.wait(GRACE_S)
        except subprocess.TimeoutExpired:
            worker.kill()
            worker.wait()


def _tail(path: Path) -> str:
    with path.open("rb") as stream:
        stream.seek(max(0, path.stat().st_size - _LOG_TAIL_BYTES))
        return stream.read().decode("utf-8", "replace")
