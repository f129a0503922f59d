"""One run in several processes, started by `accelerate launch`, on CPUs in place of several GPUs.

`--multi_gpu` makes accelerate start more than one process; without a GPU they compute on the CPU. With `--cpu`, accelerate
needs MPI for several processes, and silently starts a single one without it.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file

from peft_core import PEFTManager, Settings
from peft_core.paths import DataPaths
from peft_core.schemas.events import (
    EVENT,
    CheckpointSaved,
    Event,
    HeldOutMeasured,
    JobFailed,
    PhaseStarted,
    StepCompleted,
)
from peft_core.schemas.results import Status
from peft_core.schemas.task import TrainingTask
from peft_core.system import child_process
from tests.integration.test_training_child import ENDLESS, SHORT_RUN, make_task, read_until, run_here
from tests.tiny_models import write_tiny_base

ROOT = Path(__file__).parents[2]
LAUNCHER = [
    *(sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1"),
    *("--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"),  # 0: any free port
]
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT), "PYTHONSAFEPATH": "1"}
WITH_PARENT = {child_process.PARENT_VARIABLE: child_process.LAUNCHER}


@pytest.fixture(scope="module")
def tiny_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_base(tmp_path_factory.mktemp("tiny-base"))


@contextmanager
def launched(task: TrainingTask) -> Iterator[subprocess.Popen[str]]:
    task.job_dir.mkdir()
    (task.job_dir / "task.json").write_text(task.model_dump_json())
    process = subprocess.Popen(
        [*LAUNCHER, "-m", "peft_core.worker", str(task.job_dir / "task.json")],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **ENVIRONMENT, **WITH_PARENT},
    )
    try:
        yield process
    finally:
        process.kill()  # its children notice, and exit
        process.communicate()


def ranks(process: subprocess.Popen[str]) -> list[psutil.Process]:
    """Return the launched processes by rank; the first one writes the events."""
    return sorted(psutil.Process(process.pid).children(), key=lambda child: child.environ()["RANK"])


def test_two_launched_processes_train_like_one(tmp_path: Path, tiny_base: Path) -> None:
    config = {
        **SHORT_RUN,
        "batch_size": 3,
        "max_steps": None,
        "num_epochs": 0.5,
    }  # the last step is smaller than the others
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    alone = run_here(make_task(tmp_path / "one", str(tiny_base), **config))

    with launched(make_task(tmp_path / "two", str(tiny_base), **config)) as process:
        out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    assert err.count("event=layers_fused") == 2  # once per process
    assert err.count("event=adapter_written") == 1
    together = [EVENT.validate_json(line) for line in out.splitlines()]  # nothing else on standard output

    def curve(events: list[Event]) -> dict[tuple[str, int, bool], float]:
        steps = {("step", e.step, False): e.loss for e in events if isinstance(e, StepCompleted)}
        return steps | {("held out", e.step, e.whole_set): e.loss for e in events if isinstance(e, HeldOutMeasured)}

    def kinds(events: list[Event]) -> list[str]:
        return [event.kind for event in events if not (isinstance(event, PhaseStarted) and event.detail)]

    assert curve(together) == pytest.approx(curve(alone), rel=1e-4)
    assert kinds(together) == kinds(alone)  # every event is emitted once
    adapters = [load_file(tmp_path / name / "job" / "adapter" / "adapter_model.safetensors") for name in ("one", "two")]
    assert adapters[0].keys() == adapters[1].keys()
    for name, tensor in adapters[0].items():
        assert torch.allclose(tensor, adapters[1][name], atol=1e-4)


def test_killing_one_launched_process_ends_the_others_with_one_job_failed_event(
    tmp_path: Path, tiny_base: Path
) -> None:
    task = make_task(tmp_path, str(tiny_base), **ENDLESS)
    with launched(task) as process:
        read_until(process, StepCompleted)
        processes = ranks(process)
        began = time.monotonic()
        processes[1].kill()
        out, err = process.communicate(timeout=60)
        assert time.monotonic() - began < 20
    assert process.returncode == 1, err
    events = [EVENT.validate_json(line) for line in out.splitlines()]
    assert [isinstance(event, JobFailed) for event in events].count(True) == 1
    assert isinstance(events[-1], JobFailed)
    assert not any(child.is_running() for child in processes)
    assert not (task.job_dir / "adapter").exists()


@pytest.mark.parametrize("end", [signal.SIGTERM, signal.SIGKILL])
def test_launched_processes_save_a_checkpoint_and_end_with_their_launcher(
    tmp_path: Path, tiny_base: Path, end: signal.Signals
) -> None:
    task = make_task(tmp_path, str(tiny_base), **ENDLESS)
    with launched(task) as process:
        read_until(process, StepCompleted)
        processes = ranks(process)
        process.send_signal(end)
        out, _ = process.communicate(timeout=60)  # until all of them have closed it
    assert isinstance(EVENT.validate_json(out.splitlines()[-1]), CheckpointSaved)
    assert psutil.wait_procs(processes, timeout=20)[1] == []


@pytest.mark.parametrize("processes", [1, 2])
async def test_a_job_is_trained_under_the_launcher_of_the_settings(
    tmp_path: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch, processes: int
) -> None:
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    records = make_task(tmp_path, str(tiny_base), **SHORT_RUN).request.source
    settings = Settings(
        data_dir=tmp_path / "data", launcher=" ".join(LAUNCHER if processes == 2 else [*LAUNCHER[:3], "--cpu"])
    )
    async with PEFTManager(settings) as manager:
        job = await manager.train_adapter(
            "adds", str(records), {**SHORT_RUN, "base_model": str(tiny_base), "allow_little_data": True}
        )
        async for status in manager.watch_training("adds", job.job_id):
            last = status
    log = DataPaths(tmp_path / "data").job(job.job_id).log.read_text()
    assert last.status is Status.COMPLETED, log
    assert log.count("event=layers_fused") == processes
