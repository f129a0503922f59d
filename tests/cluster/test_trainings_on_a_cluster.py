"""Trainings on real Ray processes: a head node and other nodes on this machine, with a token, and real bridges.

The nodes have no base models of their own, so each one gets them through the object store. `hold` makes the workers of a node
wait at a step, so that nothing here depends on time.
"""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import anyio
import pytest

from peft_core.config import Settings
from peft_core.manager import PEFTManager
from peft_core.paths import JobPaths
from peft_core.schemas.cluster import ClusterPlan
from peft_core.schemas.events import (
    EVENT,
    CheckpointSaved,
    Event,
    HeldOutMeasured,
    JobFailed,
    JobInterrupted,
    PhaseStarted,
    RunPlanned,
    StepCompleted,
)
from peft_core.schemas.results import SweepRunStatus, TrainingStatus
from peft_core.schemas.task import TrainingTask
from peft_core.system.cancellation import CANCELLED_EXIT_CODE, INTERRUPTED_EXIT_CODE
from peft_core.system.child_process import child_environment
from tests.cluster.real_cluster import TestCluster, free_port
from tests.factories import change_request
from tests.integration.test_training_child import make_task, run_here
from tests.model_files import write_model
from tests.tiny_models import write_tiny_base

pytestmark = [pytest.mark.survival, pytest.mark.timeout(900)]

CONFIG = {"rank": 4, "batch_size": 2, "max_steps": 6, "max_length": 256, "precision": "float32"}
WAIT_S = 300.0  # on a busy machine; no test waits for it


class Bridge:
    """A bridge process of a job, and the events that it has written."""

    def __init__(self, task: TrainingTask, cluster: TestCluster, *options: str, **environment: str) -> None:
        paths = JobPaths(task.job_dir)
        paths.root.mkdir(exist_ok=True)
        paths.task.write_text(task.model_dump_json())
        self.events: list[Event] = []
        with paths.log.open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-P", "-m", "peft_core.cluster.bridge", str(paths.task), *options],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=log,
                env={**child_environment(), **cluster.environment, **environment},
            )
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        with self.process.stdout as stdout:
            for line in stdout:
                self.events.append(EVENT.validate_json(line))

    def of(self, kind: type[Any]) -> list[Any]:
        return [event for event in self.events if isinstance(event, kind)]

    def details(self) -> str:
        return "\n".join(event.detail for event in self.of(PhaseStarted))

    def until(self, condition: Callable[[Bridge], Any]) -> None:
        deadline = time.monotonic() + WAIT_S
        while not condition(self):
            assert self.process.poll() is None, f"the bridge has ended:\n{self.events[-3:]}"
            assert time.monotonic() < deadline, self.events[-3:]
            time.sleep(0.02)

    def end(self) -> int:
        code = self.process.wait(WAIT_S)
        self._reader.join()
        return code

    def send(self, number: signal.Signals) -> None:
        self.process.send_signal(number)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestCluster]:
    if sys.platform != "linux":
        pytest.skip("the processes of a node are found through /proc")
    with TestCluster(tmp_path_factory.mktemp("ray") / "cluster") as cluster:
        cluster.add("a")
        yield cluster


@pytest.fixture
def start(cluster: TestCluster) -> Iterator[Callable[..., Bridge]]:
    """Start a bridge; it is killed at the end of the test if it still runs then."""
    bridges: list[Bridge] = []

    def bridge(task: TrainingTask, *options: str, **environment: str) -> Bridge:
        bridges.append(Bridge(task, cluster, *options, **environment))
        return bridges[-1]

    yield bridge
    for each in bridges:
        each.process.kill()
        each.end()


@pytest.fixture(scope="module")
def small_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base model for the small worker, which does not load it."""
    return write_tiny_base(tmp_path_factory.mktemp("bases") / "small", "qwen2")


def task_for(cluster: TestCluster, directory: Path, base: Path, *, project: str = "small", **plan: Any) -> TrainingTask:
    directory.mkdir(exist_ok=True)
    task = make_task(directory, str(base), **CONFIG).model_copy(update={"project_id": project})
    return change_request(task, cluster=ClusterPlan(**{"address": cluster.address, **plan}))


def steps(bridge: Bridge) -> list[int]:
    return [event.step for event in bridge.of(StepCompleted)]


def test_a_run_that_is_stopped_leaves_its_checkpoint_here_and_continues_from_it(
    cluster: TestCluster, start: Callable[..., Bridge], small_base: Path, tmp_path: Path
) -> None:
    cluster.hold("a", 4)
    task = task_for(cluster, tmp_path, small_base)
    bridge = start(task)
    bridge.until(lambda each: 4 in steps(each) and each.of(CheckpointSaved))
    bridge.send(signal.SIGTERM)
    assert bridge.end() == CANCELLED_EXIT_CODE
    saved = json.loads((JobPaths(task.job_dir).checkpoint / "state.pt").read_text())["step"]
    assert saved == 5  # the worker ends the step that it is in

    cluster.hold("a", None)
    resumed = start(task)
    assert resumed.end() == 0
    assert [event.start_step for event in resumed.of(RunPlanned)] == [saved]
    assert steps(resumed) == list(range(saved + 1, 7))


def test_what_is_wrong_with_a_cluster_is_said_in_one_sentence(
    cluster: TestCluster, start: Callable[..., Bridge], small_base: Path, tmp_path: Path
) -> None:
    other_token, other_version = tmp_path / "token", tmp_path / "site"
    other_token.write_text("0" * 64)
    metadata = other_version / "peft_mcp-9.9.9.dist-info" / "METADATA"
    metadata.parent.mkdir(parents=True)
    metadata.write_text("Metadata-Version: 2.1\nName: peft-mcp\nVersion: 9.9.9\n")
    cases: list[tuple[str, str, dict[str, Any], dict[str, str]]] = [
        ("cluster_unreachable", "does not answer", {"address": f"ray://127.0.0.1:{free_port()}"}, {}),
        ("cluster_token", "refused the token", {}, {"RAY_AUTH_TOKEN_PATH": str(other_token)}),
        ("cluster_no_package", "but this machine has 9.9.9", {}, {"PYTHONPATH": str(other_version)}),
        ("cluster_no_node", "64 CPUs", {"cpus": 64}, {}),
    ]
    bridges = [
        start(task_for(cluster, tmp_path / code, small_base, **plan), **environment)
        for code, _, plan, environment in cases
    ]
    for (code, words, _, _), bridge in zip(cases, bridges, strict=True):
        assert bridge.end() == 1
        failed = bridge.events[-1]
        assert isinstance(failed, JobFailed)
        assert failed.error.code == code, failed
        assert words in failed.error.message
        assert len(failed.error.message) < 400
    assert other_token.read_text() not in str([bridge.events for bridge in bridges])


def test_a_base_model_that_is_large_or_has_changed_is_not_sent(
    cluster: TestCluster, start: Callable[..., Bridge], tmp_path: Path
) -> None:
    large = write_model(tmp_path / "large")
    changed = write_model(tmp_path / "changed")
    tasks = {
        "cluster_base_large": task_for(cluster, tmp_path / "one", large, may_send_bytes=1000),
        "cluster_base_differs": task_for(cluster, tmp_path / "two", changed),
    }
    weights = changed / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4] + b"\1\2\3\4")
    bridges = {code: start(task) for code, task in tasks.items()}
    for code, bridge in bridges.items():
        assert bridge.end() == 1
        assert bridge.events[-1].error.code == code, bridge.events[-1]  # type: ignore[union-attr]


def saved_step(task: TrainingTask) -> int:
    """Return the step of the checkpoint that is here."""
    state = JobPaths(task.job_dir).checkpoint / "state.pt"
    return int(json.loads(state.read_text())["step"]) if state.exists() else 0


def jobs_on(cluster: TestCluster, node: str) -> set[str]:
    tasks = [directory / "task.json" for directory in cluster.runs(node)]
    return {json.loads(task.read_text())["job_id"] for task in tasks if task.exists()}


def test_four_jobs_train_at_a_time_and_two_survive_the_loss_of_their_node_one_also_that_of_its_bridge(
    cluster: TestCluster, start: Callable[..., Bridge], small_base: Path, tmp_path: Path
) -> None:
    cluster.add("b")
    for node in ("a", "b"):
        cluster.hold(node, 4)
    tasks = [
        task_for(cluster, tmp_path / name, small_base, cpus=2).model_copy(update={"job_id": f"20260101-000000-{name}"})
        for name in ("aaaaaa", "bbbbbb", "cccccc", "dddddd")
    ]
    bridges = {task.job_id: start(task) for task in tasks}
    for task in tasks:  # each waits until the test lets it continue, so all four train at this moment
        bridges[task.job_id].until(lambda _, task=task: saved_step(task) == 4)
    on_a, on_b = jobs_on(cluster, "a"), jobs_on(cluster, "b")
    assert (len(on_a), len(on_b), on_a | on_b) == (2, 2, set(bridges))

    lost = next(task for task in tasks if task.job_id in on_b)
    cluster.kill("b")
    bridges[lost.job_id].process.kill()
    bridges[lost.job_id].end()
    cluster.hold("a", None)
    bridges[lost.job_id] = start(lost)
    for job_id, bridge in bridges.items():
        assert bridge.end() == 0, bridge.events[-1]
        assert steps(bridge) == [1, 2, 3, 4, 5, 6]
        assert [event.start_step for event in bridge.of(RunPlanned)] == ([0, 4] if job_id in on_b else [0])


def test_a_job_whose_cluster_is_gone_is_interrupted_and_continues_on_another_one_from_the_checkpoint_that_is_here(
    cluster: TestCluster, start: Callable[..., Bridge], small_base: Path, tmp_path: Path
) -> None:
    with TestCluster(tmp_path / "mortal") as mortal:
        mortal.add("x")
        mortal.hold("x", 4)
        task = task_for(mortal, tmp_path / "job", small_base)
        bridge = start(task, "--patience", "1", RAY_AUTH_TOKEN_PATH=str(mortal.token))
        bridge.until(lambda _: saved_step(task) == 4)
        mortal.kill("head")
        assert bridge.end() == INTERRUPTED_EXIT_CODE
    assert bridge.events[-1] == JobInterrupted(reason=bridge.events[-1].reason)  # type: ignore[union-attr]
    assert f"The cluster at {mortal.address} does not answer" in bridge.events[-1].reason  # type: ignore[union-attr]
    resumed = start(change_request(task, cluster=ClusterPlan(address=cluster.address)))
    assert resumed.end() == 0
    assert [event.start_step for event in resumed.of(RunPlanned)] == [4]
    assert steps(resumed) == [5, 6]


def runs_of(status: TrainingStatus) -> tuple[SweepRunStatus, ...]:
    return tuple(status.sweep.runs) if status.sweep is not None else ()


async def until(
    manager: PEFTManager, condition: Callable[[TrainingStatus], bool], job_id: str | None = None
) -> TrainingStatus:
    with anyio.fail_after(WAIT_S):
        while not condition(status := await manager.get_training_status("small", job_id)):
            assert status.error is None, status.error
            await anyio.sleep(0.2)
    return status


async def test_the_runs_of_a_sweep_train_at_a_time_and_the_one_with_the_lowest_loss_is_published(
    cluster: TestCluster, small_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in cluster.environment.items():
        monkeypatch.setenv(name, value)
    settings = Settings(data_dir=tmp_path / "data", cluster=cluster.address)
    manager, records = PEFTManager(settings), task_for(cluster, tmp_path / "records", small_base).request.source
    cluster.add("d")  # each run reserves a whole node
    for node in ("a", "d"):
        cluster.hold(node, 4)
    settings_of_runs = {name: value for name, value in CONFIG.items() if name != "rank"}
    config = {**settings_of_runs, "base_model": str(small_base), "allow_little_data": True, "run_on": "cluster"}
    config["sweep"] = {"rank": [4, 8]}
    queued = await manager.train_adapter("small", str(records), config)
    assert queued.sweep is not None
    for run in runs_of(queued):  # each waits until the test lets it continue, so both train at this moment
        await until(manager, lambda status: status.step == 4, run.job_id)
    for node in ("a", "d"):
        cluster.hold(node, None)
    ended = await until(manager, lambda status: status.sweep is not None and status.sweep.is_complete)
    by_rank = {run.value: run for run in runs_of(ended)}
    assert [by_rank[rank].held_out_loss for rank in (4, 8)] == [2.0, 1.0]
    assert ended.sweep is not None
    assert ended.sweep.best_job_id == by_rank[8].job_id
    assert by_rank[8].published
    assert ended.adapter_path is not None
    cluster.kill("d")


class Relay:
    """The way to a cluster, which a test can close: a port that forwards connections to the cluster's."""

    def __init__(self, cluster: TestCluster) -> None:
        self._port = int(cluster.address.rpartition(":")[2])
        self.port = free_port()
        self._listener: socket.socket | None = None
        self._connections: list[socket.socket] = []

    def open(self) -> None:
        self._listener = socket.create_server(("127.0.0.1", self.port))
        threading.Thread(target=self._accept, args=(self._listener,), daemon=True).start()

    def close(self) -> None:
        assert self._listener is not None
        for each in (self._listener, *self._connections):
            with suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
            each.close()
        self._connections.clear()

    def _accept(self, listener: socket.socket) -> None:
        with suppress(OSError):  # it was closed
            while True:
                here, _ = listener.accept()
                there = socket.create_connection(("127.0.0.1", self._port))
                self._connections += (here, there)
                for pair in ((here, there), (there, here)):
                    threading.Thread(target=self._forward, args=pair, daemon=True).start()

    @staticmethod
    def _forward(source: socket.socket, target: socket.socket) -> None:
        with suppress(OSError):
            while data := source.recv(1 << 16):
                target.sendall(data)
            target.shutdown(socket.SHUT_WR)


def test_a_run_that_could_not_be_asked_to_stop_is_stopped_by_the_next_job_that_uses_the_cluster(
    cluster: TestCluster, start: Callable[..., Bridge], small_base: Path, tmp_path: Path
) -> None:
    cluster.hold("a", 4)
    relay = Relay(cluster)
    relay.open()
    jobs = tmp_path / "jobs"
    jobs.mkdir()
    address = f"ray://127.0.0.1:{relay.port}"
    first, second = (
        task_for(cluster, tmp_path / name, small_base, address=address).model_copy(update={"job_dir": jobs / name})
        for name in ("first", "second")
    )
    bridge = start(first)
    bridge.until(lambda _: saved_step(first) == 4)
    (run,) = cluster.runs("a")
    relay.close()
    bridge.send(signal.SIGTERM)
    assert bridge.end() == INTERRUPTED_EXIT_CODE
    assert "could not be asked to stop the training" in bridge.events[-1].reason  # type: ignore[union-attr]
    assert run.exists()
    relay.open()
    other = start(second)
    other.until(lambda each: "asking the nodes" in each.details() and not run.exists())
    cluster.hold("a", None)
    assert other.end() == 0
    assert not JobPaths(first.job_dir).cluster.exists()
    relay.close()


def test_a_run_on_two_nodes_has_the_losses_of_one_here(
    cluster: TestCluster, start: Callable[..., Bridge], tmp_path: Path
) -> None:
    cluster.add("c")
    base = write_tiny_base(tmp_path / "tiny")
    alone, together = tmp_path / "alone", tmp_path / "together"
    alone.mkdir()
    task = task_for(cluster, together, base, project="adds", nodes=2, cpus=2)
    bridge = start(task)
    assert bridge.end() == 0, bridge.events[-1]
    cluster.kill("c")
    here = run_here(make_task(alone, str(base), **CONFIG))

    def losses(events: list[Event]) -> list[tuple[int, float]]:
        return [(event.step, event.loss) for event in events if isinstance(event, StepCompleted | HeldOutMeasured)]

    assert [step for step, _ in losses(bridge.events)] == [step for step, _ in losses(here)]
    expected = [loss for _, loss in losses(here)]
    assert [loss for _, loss in losses(bridge.events)] == pytest.approx(expected, rel=1e-4)
