"""The training worker as the runner sees it: a process with a task on stdin, events on stdout, and an exit code.

V vocabulary, T tokens
"""

from __future__ import annotations

import gc
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from structlog.testing import capture_logs
from transformers import AutoModelForCausalLM

from peft_core.adapters.manifest import read_manifest, sha256_of
from peft_core.adapters.verify import verify
from peft_core.base_models.resolve import resolve
from peft_core.config import Settings
from peft_core.errors import InvalidArgument
from peft_core.modeling import memory
from peft_core.modeling.activation_arena import ActivationArena
from peft_core.planning.defaults import default_learning_rate
from peft_core.schemas.dataset import DataSource, SourceKind
from peft_core.schemas.events import (
    EVENT,
    AdapterWritten,
    CheckpointSaved,
    DatasetPrepared,
    Evaluated,
    Event,
    HeldOutMeasured,
    JobFailed,
    PhaseStarted,
    RateLowered,
    RunPlanned,
    StepCompleted,
)
from peft_core.schemas.results import Phase
from peft_core.schemas.task import ComputePlan, TrainingTask
from peft_core.schemas.training import TrainingConfig
from peft_core.system.cancellation import StopFlag
from peft_core.training import run as training_run
from tests.factories import change_request, make_request
from tests.tiny_models import write_tiny_base

SHORT_RUN = {"rank": 4, "batch_size": 2, "max_steps": 6, "max_length": 256}
ENDLESS = {**SHORT_RUN, "max_steps": 100_000, "eval_steps": 100_000}


@pytest.fixture(scope="module")
def tiny_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_base(tmp_path_factory.mktemp("tiny-base"))


def make_task(directory: Path, base: str | None, **config: Any) -> TrainingTask:
    records = directory / "records.jsonl"
    lines = [{"text": f"def add_{n}(a, b):\n    return a + {n} * b\n", "path": f"m{n}.py"} for n in range(40)]
    records.write_text("".join(json.dumps(line) + "\n" for line in lines))
    resolved = resolve(base, Settings())
    rate = default_learning_rate(resolved.shape.hidden_size, config.get("batch_size", 4))
    return TrainingTask(
        job_id="20260101-000000-abcdef",
        project_id="adds",
        request=make_request(
            source=records,
            source_kind="jsonl",
            config=TrainingConfig(device="cpu", **{"learning_rate": rate, **config}),
            base=resolved,
        ),
        job_dir=directory / "job",
        base_models_dir=directory / "base_models",
    )


def test_a_link_that_points_to_a_forbidden_place_when_the_job_starts_is_not_followed(
    tmp_path: Path, tiny_base: Path
) -> None:
    task = make_task(tmp_path, str(tiny_base), **SHORT_RUN)
    data_dir, outside = tmp_path / "data", tmp_path / "outside"
    for place in (data_dir / "projects" / "other", outside):
        place.mkdir(parents=True)
        (place / "records.jsonl").write_text(task.request.source.read_text())
    link = tmp_path / "inside" / "link"
    link.parent.mkdir()
    places = {"data_dir": data_dir, "allowed_roots": (tmp_path / "inside", data_dir)}
    task = change_request(task.model_copy(update=places), source=link / "records.jsonl")
    for target, code in ((data_dir / "projects" / "other", "sensitive_place"), (outside, "outside_allowed_roots")):
        link.unlink(missing_ok=True)
        link.symlink_to(target)
        with pytest.raises(InvalidArgument, match=r"^training_data = ") as caught:
            run_here(task)
        assert caught.value.code == code
        assert not (task.job_dir / "dataset").exists()


@contextmanager
def worker(task: TrainingTask | str, **environment: str) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [sys.executable, "-m", "peft_core.worker"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
    )
    try:
        assert process.stdin is not None
        process.stdin.write(task if isinstance(task, str) else task.model_dump_json())
        process.stdin.close()
        process.stdin = None
        yield process
    finally:
        process.kill()
        process.communicate()


def run_worker(task: TrainingTask | str, **environment: str) -> tuple[int, list[Event], str]:
    with worker(task, **environment) as process:
        out, err = process.communicate(timeout=500)
        return process.returncode, [EVENT.validate_json(line) for line in out.splitlines()], err


def run_here(task: TrainingTask) -> list[Event]:
    """Run a task in this process, which has imported torch already."""
    events: list[Event] = []
    try:
        training_run.run(task, events.append, StopFlag())
    finally:
        memory.set_malloc_keep()  # restores what the other tests expect
    return events


def losses(directory: Path, base: Path, execution: ComputePlan, **config: Any) -> tuple[list[float], list[str]]:
    """Run a training and return all its losses and what it logged."""
    directory.mkdir()
    task = make_task(directory, str(base), **SHORT_RUN, **config)
    with capture_logs() as log:
        events = run_here(change_request(task, execution=execution))
    found = [event.loss for event in events if isinstance(event, StepCompleted | HeldOutMeasured)]
    return found, [entry["event"] for entry in log]


@pytest.fixture
def one_thread(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Keep the number of threads, on which the last bits of a loss depend."""
    before = torch.get_num_threads()
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # otherwise a training chooses the number itself
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("dropout", [0.0, 0.1])  # with dropout, PEFT's own layers are used
def test_mmapped_weights_and_gradient_checkpointing_give_bit_identical_losses(
    tmp_path: Path, tiny_base: Path, dropout: float
) -> None:
    plain, log = losses(tmp_path / "memory", tiny_base, ComputePlan(), dropout=dropout)
    assert "base_mapped" not in log
    leanest = ComputePlan(weights="file", recompute_layers=True)
    lean, log = losses(tmp_path / "file", tiny_base, leanest, dropout=dropout)
    assert "base_mapped" in log
    assert lean == plain


def test_bfloat16_matrix_products_give_nearly_the_same_losses(tmp_path: Path, tiny_base: Path) -> None:
    plain, _ = losses(tmp_path / "float32", tiny_base, ComputePlan())
    rounded, log = losses(tmp_path / "bfloat16", tiny_base, ComputePlan(weights="bfloat16"))
    assert "base_mapped" in log
    assert rounded == pytest.approx(plain, rel=0.01)
    assert rounded != plain


@pytest.mark.parametrize(("weights", "exists"), [("bfloat16", True), ("float32", False)])
def test_the_activation_arena_exists_only_while_bfloat16_blocks_train(
    tmp_path: Path, tiny_base: Path, weights: Any, exists: bool
) -> None:
    arena_counts: dict[str, int] = {}

    def emit(event: Event) -> None:
        if isinstance(event, StepCompleted | PhaseStarted):
            arenas = [obj for obj in gc.get_objects() if type(obj) is ActivationArena]
            arena_counts[event.kind if isinstance(event, StepCompleted) else event.phase] = len(arenas)

    task = make_task(tmp_path, str(tiny_base), **SHORT_RUN)
    training_run.run(change_request(task, execution=ComputePlan(weights=weights)), emit, StopFlag())
    assert arena_counts["step_completed"] == exists
    assert arena_counts[Phase.EVALUATING_ADAPTER] == 0


@pytest.mark.parametrize("recompute", [False, True])
def test_gradient_checkpointing_returns_freed_memory_from_the_start(
    tmp_path: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch, recompute: bool
) -> None:
    sizes: list[int] = []
    set_threshold = memory._set_threshold
    monkeypatch.setattr(memory, "_set_threshold", lambda size: (sizes.append(size), set_threshold(size)))
    task = make_task(tmp_path, str(tiny_base), **SHORT_RUN)
    compute_plan = ComputePlan(weights="file", recompute_layers=recompute)
    training_run.run(change_request(task, execution=compute_plan), lambda _event: None, StopFlag())
    assert set(sizes) == {memory._TRIM_THRESHOLD_BYTES if recompute else memory._KEEP_THRESHOLD_BYTES}
    memory.set_malloc_keep()  # restores what the other tests expect


def test_a_run_with_study_items_reports_what_was_understood_of_apis_that_it_was_not_asked_about(
    tmp_path: Path, tiny_base: Path
) -> None:
    repository = tmp_path / "code"
    repository.mkdir()
    items = []
    for file in range(5):
        names = [f"add_{file}_{n}" for n in range(8)]
        (repository / f"m{file}.py").write_text(
            "\n\n".join(f"def {name}(a):\n    return a + {file}\n" for name in names)
        )
        items += [
            {"study": name, "question": f"How is {name} used?", "answer": f"As in `{name}({file})`."} for name in names
        ]
    items.append({"study": names[0], "question": "Which other?", "answer": "Call `subtract(1)`."})
    (tmp_path / "items.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))
    more = (DataSource(path=tmp_path / "items.jsonl", kind=SourceKind.JSONL, name="items.jsonl"),)
    task = make_task(tmp_path, str(tiny_base), **SHORT_RUN)
    events = run_here(
        change_request(task, source=repository, source_kind="repository", source_name="code", more_sources=more)
    )
    study = next(event.dataset.study for event in events if isinstance(event, DatasetPrepared))
    assert study is not None
    assert (study.items, study.dropped[0].count, study.dropped[0].example) == (
        41,
        1,
        "Line 41: it uses subtract, which the repository does not have.",
    )
    evaluation = next(event.evaluation for event in events if isinstance(event, Evaluated))
    assert evaluation.study is not None
    assert (evaluation.study.examples, evaluation.study.files) == (study.held_out, study.held_out_apis)
    # They are not part of the loss that decides.
    dataset = next(event.dataset for event in events if isinstance(event, DatasetPrepared))
    assert evaluation.examples == dataset.held_out_examples - study.held_out


def read_until(process: subprocess.Popen[str], kind: type[Event]) -> list[Event]:
    assert process.stdout is not None
    events: list[Event] = []
    for line in process.stdout:
        events.append(EVENT.validate_json(line))
        if isinstance(events[-1], kind):
            return events
    assert process.stderr is not None
    raise AssertionError(f"no {kind.__name__} event arrived: {process.stderr.read()}")


def test_a_run_writes_a_complete_adapter_that_plain_peft_can_load(tmp_path: Path, tiny_base: Path) -> None:
    task = make_task(tmp_path, str(tiny_base), more_sources=[str(tmp_path / "other")], **SHORT_RUN)
    code, events, err = run_worker(task)
    assert code == 0, err

    phases = [event.phase for event in events if isinstance(event, PhaseStarted) and not event.detail]
    assert phases == [
        Phase.PREPARING_DATA,
        Phase.LOADING_MODEL,
        Phase.EVALUATING_BASE,
        Phase.TRAINING,
        Phase.EVALUATING_ADAPTER,
        Phase.SAVING,
    ]
    assert [event.step for event in events if isinstance(event, StepCompleted)] == [1, 2, 3, 4, 5, 6]
    written = events[-1]
    assert isinstance(written, AdapterWritten)
    assert written.metrics.adapter_loss is not None
    assert written.metrics.base_loss is not None
    assert written.metrics.adapter_loss < written.metrics.base_loss

    adapter = task.job_dir / "adapter"
    binary = {"adapter_model.safetensors", "trained_on.bin", "snapshot.json.gz"}
    names = binary | {"README.md", "adapter_config.json", "adapter_manifest.json"}
    assert {path.name for path in adapter.iterdir()} == names
    assert [reason for reason in verify(adapter, task.request.base).reasons if reason.severity == "error"] == []
    manifest = read_manifest(adapter)
    assert manifest is not None
    assert manifest.metrics == written.metrics
    assert manifest.run.examples_seen == 12 < manifest.data.summary.train_examples
    assert manifest.files == {name: sha256_of(adapter / name) for name in names - {"adapter_manifest.json"}}
    for name in names - binary:
        text = (adapter / name).read_text()
        assert str(tmp_path) not in text
        assert str(tiny_base) not in text

    base = AutoModelForCausalLM.from_pretrained(tiny_base)
    ids_1T = torch.arange(3, 40)[None]
    with torch.no_grad():
        base_logits_1TV = base(ids_1T).logits
        logits_1TV = PeftModel.from_pretrained(base, adapter)(ids_1T).logits
    assert (logits_1TV - base_logits_1TV).abs().max() > 1e-3

    checkpoint = torch.load(task.job_dir / "checkpoint" / "state.pt", weights_only=True)
    saved = load_file(adapter / "adapter_model.safetensors")
    assert set(saved) == {name.replace(".default", "") for name in checkpoint["adapter"]}
    for name, tensor in checkpoint["adapter"].items():  # the adapter has the weights of the last step
        assert torch.equal(tensor, saved[name.replace(".default", "")])


def test_after_two_passes_the_adapter_adds_less_than_its_last_step_did(tmp_path: Path, tiny_base: Path) -> None:
    task = make_task(tmp_path, str(tiny_base), rank=4, batch_size=8, num_epochs=2, max_length=256)
    code, _, err = run_worker(task)
    assert code == 0, err
    adapter = task.job_dir / "adapter"
    saved = load_file(adapter / "adapter_model.safetensors")
    checkpoint = torch.load(task.job_dir / "checkpoint" / "state.pt", weights_only=True)
    for name, tensor in checkpoint["adapter"].items():
        expected = 0.8 * tensor if ".lora_B." in name else tensor
        torch.testing.assert_close(saved[name.replace(".default", "")], expected)
    manifest = read_manifest(adapter)
    assert manifest is not None
    assert manifest.run.scaled_by == 0.8
    assert "multiplied by 0.8" in (adapter / "README.md").read_text()


def test_sigterm_writes_a_checkpoint_that_the_next_process_resumes_from(tmp_path: Path, tiny_base: Path) -> None:
    task = make_task(tmp_path, str(tiny_base), **ENDLESS)
    with worker(task) as process:
        read_until(process, StepCompleted)
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=60)
        rest = [EVENT.validate_json(line) for line in out.splitlines()]
        assert process.returncode == 143, err
    assert isinstance(rest[-1], CheckpointSaved)

    with worker(task) as process:
        replayed = read_until(process, RunPlanned)
        events = [*replayed, *read_until(process, StepCompleted)]
    resumed_at = events[-1]
    steps = [event for event in rest if isinstance(event, StepCompleted)]
    assert all(step in replayed for step in steps[-1:])  # the runner may have missed the last events
    assert isinstance(resumed_at, StepCompleted)
    assert resumed_at.step == rest[-1].step + 1
    phases = [event.phase for event in events if isinstance(event, PhaseStarted)]
    assert Phase.EVALUATING_BASE not in phases
    assert any(isinstance(event, HeldOutMeasured) and event.step == 0 for event in events)


def test_only_events_are_written_to_standard_output(tmp_path: Path, tiny_base: Path) -> None:
    site = tmp_path / "site"
    site.mkdir()
    (site / "sitecustomize.py").write_text(
        "import threading, time\n"
        "def noise():\n"
        "    time.sleep(2)\n"
        "    print('a library that prints', flush=True)\n"
        "threading.Thread(target=noise, daemon=True).start()\n"
    )
    code, events, err = run_worker(make_task(tmp_path, str(tiny_base), **SHORT_RUN), PYTHONPATH=str(site))
    assert code == 0
    assert isinstance(events[-1], AdapterWritten)
    assert "a library that prints" in err


def test_an_invalid_request_is_reported_as_one_failure_event(tmp_path: Path, tiny_base: Path) -> None:
    config = {**SHORT_RUN, "target_modules": ["query"]}
    code, events, _ = run_worker(make_task(tmp_path, str(tiny_base), **config))
    failed = events[-1]
    assert code == 1
    assert isinstance(failed, JobFailed)
    assert failed.error.code == "invalid_argument"
    assert "q_proj" in failed.error.message


def test_input_that_is_not_a_task_is_reported_as_a_failure() -> None:
    code, events, _ = run_worker('{"job_id": 3}')
    assert code == 1
    assert isinstance(events[-1], JobFailed)
    assert "TrainingTask" in events[-1].error.message


def test_a_worker_whose_stdout_was_closed_exits_with_a_checkpoint(tmp_path: Path, tiny_base: Path) -> None:
    task = make_task(tmp_path, str(tiny_base), **ENDLESS)
    with worker(task) as process:
        read_until(process, StepCompleted)
        assert process.stdout is not None
        process.stdout.close()
        process.stdout = None
        assert process.wait(timeout=60) == 143
    assert (task.job_dir / "checkpoint" / "state.pt").is_file()


def test_a_worker_whose_parent_dies_exits_with_a_checkpoint(tmp_path: Path, tiny_base: Path) -> None:
    task = make_task(tmp_path, str(tiny_base), **ENDLESS)
    (tmp_path / "task.json").write_text(task.model_dump_json())
    parent = subprocess.Popen(
        [
            sys.executable,
            "-c",
            (
                "import os, subprocess, sys, time\n"
                "os.environ['PEFT_MCP_PARENT'] = str(os.getpid())\n"
                f"with open({str(tmp_path / 'task.json')!r}) as task, open({str(tmp_path / 'events')!r}, 'w') as events:\n"
                "    child = subprocess.Popen([sys.executable, '-m', 'peft_core.worker'], stdin=task, stdout=events)\n"
                "print(child.pid, flush=True)\n"
                "time.sleep(600)\n"
            ),
        ],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert parent.stdout is not None
    pid = int(parent.stdout.readline())
    _wait_until(lambda: "step_completed" in (tmp_path / "events").read_text())
    parent.kill()
    parent.communicate()
    _wait_until(lambda: not _is_running(pid), seconds=15)
    assert '"checkpoint_saved"' in (tmp_path / "events").read_text().splitlines()[-1]


# Runs in a worker: its third training loss is NaN, and only in the process of rank 0.
_FAULT = """
import os, sys
from importlib.abc import MetaPathFinder
from importlib.util import find_spec

class Finder(MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name != "peft_core.modeling.objective" or os.environ.get("RANK", "0") != "0":
            return None
        sys.meta_path.remove(self)
        spec = find_spec(name)
        execute = spec.loader.exec_module
        def exec_module(module):
            execute(module)
            plain, calls = module.Objective.loss, []
            def loss(self, batch):
                calls.extend([1] if self.model.training else [])
                return plain(self, batch) * (float("nan") if self.model.training and len(calls) == 3 else 1.0)
            module.Objective.loss = loss
        spec.loader.exec_module = exec_module
        return spec

sys.meta_path.insert(0, Finder())
"""


@pytest.mark.parametrize("processes", [1, 2])
def test_a_rollback_is_recorded_in_manifest_and_model_card(tmp_path: Path, tiny_base: Path, processes: int) -> None:
    site = tmp_path / "site"
    site.mkdir()
    (site / "sitecustomize.py").write_text(_FAULT)
    environment = {"PYTHONPATH": os.pathsep.join([str(site), os.environ.get("PYTHONPATH", "")])}
    task = make_task(tmp_path, str(tiny_base), **SHORT_RUN)
    if processes == 1:
        code, events, err = run_worker(task, **environment)
    else:
        environment |= {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port())}
        with (
            worker(task, **environment, RANK="0", LOCAL_RANK="0") as first,
            worker(task, **environment, RANK="1", LOCAL_RANK="1") as second,
        ):
            out, err = first.communicate(timeout=300)
            silent, _ = second.communicate(timeout=60)
        assert (second.returncode, silent) == (0, "")
        code, events = first.returncode, [EVENT.validate_json(line) for line in out.splitlines()]
    assert code == 0, err
    lowered = RateLowered(step=3, back_to_step=0, factor=0.25, reason="the loss is nan")
    assert [event for event in events if isinstance(event, RateLowered)] == [lowered]
    assert [event.step for event in events if isinstance(event, StepCompleted)] == [1, 2, 1, 2, 3, 4, 5, 6]
    manifest = read_manifest(task.job_dir / "adapter")
    assert manifest is not None
    assert manifest.run.rate_lowered == (lowered,)
    card = (task.job_dir / "adapter" / "README.md").read_text()
    assert "at step 3 the loss is nan: rolled back to step 0, and continued with 1/4 of the learning rate" in card


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def _wait_until(condition: Any, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "the condition was not met in time"
        time.sleep(0.1)


def _is_running(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except OSError:
        return False
    return state != "Z"  # an orphan may remain as a zombie until init reaps it
