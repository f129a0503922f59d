"""What is refused before there is a job that evaluates."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from peft_core.adapters.manifest import write_manifest
from peft_core.base_models.resolve import resolve
from peft_core.config import Settings
from peft_core.data.prepare import prepare
from peft_core.data.token_counter import EstimatedTokenCounter
from peft_core.errors import DataError, InvalidArgument
from peft_core.evaluation.report import write_evaluation_report
from peft_core.jobs.recovery import completed_evaluation
from peft_core.planning.evaluation import plan_evaluation
from peft_core.schemas.dataset import DatasetPurpose
from peft_core.schemas.events import Evaluated
from peft_core.schemas.task import JobRequest
from peft_core.schemas.training import DataSelection, EvaluatedAdapter, TrainingConfig
from tests.factories import make_dataset_spec, make_evaluation, make_job, make_manifest, record_base
from tests.model_files import model_shapes, write_adapter, write_model

RECORDS = [
    {"text": f"def add_{n}(a, b):\n    total = a + b * {n}\n    return total\n", "path": f"m{n}.py"} for n in range(12)
]


def planned(
    tmp_path: Path,
    data: Any,
    *,
    base: Path | None = None,
    accept: bool = True,
    limit: int | None = None,
    selection: DataSelection | None = None,
) -> JobRequest:
    base = base or write_model(tmp_path / "base")
    adapter = tmp_path / "adapter"
    if not adapter.exists():
        write_adapter(adapter)
    settings = Settings(data_dir=tmp_path / "data", max_memory_mb=limit)
    evaluated = EvaluatedAdapter(adapter_path=adapter, accept_unproven_base=accept)
    return plan_evaluation(
        evaluated,
        data,
        resolve(str(base), settings),
        settings,
        lambda _base, _device: None,
        selection=selection or DataSelection(),
    )


def test_evaluating_a_foreign_adapter_is_planned_with_an_estimate(tmp_path: Path) -> None:
    request = planned(tmp_path, RECORDS)
    assert request.evaluated is not None
    assert request.config.max_length == min(512, request.base.shape.context_length)
    assert request.estimate.steps == 0
    assert request.estimate.seconds is not None
    assert request.found.examples == 12


def test_the_settings_of_the_training_are_used_for_the_evaluation(tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "adapter")
    write_manifest(adapter, make_manifest("a-01", config=TrainingConfig(max_length=64, seed=7)))
    config = planned(tmp_path, RECORDS).config
    assert (config.max_length, config.seed) == (64, 7)


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """Two directories of code."""
    for name in ("ours", "theirs"):
        (tmp_path / "code" / name).mkdir(parents=True)
        for number in range(8):
            text = f"def {name}_{number}(a, b):\n    total = a + b * {number}\n    return total - {number * 7}\n"
            (tmp_path / "code" / name / f"m{number}.py").write_text(text)
    return tmp_path / "code"


def test_the_code_to_evaluate_on_is_selected_as_for_a_training(tmp_path: Path, repository: Path) -> None:
    request = planned(tmp_path, str(repository), selection=TrainingConfig(exclude=["theirs/"], rank=4))
    assert request.found.files == 8
    assert request.dataset.exclude == ("theirs/",)
    assert planned(tmp_path, str(repository)).found.files == 16


def test_several_sources_are_evaluated_together(tmp_path: Path, repository: Path) -> None:
    selection = DataSelection(more_sources=[str(repository / "theirs")])
    request = planned(tmp_path, str(repository / "ours"), selection=selection)
    assert request.found.files == 16
    assert [source.path for source in request.dataset.sources] == [repository / "ours", repository / "theirs"]


def test_unusable_records_are_skipped_where_the_evaluation_allows_it(tmp_path: Path) -> None:
    records = [*RECORDS, {"text": "x", "mood": "kind"}]
    request = planned(tmp_path, records, selection=DataSelection(skip_unusable_records=True))
    assert (request.found.examples, request.dataset.skip_unusable_records) == (12, True)
    with pytest.raises(DataError, match="the key 'mood' is not used"):
        planned(tmp_path, records)


def test_the_selection_of_the_training_is_named_if_the_evaluation_has_another(tmp_path: Path, repository: Path) -> None:
    adapter = write_adapter(tmp_path / "adapter")
    write_manifest(adapter, make_manifest("a-01", config=TrainingConfig(include=["ours/"])))
    assert planned(tmp_path, str(repository)).found.advice == (
        "All code is evaluated, although the adapter was trained with include = ['ours/']",
    )
    assert planned(tmp_path, str(repository), selection=DataSelection(include=["ours/"])).found.advice == ()


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ([], "evaluation_data is an empty list"),
        (RECORDS[:3], "evaluation_data gives 3 .* at least 5 examples are needed to evaluate on"),
        ("/no/such/place", "evaluation_data = '/no/such/place' cannot be used"),
    ],
)
def test_unusable_evaluation_data_is_rejected(tmp_path: Path, data: Any, said: str) -> None:
    with pytest.raises((DataError, InvalidArgument), match=said):
        planned(tmp_path, data)


def test_errors_name_the_path_of_the_request(tmp_path: Path) -> None:
    place = tmp_path / "training_data_old"
    place.mkdir()
    with pytest.raises(DataError) as caught:
        planned(tmp_path, str(place))
    assert str(place) in caught.value.message
    with pytest.raises(InvalidArgument) as refused:
        planned(tmp_path, str(place / "training_data"))
    assert refused.value.message.startswith(f"evaluation_data = '{place / 'training_data'}' ")


def test_missing_evaluation_data_is_reported_with_the_tool_that_takes_it(tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        prepare(
            make_dataset_spec(tmp_path / "gone", held_out_fraction=1, purpose=DatasetPurpose.EVALUATION),
            directory=tmp_path / "out",
            token_counter=EstimatedTokenCounter(),
            report=lambda _: None,
        )
    assert "evaluate_adapter" in caught.value.suggestions[0]


def test_an_adapter_that_does_not_fit_is_rejected_with_the_reason(tmp_path: Path) -> None:
    other = write_model(tmp_path / "other", shapes=model_shapes(layers=4), num_hidden_layers=4)
    with pytest.raises(InvalidArgument, match="does not fit other"):
        planned(tmp_path, RECORDS, base=other)


def test_an_unproven_base_model_must_be_accepted_explicitly(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument, match="accept_unproven_base=true"):
        planned(tmp_path, RECORDS, accept=False)
    base = tmp_path / "base"
    record_base(tmp_path / "adapter", resolve(str(base), Settings()))
    assert planned(tmp_path, RECORDS, base=base, accept=False).evaluated is not None


def test_an_evaluation_above_the_memory_limit_is_rejected(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument, match="CODEBASE_GARDENER_MAX_MEMORY_MB = 256"):
        planned(tmp_path, RECORDS, limit=256)


def test_a_finished_evaluation_completes_the_job_and_writes_a_report(tmp_path: Path) -> None:
    request = planned(tmp_path, RECORDS)
    job = make_job(request=request)
    assert completed_evaluation(job) is None
    completed = completed_evaluation(job.model_copy(update={"evaluation": make_evaluation()}))
    assert completed is not None
    assert completed.adapter_path == str(tmp_path / "adapter")
    assert completed.metrics.adapter_perplexity == 6.0
    assert completed_evaluation(make_job(evaluation=make_evaluation())) is None
    write_evaluation_report(tmp_path, request, [Evaluated(evaluation=make_evaluation())])
    assert "Evaluated on records" in (tmp_path / "report.html").read_text()
