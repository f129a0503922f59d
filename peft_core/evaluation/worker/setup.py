"""The steps that every run begins with, whether it trains or evaluates: process, device, and held-out data."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import structlog
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState

from peft_core.base_models.tokenizer import BaseTokenizer, load_tokenizer, require_rows
from peft_core.data.catch_up import ParentData
from peft_core.data.dataset import PreparedDataset, read_examples
from peft_core.data.held_out_files import read_code_names, read_held_out_files
from peft_core.data.leakage import TrainingFingerprint
from peft_core.data.prepare import prepare
from peft_core.data.split import STUDY_PREFIX
from peft_core.evaluation.worker.scoring import HeldOutExample, make_held_out_examples
from peft_core.modeling.convert import ensure_hf_directory
from peft_core.modeling.device import DevicePlan, Machine, choose, describe, timed, use_cores, without
from peft_core.modeling.memory import set_malloc_keep, set_malloc_trim
from peft_core.paths import DataPaths, JobPaths
from peft_core.schemas.dataset import CodeNames, HeldOutFile
from peft_core.schemas.events import Emit, PhaseStarted
from peft_core.schemas.results import Phase
from peft_core.schemas.task import TrainingTask
from peft_core.system import in_use
from peft_core.system.allowed_paths import require_allowed, require_data_path
from peft_core.system.cancellation import StopFlag

_log = structlog.get_logger(__name__)


@dataclass(frozen=True)
class Session:
    """One task, and what it computes on."""

    task: TrainingTask
    emit: Emit
    stop: StopFlag
    device: DevicePlan
    accelerator: Accelerator
    device_note: str = ""  # what people are to know of the check of the device

    @property
    def paths(self) -> JobPaths:
        return JobPaths(self.task.job_dir)

    def start_phase(self, phase: Phase, detail: str = "", *, done: float = 0.0) -> None:
        """Report a phase, or how far it has come. `done`: its share, where it is known."""
        self.emit(PhaseStarted(phase=phase, detail=detail, done=done))


@dataclass(frozen=True)
class RunData:
    """The dataset of a run, and the base model's files that it was tokenised with."""

    base_directory: Path  # in Hugging Face format
    tokenizer: BaseTokenizer
    dataset: PreparedDataset
    held_out: list[HeldOutExample]
    held_out_items: list[HeldOutExample]  # study items: they say nothing about code, so they are measured on their own
    held_out_files: list[HeldOutFile]  # none if it was trained on records
    names: CodeNames


def start_session(task: TrainingTask, emit: Emit, stop: StopFlag, *, distrusted: Collection[str] = ()) -> Session:
    """Set up memory, threads and random generators of this process, and choose the device.

    `distrusted`: devices that 'auto' does not take. A training gives none, because it checks its device itself.
    """
    config = task.request.config
    if task.request.execution.recompute_layers:
        set_malloc_trim()
    else:
        set_malloc_keep()
    use_cores()
    # LoRA A and dropout are drawn from torch's global generators. Everything else has a generator of its own.
    torch.manual_seed(config.seed)
    machine = without(describe(), config.device, distrusted)
    device = choose(config.device, timed(config.device, machine, config.precision), config.precision)
    _log.info("device_chosen", device=device.device, formats=device.note)
    return Session(task, emit, stop, device, _accelerator(device))


def start_on_cpu(session: Session) -> Session:
    """Return a session on the CPU that takes the place of one on an accelerator, whose task was planned again for the CPU.

    The random generator is that of a new session, so that the run equals one that was asked to train on the CPU.
    """
    config = session.task.request.config
    AcceleratorState._reset_state(reset_partial_state=True)  # noqa: SLF001 -- accelerate's own tests use it; nothing else
    # not torch.manual_seed: it would call a device that may have failed
    torch.default_generator.manual_seed(config.seed)
    plan = choose("cpu", Machine(), config.precision)
    return replace(session, device=plan, accelerator=_accelerator(plan))


def _accelerator(device: DevicePlan) -> Accelerator:
    return Accelerator(
        cpu=device.device == "cpu",
        mixed_precision=device.autocast,
        step_scheduler_with_optimizer=False,  # one scheduler step per optimiser step for any number of processes
    )


def prepare_data(
    session: Session, known: Sequence[TrainingFingerprint | None] = (), *, parent: ParentData | None = None
) -> RunData:
    """Convert the base model if necessary, write the dataset, and read its held-out examples.

    Examples in `known`, the texts that the evaluated adapters were trained on, are excluded. `parent`: what the adapter that
    the training continues from was trained on.

    Raises:
        Cancelled: on request.
    """
    task, paths, config = session.task, session.paths, session.task.request.config

    def report(detail: str) -> None:
        session.stop.check()
        session.start_phase(Phase.PREPARING_DATA, detail)

    with session.accelerator.main_process_first():  # the other processes then find everything done
        directory = ensure_hf_directory(task.request.base, task.base_models_dir, report)
        tokenizer = load_tokenizer(directory)
        require_rows(tokenizer, task.request.base)
        dataset = prepare(
            task.request.dataset,
            directory=paths.dataset,
            token_counter=tokenizer,
            report=report,
            known=known,
            parent=parent,
            may_read=partial(require_source, task),
        )
    examples = read_examples(paths.dataset / "held_out.jsonl")
    items = [example for example in examples if example.path.startswith(STUDY_PREFIX)]
    others = [example for example in examples if not example.path.startswith(STUDY_PREFIX)]
    return RunData(
        base_directory=directory,
        tokenizer=tokenizer,
        dataset=dataset,
        held_out=make_held_out_examples(others, tokenizer, config.max_length),
        held_out_items=make_held_out_examples(items, tokenizer, config.max_length),
        held_out_files=read_held_out_files(paths.dataset),
        names=read_code_names(paths.dataset),
    )


def require_source(task: TrainingTask, source: Path) -> None:
    """Check once more, when the job runs, that its data may be read: a symbolic link may lead elsewhere by now.

    Raises:
        InvalidArgument: `sensitive_place`, `outside_allowed_roots`.
    """
    field = task.request.purpose.field
    require_data_path(source, data_dir=task.data_dir or task.job_dir, allowed_roots=task.allowed_roots, field=field)


def require_adapter(task: TrainingTask, adapter: Path, field: str = "adapter_path") -> None:
    """Check when the job runs that an adapter to evaluate may be read. Adapters published here always may, and are held.

    Raises:
        InvalidArgument: `outside_allowed_roots`.
    """
    published = () if task.data_dir is None else (DataPaths(task.data_dir).projects,)
    require_allowed(field, adapter, task.allowed_roots, also=published)
    if any(adapter.is_relative_to(projects) for projects in published):
        in_use.hold(adapter)
