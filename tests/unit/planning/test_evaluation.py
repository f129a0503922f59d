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
from peft_core.schemas.base_model import Fingerprint
from peft_core.schemas.dataset import DatasetPurpose
from peft_core.schemas.events import AdaptersCompared, Evaluated
from peft_core.schemas.task import JobRequest
from peft_core.schemas.training import DataSelection, EvaluatedAdapter, TrainingConfig
from tests.factories import (
    make_base,
    make_comparison,
    make_dataset_spec,
    make_evaluation,
    make_job,
    make_manifest,
    record_base,
)
from tests.model_files import model_shapes, write_adapter, write_model
from tests.unit.retrieval.test_service import trained

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


def planned_comparison(
    tmp_path: Path, a: Path, b: Path, base: Path, *, accept: bool = False, data: Any = RECORDS
) -> JobRequest:
    settings = Settings(data_dir=tmp_path / "data")
    return plan_evaluation(
        EvaluatedAdapter(adapter_path=a, compared_with=b, accept_unproven_base=accept),
        data,
        resolve(str(base), settings),
        settings,
        lambda _base, _device: None,
        selection=DataSelection(),
    )


@pytest.fixture
def two(tmp_path: Path) -> tuple[Path, Path, Path]:
    """Two adapters that were trained on one base model, and the base model."""
    base = write_model(tmp_path / "base")
    a, b = (write_adapter(tmp_path / name) for name in ("a-01", "a-02"))
    for adapter, config in ((a, TrainingConfig(max_length=96, seed=7)), (b, TrainingConfig(max_length=64, seed=8))):
        manifest = make_manifest(adapter.name, base=resolve(str(base), Settings()), config=config)
        write_manifest(adapter, manifest)
    return a, b, base


def test_only_an_adapter_whose_training_code_is_kept_takes_time_for_retrieval(tmp_path: Path, repository: Path) -> None:
    settings = Settings(data_dir=tmp_path.resolve() / "data")
    base = resolve(str(write_model(tmp_path / "base")), settings)
    adapter, adapter_b = write_adapter(trained(settings.paths)), write_adapter(tmp_path / "b")

    def seconds(other: Path | None = None) -> float:
        request = plan_evaluation(
            EvaluatedAdapter(adapter_path=adapter, compared_with=other, accept_unproven_base=True),
            str(repository),
            base,
            settings,
            lambda _base, _device: 100.0,
            selection=DataSelection(),
        )
        assert request.estimate.seconds is not None
        return request.estimate.seconds - 20

    kept, compared = seconds(), seconds(adapter_b)
    (settings.paths.job(adapter.name).dataset / "train.jsonl").unlink()
    assert seconds() < kept / 2
    assert compared == seconds(adapter_b) == pytest.approx(1.5 * seconds(), rel=0.01)


def test_a_comparison_is_one_evaluation_of_three_models(tmp_path: Path, two: tuple[Path, Path, Path]) -> None:
    request = planned_comparison(tmp_path, *two)
    assert (request.config.max_length, request.config.seed, request.noun) == (64, 7, "comparison")
    alone = planned(tmp_path, RECORDS, base=two[2])
    assert request.estimate.seconds is not None
    assert alone.estimate.seconds is not None
    assert request.estimate.seconds - 20 == pytest.approx(1.5 * (alone.estimate.seconds - 20), rel=0.01)


def test_an_adapter_is_not_compared_with_itself(tmp_path: Path, two: tuple[Path, Path, Path]) -> None:
    a, _, base = two
    with pytest.raises(InvalidArgument, match="it is the same adapter as adapter_a"):
        planned_comparison(tmp_path, a, a, base)


def test_adapters_of_different_base_models_are_not_compared_and_both_are_named(
    tmp_path: Path, two: tuple[Path, Path, Path]
) -> None:
    a, b, base = two
    other = make_base(name="Other-1B", fingerprint=Fingerprint(architecture="0" * 64, sample="1" * 64))
    write_manifest(b, make_manifest("a-02", base=other))
    with pytest.raises(InvalidArgument) as caught:
        planned_comparison(tmp_path, a, b, base, accept=True)
    assert caught.value.code == "different_base_models"
    assert "adapter_b = 'a-02'" in caught.value.message
    assert "the same base model as a-01, but they were trained on base and Other-1B" in caught.value.message
    assert len(str(caught.value)) < 400


def test_the_adapter_that_does_not_fit_is_named_by_its_argument(tmp_path: Path, two: tuple[Path, Path, Path]) -> None:
    a, _, base = two
    foreign = write_adapter(tmp_path / "foreign")
    with pytest.raises(InvalidArgument, match="adapter_b fits it, but there is no evidence"):
        planned_comparison(tmp_path, a, foreign, base)
    assert planned_comparison(tmp_path, a, foreign, base, accept=True).evaluated is not None
    (foreign / "adapter_model.safetensors").unlink()
    with pytest.raises(InvalidArgument, match=r"^adapter_b = .* does not fit"):
        planned_comparison(tmp_path, a, foreign, base, accept=True)


def test_the_report_of_a_comparison_names_both_adapters_and_what_they_were_trained_on(
    tmp_path: Path, two: tuple[Path, Path, Path]
) -> None:
    request = planned_comparison(tmp_path, *two)
    write_evaluation_report(tmp_path, request, [AdaptersCompared(comparison=make_comparison())])
    page = (tmp_path / "report.html").read_text()
    for expected in ("a-01 and a-02 on base", "Keep adapter B", "adapter B was trained on", "base, project web"):
        assert expected in page


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
