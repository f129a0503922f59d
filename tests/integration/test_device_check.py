"""The check of an accelerator on the one device that every machine has: bf16 products on the CPU against float32.

A device that computes something else is made by changing the results of its products, below everything that the product does.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from peft_core.base_models.resolve import resolve
from peft_core.config import Settings
from peft_core.devices import records
from peft_core.errors import TrainingError
from peft_core.evaluation.worker.setup import start_session
from peft_core.modeling import memory
from peft_core.modeling.quantised import Bf16Matrix
from peft_core.planning import device_check as effort_of
from peft_core.schemas.device_check import DeviceCheck, Outcome
from peft_core.schemas.events import DeviceChecked, Event, HeldOutMeasured, RunPlanned, StepCompleted
from peft_core.schemas.task import ComputePlan, TrainingTask
from peft_core.schemas.training import TrainingConfig
from peft_core.system.cancellation import StopFlag
from peft_core.training import base as training_base
from peft_core.training import device_check, lora
from peft_core.training import run as training_run
from peft_core.training.base import BaseModel, load_base_model
from peft_core.training.device_check import Subject, check
from tests.factories import change_request, make_cluster_plan, make_request
from tests.tiny_models import tiny_documents, write_tiny_base

BF16 = ComputePlan(weights="bfloat16")
PRODUCTS = {torch.ops.aten.mm.default, torch.ops.aten.addmm.default, torch.ops.aten.mm.out}
Fault = Callable[[torch.Tensor], None]


class WrongProducts(TorchDispatchMode):
    """A device whose matrix products in bf16 are changed in place by `fault`, from the call of this number on."""

    def __init__(self, fault: Fault, every: int = 1) -> None:
        super().__init__()
        self.fault, self.every, self.calls = fault, every, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func in PRODUCTS and out.dtype == torch.bfloat16:
            self.calls += 1
            if self.calls % self.every == 0:
                self.fault(out)
        return out


def scale(out: torch.Tensor) -> None:
    out.mul_(1.1)


def lose_a_column(out: torch.Tensor) -> None:
    out[:, 0] = 0


def write_nan(out: torch.Tensor) -> None:
    out[0, 0] = float("nan")


def flip_an_exponent_bit(out: torch.Tensor) -> None:
    bits = out.view(torch.int16)
    bits[0, 0] ^= 1 << 13


def mix_rows(out: torch.Tensor) -> None:
    out.copy_(out.roll(1, 0))


def make_task(directory: Path, base: Path, **config: Any) -> TrainingTask:
    directory.mkdir(exist_ok=True)
    lines = [{"text": f"def add_{n}(a, b):\n    return a + {n} * b\n", "path": f"m{n}.py"} for n in range(40)]
    source = directory / "records.jsonl"
    source.write_text("".join(json.dumps(line) + "\n" for line in lines))
    settings = {"rank": 4, "batch_size": 2, "max_steps": 2, "max_length": 256, "learning_rate": 1e-3, **config}
    request = make_request(
        source=source,
        source_kind="jsonl",
        config=TrainingConfig(device="cpu", **settings),
        base=resolve(str(base), Settings()),
        execution=BF16,
    )
    return TrainingTask(
        job_id="20260101-000000-abcdef",
        project_id="adds",
        request=request,
        job_dir=directory / "job",
        base_models_dir=directory / "base_models",
        data_dir=directory / "data",
    )


@pytest.fixture(scope="module")
def tiny_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_base(tmp_path_factory.mktemp("base"), dtype=torch.bfloat16)


@pytest.fixture(autouse=True)
def usual_heap() -> Iterator[None]:
    yield
    memory.set_malloc_keep()


def subject_of(task: TrainingTask) -> tuple[Subject, BaseModel]:
    session = start_session(task, lambda _: None, StopFlag())
    base = load_base_model(session, _Data(task.request.base.path))  # type: ignore[arg-type] -- it reads one field
    subject = Subject(session, task.request.base.path, base.model, base.objective, False, tiny_documents((40, 30, 20)))
    return subject, base


class _Data:
    def __init__(self, base_directory: Path) -> None:
        self.base_directory = base_directory


@pytest.fixture(scope="module")
def shared_subject(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path) -> Subject:
    """One for several checks, because each leaves it as it was."""
    return subject_of(make_task(tmp_path_factory.mktemp("shared"), tiny_base))[0]


def checked(task: TrainingTask, fault: Fault | None = None, every: int = 1) -> DeviceCheck:
    subject, _ = subject_of(task)
    with WrongProducts(fault, every) if fault else nullcontext():
        return check(subject)


@pytest.mark.parametrize(("weights", "recompute"), [("bfloat16", False), ("bfloat16", True), ("float32", False)])
def test_a_device_that_only_rounds_agrees(tmp_path: Path, tiny_base: Path, weights: Any, recompute: bool) -> None:
    task = make_task(tmp_path, tiny_base)
    plan = ComputePlan(weights=weights, recompute_layers=recompute)
    found = checked(change_request(task, execution=plan))
    assert (found.outcome, found.reason) == (Outcome.AGREES, "")
    assert found.key.number_format == ("bfloat16" if weights == "bfloat16" else "float32")
    assert (found.layers, found.total_layers) == (2, 2)
    assert found.tokens == 70
    assert found.difference is not None
    assert (found.difference.gradient > 1e-4) == (weights == "bfloat16")


@pytest.mark.parametrize("fault", [scale, lose_a_column, write_nan, flip_an_exponent_bit, mix_rows])
def test_a_device_whose_products_are_wrong_is_found(shared_subject: Subject, fault: Fault) -> None:
    with WrongProducts(fault):
        found = check(shared_subject)
    assert found.outcome is Outcome.DIFFERS
    assert "tolerance" in found.reason


def test_a_weight_that_arrived_with_a_flipped_bit_is_found(tmp_path: Path, tiny_base: Path) -> None:
    subject, base = subject_of(make_task(tmp_path, tiny_base))
    layer = base.model.get_submodule("model.layers.1.mlp.up_proj")
    stored = layer.stored.storage.clone()  # its own is mapped from the file
    stored.view(torch.int16)[3, 5] ^= 1  # the last bit of a mantissa: no tolerance of a gradient finds it
    layer.stored = Bf16Matrix(stored)
    found = check(subject)
    assert found.outcome is Outcome.DIFFERS
    assert found.reason == "1 weights on it are not those of the file, such as model.layers.1.mlp.up_proj"


@pytest.mark.parametrize(
    ("error", "outcome", "words"),
    [
        (
            RuntimeError("MPS backend out of memory (16 GB) in /Users/me/x.py"),
            Outcome.OUT_OF_MEMORY,
            "ran out of memory",
        ),
        (NotImplementedError("'aten::new' is not implemented for 'MPS'"), Outcome.FAILED, "failed when it was checked"),
    ],
)
def test_an_error_of_the_device_is_one_finding_without_paths(
    shared_subject: Subject, error: Exception, outcome: Outcome, words: str
) -> None:
    def refuse(_: torch.Tensor) -> None:
        raise error

    with WrongProducts(refuse):
        found = check(shared_subject)
    assert found.outcome is outcome
    assert words in found.in_words
    assert "/Users" not in found.model_dump_json()


def test_memory_that_runs_out_with_the_largest_micro_batch_only_is_noted(
    shared_subject: Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    heaviest, batches = device_check.heaviest, []

    def with_failure(*arguments: Any) -> Any:
        batches.append(arguments)
        return heaviest(*arguments)

    def refuse(_: torch.Tensor) -> None:
        if batches:
            raise RuntimeError("CUDA out of memory")

    monkeypatch.setattr(device_check, "heaviest", with_failure)
    with WrongProducts(refuse):
        found = check(shared_subject)
    assert found.outcome is Outcome.AGREES
    assert (
        found.memory_note == "its memory is too small for 70 tokens, so that the training will compute fewer together"
    )


def test_more_memory_than_estimated_is_noted(shared_subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = effort_of.expected_device_bytes(shared_subject.session.task.request)
    monkeypatch.setattr(device_check, "device_memory_bytes", lambda _: 2 * expected)
    found = check(shared_subject)
    assert (found.outcome, found.measured_bytes, found.expected_bytes) == (Outcome.AGREES, 2 * expected, expected)
    assert "were estimated" in found.memory_note


@pytest.mark.usefixtures("_one_thread")
def test_a_run_whose_memory_is_above_the_estimate_and_the_limit_continues_on_the_cpu(
    tmp_path: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = make_task(tmp_path, tiny_base)
    expected = effort_of.expected_device_bytes(task.request)
    monkeypatch.setattr(device_check, "device_memory_bytes", lambda _: 2 * expected)
    monkeypatch.setenv("CODEBASE_GARDENER_MAX_MEMORY_MB", str(3 * expected // 2_000_000))
    events = train(task)
    (event,) = (event for event in events if isinstance(event, DeviceChecked))
    assert event.check.outcome is Outcome.TOO_LARGE
    assert "the limit max_memory_mb is" in event.note
    assert "were estimated; continued on the CPU" in event.note
    assert [event.device for event in events if isinstance(event, RunPlanned)] == ["cpu"]
    assert not records.is_known(tmp_path / "data", event.check.key)  # with less text, or another limit, it may train


def test_the_first_layers_of_a_large_model_are_compared_alone(
    shared_subject: Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(device_check, "plan_effort", lambda *_, **__: effort_of.Effort(16, 1))
    steps: list[device_check.Step] = []
    compare = device_check.difference_of
    monkeypatch.setattr(device_check, "difference_of", lambda a, b: steps.extend((a, b)) or compare(a, b))
    found = check(shared_subject)
    assert (found.outcome, found.layers, found.total_layers, found.tokens) == (Outcome.AGREES, 1, 2, 32)
    assert shared_subject.model.config.num_hidden_layers == 2
    assert {name.split(".layers.")[1][0] for step in steps for name in step.gradients} == {"0"}


def test_a_check_leaves_the_model_and_the_random_numbers_as_they_were(tmp_path: Path, tiny_base: Path) -> None:
    subject, base = subject_of(change_request(make_task(tmp_path, tiny_base), execution=ComputePlan(weights="file")))
    ids = torch.arange(3, 40)[None]
    before, modules = base.model(input_ids=ids).logits, [name for name, _ in base.model.named_modules()]
    torch.manual_seed(5)
    state = torch.get_rng_state()
    assert check(subject).may_train
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(base.model(input_ids=ids).logits, before)
    assert [name for name, _ in base.model.named_modules()] == modules
    assert not any(parameter.requires_grad for parameter in base.model.parameters())
    assert lora.attach(base.model, subject.session.task.request.config, "again") is not None


# --- A whole training ------------------------------------------------------------------------------------------------------


def train(task: TrainingTask, fault: Fault | None = None, *, checks: bool = True) -> list[Event]:
    events: list[Event] = []
    with WrongProducts(fault) if fault else nullcontext():
        training_run.run(task, events.append, StopFlag(), needs_check=lambda _: checks)
    return events


def losses(events: list[Event]) -> list[float]:
    return [event.loss for event in events if isinstance(event, StepCompleted | HeldOutMeasured)]


def checks_in(events: list[Event]) -> list[DeviceCheck]:
    return [event.check for event in events if isinstance(event, DeviceChecked)]


@pytest.fixture
def _one_thread(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Keep the number of threads, on which the last bits of a loss depend."""
    before = torch.get_num_threads()
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("_one_thread")
def test_a_device_that_agrees_trains_as_without_a_check_and_is_checked_once(tmp_path: Path, tiny_base: Path) -> None:
    first = train(make_task(tmp_path / "a", tiny_base))
    assert [found.outcome for found in checks_in(first)] == [Outcome.AGREES]
    assert records.load(tmp_path / "a" / "data") == checks_in(first)
    session = start_session(make_task(tmp_path / "a", tiny_base), first.append, StopFlag())
    documents = tiny_documents((9, 9))
    same, _ = training_base.load_on_checked_device(session, _Data(tiny_base), documents, lambda _: True)  # type: ignore[arg-type] -- it reads one field
    assert same is session
    assert len(checks_in(first)) == 1
    plain = train(make_task(tmp_path / "b", tiny_base), checks=False)
    assert losses(first) == pytest.approx(losses(plain), abs=2e-3)


def test_a_node_of_a_cluster_keeps_its_own_checks(
    tmp_path: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CODEBASE_GARDENER_DATA_DIR", str(tmp_path / "node"))
    task = change_request(make_task(tmp_path / "a", tiny_base, max_steps=1), cluster=make_cluster_plan())
    first = train(task.model_copy(update={"data_dir": None}))
    assert records.load(tmp_path / "node") == checks_in(first)


@pytest.mark.usefixtures("_one_thread")
def test_a_training_continues_on_the_cpu_as_if_it_had_begun_there(
    tmp_path: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training_base, "cpu_multiplies_bfloat16", lambda: False)
    events = train(make_task(tmp_path / "a", tiny_base), mix_rows)
    (event,) = (event for event in events if isinstance(event, DeviceChecked))
    assert event.check.outcome is Outcome.DIFFERS
    assert event.note.endswith("; continued on the CPU")
    assert [event.device for event in events if isinstance(event, RunPlanned)] == ["cpu"]
    card = (tmp_path / "a" / "job" / "adapter" / "README.md").read_text()
    assert "computes something else than the CPU" in card
    on_cpu = change_request(make_task(tmp_path / "b", tiny_base), execution=ComputePlan())
    assert losses(events) == losses(train(on_cpu, checks=False))
    assert not records.is_known(tmp_path / "a" / "data", event.check.key)  # the next training checks again


def test_a_training_that_the_cpu_cannot_take_over_ends_with_one_error(
    tmp_path: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training_base, "available_memory_bytes", lambda: 0)
    monkeypatch.setattr(training_base, "memory_bytes", lambda: 1_000_000)
    with pytest.raises(TrainingError, match="cannot continue on the CPU either") as caught:
        train(make_task(tmp_path, tiny_base), mix_rows)
    assert caught.value.code == "device_check_failed"
    assert len(caught.value.message) < 400
