"""The evaluation worker: compares an existing adapter with its base model on any data."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator

from peft_core.adapters.registry import Registry
from peft_core.base_models.resolve import resolve
from peft_core.base_models.tokenizer import load_tokenizer
from peft_core.config import Settings
from peft_core.data.leakage import FINGERPRINT_FILE_NAME, TrainingFingerprint
from peft_core.errors import AdapterInUse, DataError, InvalidArgument
from peft_core.evaluation.summary import mean_loss
from peft_core.evaluation.worker import evaluator
from peft_core.evaluation.worker.completions import complete
from peft_core.evaluation.worker.prompts import choose_prompts
from peft_core.evaluation.worker.run import run
from peft_core.evaluation.worker.scoring import held_out_loss, make_held_out_examples, score_examples
from peft_core.evaluation.worker.setup import require_adapter
from peft_core.modeling.objective import probe_fast_paths
from peft_core.paths import DataPaths
from peft_core.schemas.dataset import Example, Segment
from peft_core.schemas.evaluation import AdapterComparison, Keep, Verdict
from peft_core.schemas.events import EVENT, AdaptersCompared, DatasetPrepared, Evaluated, Event, JobFailed
from peft_core.schemas.task import TrainingTask
from peft_core.schemas.training import EvaluatedAdapter, TrainingConfig
from peft_core.system import in_use
from peft_core.system.cancellation import StopFlag
from tests.factories import make_request
from tests.tiny_models import tiny_model, write_tiny_adapter, write_tiny_base, write_trained_adapter


def code(number: int) -> str:
    return f"def add_{number}(a, b):\n    first = a + {number}\n    second = b * {number}\n    return first + second\n"


@pytest.fixture(scope="module")
def tiny_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_base(tmp_path_factory.mktemp("tiny-base"))


def make_task(
    directory: Path, base: Path, adapter: Path, examples: int = 12, *, compared_with: Path | None = None
) -> TrainingTask:
    records = directory / "records.jsonl"
    records.write_text("".join(json.dumps({"text": code(n), "path": f"m{n}.py"}) + "\n" for n in range(examples)))
    return TrainingTask(
        job_id="20260101-000000-abcdef",
        project_id="adds",
        request=make_request(
            source=records,
            source_kind="jsonl",
            config=TrainingConfig(device="cpu", max_length=256),
            base=resolve(str(base), Settings()),
            evaluated=EvaluatedAdapter(adapter_path=adapter, compared_with=compared_with),
        ),
        job_dir=directory / "job",
        base_models_dir=directory / "base_models",
    )


def run_worker(task: TrainingTask) -> tuple[int, list[Event], str]:
    done = subprocess.run(
        [sys.executable, "-m", "peft_core.worker"],
        input=task.model_dump_json(),
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    return done.returncode, [EVENT.validate_json(line) for line in done.stdout.splitlines()], done.stderr


@pytest.fixture
def run_here(monkeypatch: pytest.MonkeyPatch) -> Callable[[TrainingTask], list[Event]]:
    """Run a task in this process, which has imported torch already, with few completions."""
    monkeypatch.setattr(evaluator, "MAX_PROMPTS", 4)

    def run_task(task: TrainingTask) -> list[Event]:
        events: list[Event] = []
        run(task, events.append, StopFlag())
        return events

    return run_task


def test_an_adapter_that_was_published_here_is_held_while_it_is_evaluated(tmp_path: Path, tiny_base: Path) -> None:
    data_dir = tmp_path / "data"
    adapter = write_tiny_adapter(DataPaths(data_dir).adapter("web", "adapter-01"), tiny_base, seed=1)
    task = make_task(tmp_path, tiny_base, adapter).model_copy(update={"data_dir": data_dir})
    require_adapter(task, adapter)
    with pytest.raises(AdapterInUse, match="being exported or evaluated"):
        Registry(DataPaths(data_dir)).delete("web", "adapter-01")
    in_use.keep_only(())
    Registry(DataPaths(data_dir)).delete("web", "adapter-01")
    assert not adapter.exists()
    elsewhere = write_tiny_adapter(tmp_path / "elsewhere", tiny_base, seed=1)
    require_adapter(task, elsewhere)
    assert not list(tmp_path.glob(".*")), "nothing is written beside adapters from elsewhere"


def test_any_adapter_is_compared_with_its_base_model(tmp_path: Path, tiny_base: Path) -> None:
    adapter = write_tiny_adapter(tmp_path / "adapter", tiny_base, seed=1)
    code_, events, err = run_worker(make_task(tmp_path, tiny_base, adapter))
    assert code_ == 0, err
    last = events[-1]
    assert isinstance(last, Evaluated)
    evaluation = last.evaluation
    assert evaluation.loss.change != 0
    assert evaluation.verdict in set(Verdict)
    assert (evaluation.resampled, evaluation.files, evaluation.examples, evaluation.seen_in_training) == (
        "files",
        12,
        12,
        None,
    )
    assert evaluation.lines == 36  # all but the first of each file
    assert evaluation.general_tokens > 1000
    assert evaluation.prompts > 5


def test_exactly_the_examples_that_the_adapter_was_trained_on_are_excluded(
    tmp_path: Path, tiny_base: Path, run_here: Callable[[TrainingTask], list[Event]]
) -> None:
    adapter = write_tiny_adapter(tmp_path / "adapter", tiny_base, seed=1)
    (adapter / FINGERPRINT_FILE_NAME).write_bytes(TrainingFingerprint.of([code(n) for n in range(3)]).to_bytes())
    events = run_here(make_task(tmp_path, tiny_base, adapter))
    (prepared,) = [event for event in events if isinstance(event, DatasetPrepared)]
    assert prepared.dataset.left_out["trained_on"] == 3
    assert (prepared.dataset.train_examples, prepared.dataset.held_out_examples) == (0, 9)
    assert isinstance(events[-1], Evaluated)
    assert events[-1].evaluation.seen_in_training == 0


def test_data_that_the_adapter_was_trained_on_is_rejected_with_the_overlap(tmp_path: Path, tiny_base: Path) -> None:
    adapter = write_tiny_adapter(tmp_path / "adapter", tiny_base, seed=1)
    (adapter / FINGERPRINT_FILE_NAME).write_bytes(TrainingFingerprint.of([code(n) for n in range(12)]).to_bytes())
    exit_code, events, _ = run_worker(make_task(tmp_path, tiny_base, adapter))
    assert exit_code == 1
    failed = events[-1]
    assert isinstance(failed, JobFailed)
    assert failed.error.code == "evaluation_overlaps_training"
    assert "of 12 examples the adapter was trained on 12" in failed.error.message


def comparison_of(events: list[Event]) -> AdapterComparison:
    last = events[-1]
    assert isinstance(last, AdaptersCompared), last
    return last.comparison


def write_record(adapter: Path, numbers: Iterable[int]) -> None:
    (adapter / FINGERPRINT_FILE_NAME).write_bytes(TrainingFingerprint.of([code(n) for n in numbers]).to_bytes())


def test_two_adapters_are_compared_on_what_neither_was_trained_on(
    tmp_path: Path, tiny_base: Path, run_here: Callable[[TrainingTask], list[Event]]
) -> None:
    learned = [code(n) for n in range(10, 26)]
    a = write_trained_adapter(tmp_path / "a", tiny_base, learned, steps=5)
    b = write_trained_adapter(tmp_path / "b", tiny_base, learned, steps=40)
    write_record(a, range(4))
    write_record(b, [3, 4, 5])
    comparison = comparison_of(run_here(make_task(tmp_path, tiny_base, a, examples=14, compared_with=b)))
    assert (comparison.left_out.adapter_a, comparison.left_out.adapter_b, comparison.left_out.both) == (3, 2, 1)
    each = (comparison.adapter_a, comparison.adapter_b)
    assert [(adapter.name, adapter.adapter_path) for adapter in each] == [("a", str(a)), ("b", str(b))]
    assert [adapter.evaluation.examples for adapter in each] == [8, 8]
    assert comparison.adapter_a.evaluation.loss.base == comparison.adapter_b.evaluation.loss.base
    assert comparison.loss.adapter_a == comparison.adapter_a.evaluation.loss.adapter
    assert comparison.loss.adapter_b == comparison.adapter_b.evaluation.loss.adapter
    assert comparison.keep is Keep.ADAPTER_B, comparison.reason
    assert comparison.loss.high is not None
    assert comparison.loss.high < 0, "B was trained for longer"

    # One evaluation of B on the same text measures the same as the comparison.
    write_record(b, range(6))
    alone = run_here(make_task(tmp_path / "b", tiny_base, b, examples=14))[-1]
    assert isinstance(alone, Evaluated)
    assert alone.evaluation.loss == comparison.adapter_b.evaluation.loss
    assert alone.evaluation.edit_similarity == comparison.adapter_b.evaluation.edit_similarity


def test_a_comparison_without_enough_unseen_code_says_which_adapter_was_trained_on_it(
    tmp_path: Path, tiny_base: Path, run_here: Callable[[TrainingTask], list[Event]]
) -> None:
    a, b = (write_tiny_adapter(tmp_path / name, tiny_base, seed=1) for name in ("a", "b"))
    write_record(a, range(8))
    write_record(b, range(6, 11))
    with pytest.raises(DataError) as caught:
        run_here(make_task(tmp_path, tiny_base, a, compared_with=b))
    assert caught.value.code == "evaluation_overlaps_training"
    assert (
        "of 12 examples there are 6 that only adapter_a was trained on, 3 that only adapter_b was trained on, "
        "2 that both were trained on, which leaves 1; at least 5 are needed"
    ) in caught.value.message
    assert len(str(caught.value)) < 400


def test_identical_weights_give_no_difference(
    tmp_path: Path, tiny_base: Path, run_here: Callable[[TrainingTask], list[Event]]
) -> None:
    a, b = (write_tiny_adapter(tmp_path / name, tiny_base, seed=1) for name in ("a", "b"))
    comparison = comparison_of(run_here(make_task(tmp_path, tiny_base, a, compared_with=b)))
    assert (comparison.loss.change, comparison.loss.low, comparison.loss.high) == (0, 0, 0)
    assert comparison.keep in (Keep.EITHER, Keep.BASE_MODEL)
    assert comparison.completions == ()


@pytest.mark.parametrize(("moved", "field"), [("data", "evaluation_data"), ("adapter", "adapter_path")])
def test_paths_outside_the_allowed_roots_are_not_read_when_the_job_starts(
    tmp_path: Path, tiny_base: Path, run_here: Callable[[TrainingTask], list[Event]], moved: str, field: str
) -> None:
    adapter = write_tiny_adapter(tmp_path / "adapters" / "a", tiny_base, seed=1)
    (tmp_path / "code").mkdir()
    task = make_task(tmp_path / "code", tiny_base, adapter)
    left = tmp_path / ("adapters" if moved == "data" else "code")
    task = task.model_copy(update={"data_dir": tmp_path / "data", "allowed_roots": (left,)})
    with pytest.raises(InvalidArgument, match=f"^{field} ") as caught:
        run_here(task)
    assert caught.value.code == "outside_allowed_roots"


def test_example_scores_add_up_to_the_held_out_loss(tiny_base: Path) -> None:
    tokenizer = load_tokenizer(tiny_base)
    model = tiny_model()
    objective = probe_fast_paths(model, 256)
    examples = [
        Example(segments=(Segment(text=code(n)),), path=f"m{n}.py", language="python", kind="function")
        for n in range(5)
    ]
    held_out = make_held_out_examples(examples, tokenizer, 256)
    accelerator = Accelerator(cpu=True)
    scores = score_examples(objective, held_out, tokenizer, accelerator, StopFlag())
    loss = held_out_loss(objective, [each.document for each in held_out], accelerator, StopFlag())
    assert mean_loss(scores) == pytest.approx(loss, rel=1e-5)
    assert {len(each.lines) for each in held_out} == {3}
    assert [score.lines for score in scores] == [0] * 5  # an untrained model predicts none exactly


def test_completions_do_not_depend_on_the_batch_size(tiny_base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = load_tokenizer(tiny_base)
    model = tiny_model()
    examples = [
        Example(segments=(Segment(text=code(n) * (1 + n % 2)),), path=f"m{n}.py", language="python", kind="function")
        for n in range(6)
    ]
    prompts = choose_prompts(make_held_out_examples(examples, tokenizer, 256), 6, 10_000, 0, tokenizer)
    assert len(prompts) == 6
    batched = complete(model, prompts, tokenizer, StopFlag())
    with torch.no_grad():
        single = [complete(model, [prompt], tokenizer, StopFlag())[0] for prompt in prompts]
    assert batched == single

    generate = model.generate

    def generate_in_little_memory(input_ids: torch.Tensor, **others: Any) -> Any:
        if len(input_ids) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")
        return generate(input_ids=input_ids, **others)

    monkeypatch.setattr(model, "generate", generate_in_little_memory)
    assert complete(model, prompts, tokenizer, StopFlag()) == single
    monkeypatch.setattr(model, "generate", lambda **_: generate_in_little_memory(torch.zeros(3, 1)))
    with pytest.raises(torch.OutOfMemoryError):
        complete(model, prompts, tokenizer, StopFlag())
    assert choose_prompts(make_held_out_examples(examples, tokenizer, 256), 6, 100, 0, tokenizer) == []
