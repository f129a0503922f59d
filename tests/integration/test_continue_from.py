"""A training that continues from an adapter: planned, run by the worker's own code, and published, with a tiny base model."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from peft_core.adapters.manifest import Manifest, read_manifest
from peft_core.adapters.registry import Registry
from peft_core.config import Settings
from peft_core.data.catch_up import ParentData
from peft_core.data.dataset import read_examples
from peft_core.data.examples import learned_text
from peft_core.data.leakage import read_fingerprint
from peft_core.data.selection import Selection
from peft_core.data.snapshot import SNAPSHOT_FILE_NAME, read_snapshot, write_snapshot
from peft_core.errors import AdapterNotFound, DataError, InvalidArgument, PeftMcpError, TrainingError
from peft_core.evaluation.loss_curve import loss_curve
from peft_core.evaluation.report import write_training_report
from peft_core.evaluation.summary import Scores, mean_loss
from peft_core.evaluation.worker.evaluator import Evaluator
from peft_core.planning.continuation import Adapters, changes_in_sources
from peft_core.planning.inspection import inspect_training_data
from peft_core.planning.planner import plan
from peft_core.schemas.evaluation import Verdict
from peft_core.schemas.events import Evaluated, Event, PhaseStarted, RunPlanned, StepCompleted
from peft_core.schemas.results import Phase, TrainingDataReport
from peft_core.schemas.task import JobRequest, TrainingTask
from peft_core.schemas.training import TrainingConfig
from peft_core.system import in_use
from peft_core.system.cancellation import Cancelled, StopFlag
from peft_core.training import run as training_run
from tests.tiny_models import write_tiny_adapter, write_tiny_base
from tests.unit.projects.conftest import git

SETTINGS = {"rank": 4, "batch_size": 2, "max_length": 128, "allow_little_data": True, "learning_rate": 5e-3}
PROJECT = "web"


@dataclass
class Workplace:
    """A data directory, a base model and a code base."""

    root: Path
    base: Path
    code: Path
    jobs: int = 0
    events: list[Event] = field(default_factory=list)

    @property
    def settings(self) -> Settings:
        return Settings(data_dir=self.root)

    @property
    def registry(self) -> Registry:
        return Registry(self.settings.paths)

    def _config(self, config: dict[str, Any]) -> TrainingConfig:
        given = {"base_model": str(self.base), **{k: v for k, v in SETTINGS.items() if k != "rank"}, **config}
        return TrainingConfig(**given)

    def _adapters(self, project: str | None) -> Adapters:
        return Adapters(self.registry, project, lambda _adapter_id: str(self.base))

    def plan(self, project: str | None = PROJECT, **config: Any) -> JobRequest:
        return plan(str(self.code), self._config(config), self.settings, lambda *_: None, self._adapters(project))

    def inspect(self, **config: Any) -> TrainingDataReport:
        return inspect_training_data(
            str(self.code), self._config(config), self.settings, lambda *_: None, self._adapters(None)
        )

    def task(self, request: JobRequest) -> TrainingTask:
        self.jobs += 1
        job_id = f"20260101-00000{self.jobs}-abcdef"
        paths = self.settings.paths
        return TrainingTask(
            job_id=job_id,
            project_id=PROJECT,
            request=request,
            job_dir=paths.job(job_id).root,
            base_models_dir=paths.base_models,
            data_dir=self.root,
        )

    def run(
        self, task: TrainingTask, emit: Callable[[Event], None] | None = None, stop: StopFlag | None = None
    ) -> None:
        self.events = []
        training_run.run(task, emit or self.events.append, stop or StopFlag())

    def publish(self, task: TrainingTask) -> Path:
        return self.registry.publish(task.job_dir / "adapter", PROJECT, task.job_id)

    def train(self, **config: Any) -> Path:
        task = self.task(self.plan(**config))
        self.run(task)
        return self.publish(task)

    def write(self, file: int, version: int = 1, name: str = "") -> None:
        words = ["open", "close", "read", "write", "find", "sort", "join", "split"]
        functions = [
            f"def {words[n]}_{file}(item, count):\n    total = count * {file * 13 + n} + {version}\n"
            f"    for {words[n][0]}{n} in range(total):\n        item.{words[(n + file) % 8]}({words[n][0]}{n}, {version})\n"
            f"    return total - {n * version}\n"
            for n in range(6)
        ]
        (self.code / (name or f"m{file}.py")).write_text("\n\n".join(functions))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Workplace:
    """A workplace with a first adapter of the project."""
    root = tmp_path_factory.mktemp("continue")
    place = Workplace(root / "data", write_tiny_base(root / "base"), root / "code")
    place.code.mkdir()
    for file in range(24):
        place.write(file)
    place.train(rank=4, num_epochs=1)
    return place


@pytest.fixture
def place(trained: Workplace, tmp_path: Path) -> Workplace:
    """A copy of it, in which a file that was trained on has changed, and one that was held out."""
    shutil.copytree(trained.root, tmp_path / "data", symlinks=True)
    shutil.copytree(trained.code, tmp_path / "code")
    copy = Workplace(tmp_path / "data", trained.base, tmp_path / "code", trained.jobs)
    copy.write(file_of(copy, "train"), version=2)
    copy.write(file_of(copy, "held_out"), version=2)
    return copy


def current(place: Workplace) -> Path:
    path = place.registry.current_path(PROJECT)
    assert path is not None
    return path


def file_of(place: Workplace, part: str) -> int:
    snapshot = read_snapshot(current(place))
    assert snapshot is not None
    return int(next(file.path for file in snapshot.files if file.part == part)[1:-3])


def manifest_of(adapter: Path) -> Manifest:
    manifest = read_manifest(adapter)
    assert manifest is not None
    return manifest


def rewrite_manifest(adapter: Path, **changes: Any) -> None:
    path = adapter / "adapter_manifest.json"
    path.chmod(0o644)
    path.write_text(manifest_of(adapter).model_copy(update=changes).model_dump_json())


def test_a_project_with_an_adapter_continues_from_it_by_default_and_the_answer_says_so(place: Workplace) -> None:
    request = place.plan()
    parent = current(place)
    assert request.continued is not None
    assert request.continued.adapter_path == parent
    assert (request.config.rank, request.config.alpha) == (4, 8)
    assert f"Continues from adapter {parent.name}: 1 of " in request.estimate.chosen
    assert "To train from scratch, set config.continue_from = 'none'." in request.estimate.chosen
    scratch = place.plan(continue_from="none")
    assert (scratch.continued, scratch.catch_up, scratch.config.rank) == (None, None, 16)
    assert request.estimate.train_tokens < scratch.estimate.train_tokens / 3


def test_a_dry_run_of_an_update_counts_what_it_trains_on_and_is_measured_on(place: Workplace) -> None:
    parent = current(place)
    report, scratch = place.inspect(continue_from=PROJECT), place.inspect(continue_from="none")
    task = place.task(place.plan(continue_from=PROJECT))
    place.run(task)
    dataset = manifest_of(place.publish(task)).data.summary
    assert (report.train_examples, report.held_out_examples) == (dataset.train_examples, dataset.held_out_examples)
    assert report.left_out == dataset.left_out
    planned = [event.total_steps for event in place.events if isinstance(event, RunPlanned)]
    assert report.estimate.steps == planned[-1]
    assert report.estimate.train_tokens < scratch.estimate.train_tokens / 3
    changed = dataset.train_examples - dataset.replayed_examples
    assert f"continues from adapter {parent.name}: {changed} training examples that are new" in report.counted
    assert not scratch.counted


def test_an_update_says_that_a_split_by_time_does_not_apply_to_it(place: Workplace) -> None:
    git(place.code, "init", "-q")
    git(place.code, "add", ".")
    git(place.code, "commit", "-q", "-m", "Start")
    assert "whatever config.held_out_by says" in place.plan(held_out_by="time").estimate.chosen
    assert "held_out_by" not in place.plan().estimate.chosen


def test_an_update_starts_from_the_parents_weights_and_measures_both_kinds_of_held_out_code(place: Workplace) -> None:
    parent = current(place)
    held_out_before = {
        learned_text(each) for each in read_examples(place.root / "jobs" / parent.name / "dataset" / "held_out.jsonl")
    }
    start: dict[str, torch.Tensor] = {}
    task = place.task(place.plan())

    def watch(event: Event) -> None:
        place.events.append(event)
        if isinstance(event, StepCompleted) and event.step == 1:
            state = torch.load(task.job_dir / "checkpoint" / "good-0-0.pt", weights_only=True)
            start.update(state["adapter"])

    place.run(task, watch)
    saved = load_file(parent / "adapter_model.safetensors")
    assert {name.replace(".default", "") for name in start} == saved.keys()
    assert all(torch.equal(tensor, saved[name.replace(".default", "")]) for name, tensor in start.items())
    end = torch.load(task.job_dir / "checkpoint" / "state.pt", weights_only=True)
    written = load_file(task.job_dir / "adapter" / "adapter_model.safetensors")
    for name, tensor in end["adapter"].items():
        stem = name.replace(".default", "")
        assert torch.allclose(written[stem], (tensor + saved[stem]) / 2, atol=1e-7)
        assert not torch.equal(tensor, saved[stem])

    evaluation = next(event.evaluation for event in place.events if isinstance(event, Evaluated))
    assert evaluation.catch_up is not None
    assert evaluation.catch_up.parent == parent.name
    assert evaluation.catch_up.old is not None
    assert evaluation.catch_up.changed is not None
    examples = evaluation.catch_up.old.examples + evaluation.catch_up.changed.examples
    assert examples == evaluation.examples == len(read_examples(task.job_dir / "dataset" / "held_out.jsonl"))
    trained = {learned_text(each) for each in read_examples(task.job_dir / "dataset" / "train.jsonl")}
    assert not trained & held_out_before

    adapter = place.publish(task)
    manifest = manifest_of(adapter)
    assert manifest.run.continued_from == parent.name
    assert manifest.run.share_of_parent == 0.5
    assert manifest.run.scaled_by is None
    assert manifest.evaluation is not None
    assert manifest.evaluation.catch_up == evaluation.catch_up
    assert manifest.data.summary.replayed_examples > 0
    assert f"continued from {parent.name}" in (adapter / "README.md").read_text()
    report = write_training_report(task.job_dir, manifest, place.events)
    assert report is not None
    assert "old held-out code" in report.read_text()
    snapshot, fingerprint = read_snapshot(adapter), read_fingerprint(adapter)
    assert snapshot is not None
    assert fingerprint is not None
    first = read_snapshot(parent)
    assert first is not None
    assert set(first.held_out_ever) <= set(snapshot.held_out_ever)
    data = ParentData(snapshot, fingerprint)
    before = ParentData(first, fingerprint)
    assert (data.held_out_files, data.trained_files) == (before.held_out_files, before.trained_files)

    if manifest.becomes_current:
        with pytest.raises(
            DataError, match=rf"Nothing to catch up: .* since adapter {adapter.name} was trained on it"
        ) as caught:
            place.plan()
        suggestion = "To train again all the same, from scratch, set config.continue_from = 'none'"
        assert caught.value.suggestions == (suggestion,)


def test_the_curve_of_an_update_begins_at_its_parent_and_ends_at_the_step_of_its_weights(place: Workplace) -> None:
    # At so high a rate, the second step makes it worse.
    task = place.task(place.plan(max_steps=6, early_stopping_patience=1, eval_steps=1, learning_rate=0.1))
    place.run(task)
    parent = Scores.model_validate_json((task.job_dir / "parent_scores.json").read_bytes())
    curve = loss_curve(place.events)
    manifest = manifest_of(task.job_dir / "adapter")
    assert curve.held_out[0] == (0, pytest.approx(mean_loss(parent.held_out)))
    measured = dict(curve.held_out[1:])
    assert manifest.run.best_step == min(measured, key=measured.__getitem__) < manifest.run.steps
    assert curve.whole == (
        (0, manifest.metrics.base_loss),
        (manifest.run.best_step, manifest.metrics.adapter_loss),
    )
    card = (task.job_dir / "adapter" / "README.md").read_text()
    assert f"and 50 % those of step {manifest.run.best_step}, the best on a held-out sample" in card


def test_an_update_that_loses_on_the_old_held_out_code_does_not_become_current(place: Workplace) -> None:
    parent = current(place)
    adapter = place.train(learning_rate=0.1, lora_plus_ratio=64.0, max_steps=12, warmup_ratio=0.0)
    manifest = manifest_of(adapter)
    assert manifest.evaluation is not None
    assert manifest.evaluation.catch_up is not None
    old = manifest.evaluation.catch_up.old
    assert old is not None
    assert old.low is not None
    assert old.low > 0
    assert manifest.loses
    assert current(place) == parent
    rewrite_manifest(adapter, evaluation=manifest.evaluation.model_copy(update={"verdict": Verdict.HELPS}))
    in_use.keep_only(())
    place.registry.delete(PROJECT, parent.name)
    assert place.registry.current_path(PROJECT) is None  # nor does it later, when the current one is deleted


@pytest.mark.parametrize("is_same_device", [True, False])
def test_an_update_resumes_from_its_own_checkpoint(place: Workplace, is_same_device: bool) -> None:
    task = place.task(place.plan(max_steps=6))
    stop = StopFlag()

    def stop_at_three(event: Event) -> None:
        if isinstance(event, StepCompleted) and event.step == 3:
            stop.request()

    parent = current(place)
    with pytest.raises(Cancelled):
        place.run(task, stop_at_three, stop)
    assert current(place) == parent
    if not is_same_device:
        for file in ("base_scores.json", "parent_scores.json"):
            scores = json.loads((task.job_dir / file).read_text())
            scores["key"] = scores["key"].replace(" on cpu in ", " on cuda in ")
            (task.job_dir / file).write_text(json.dumps(scores))
    place.run(task)
    assert current(place) == parent  # until it is published
    assert next(event.start_step for event in place.events if isinstance(event, RunPlanned)) == 3
    scored = [
        event.detail
        for event in place.events
        if isinstance(event, PhaseStarted) and event.phase is Phase.EVALUATING_BASE
    ]
    # The scores of base and parent are on disk.
    assert scored == ([] if is_same_device else ["", "evaluating the adapter to continue from"])
    evaluation = next(event.evaluation for event in place.events if isinstance(event, Evaluated))
    assert evaluation.catch_up is not None


def test_an_update_compares_with_retrieval_from_its_parents_code_as_well(
    place: Workplace, monkeypatch: pytest.MonkeyPatch
) -> None:
    searched: list[Path] = []

    def stop(_evaluator: Evaluator, _objective: object, _tokens: int, training_code: Sequence[Path]) -> None:
        searched.extend(training_code)
        raise Cancelled

    monkeypatch.setattr(Evaluator, "choose_positions", stop)
    task = place.task(place.plan(max_steps=1))
    before = place.settings.paths.job(current(place).name).dataset / "train.jsonl"
    with pytest.raises(Cancelled):
        place.run(task.model_copy(update={"earlier_examples": (before,)}))
    assert searched == [task.job_dir / "dataset" / "train.jsonl", before]


def test_the_parent_is_kept_while_it_is_read_and_its_absence_is_one_clear_failure(place: Workplace) -> None:
    parent = current(place)
    task = place.task(place.plan(max_steps=1))

    def check_and_stop(_event: Event) -> None:
        assert in_use.is_in_use(parent)
        raise Cancelled

    with pytest.raises(Cancelled):
        place.run(task, check_and_stop)
    in_use.keep_only(())
    place.registry.delete(PROJECT, parent.name)
    with pytest.raises(
        TrainingError, match=rf"Adapter {parent.name}, .* was deleted after the job was queued"
    ) as caught:
        place.run(task)
    assert caught.value.code == "parent_unusable"


def test_a_parent_whose_weights_were_replaced_after_planning_is_refused(place: Workplace) -> None:
    parent = current(place)
    task = place.task(place.plan(max_steps=1))
    weights = parent / "adapter_model.safetensors"
    tensors = {name: tensor * 2 for name, tensor in load_file(weights).items()}
    weights.chmod(0o644)
    save_file(tensors, weights)
    with pytest.raises(TrainingError, match="was altered after training"):
        place.run(task)


def refusal(place: Workplace, **config: Any) -> PeftMcpError:
    with pytest.raises((InvalidArgument, AdapterNotFound)) as caught:
        place.plan(**config)
    assert len(caught.value.message) < 400
    return caught.value


def test_settings_that_the_parent_determines_are_refused_if_they_differ(place: Workplace) -> None:
    named = str(current(place))
    error = refusal(place, continue_from=named, rank=8)
    assert "config.rank = 8 cannot be used" in error.message
    assert "has rank = 4" in error.message
    assert "config.alpha = 1.0" in refusal(place, continue_from=named, alpha=1).message
    assert "config.use_rslora = True" in refusal(place, continue_from=named, use_rslora=True).message
    assert "config.target_modules" in refusal(place, continue_from=named, target_modules=["q_proj"]).message
    assert place.plan(continue_from=named, rank=4).config.rank == 4
    scratch = place.plan(rank=8)  # without a named parent, the setting decides
    assert scratch.continued is None
    assert "Starts from scratch: adapter" in scratch.estimate.chosen


def test_an_adapter_that_cannot_be_continued_is_refused_by_name_and_passed_over_by_default(
    place: Workplace, tmp_path: Path
) -> None:
    parent = current(place)
    other_base = write_tiny_base(tmp_path / "other", "qwen2")
    error = refusal(place, continue_from=str(parent), base_model=str(other_base))
    assert "it was trained on base, and this training is on other" in error.message
    assert place.plan(base_model=str(other_base)).continued is None

    harming = manifest_of(parent).evaluation
    assert harming is not None
    changes = {"evaluation": harming.model_copy(update={"verdict": Verdict.HARMS})}
    rewrite_manifest(parent, **changes)
    assert "its verdict is 'harms'" in refusal(place, continue_from=PROJECT).message
    rewrite_manifest(parent, evaluation=harming)

    (parent / "snapshot.json.gz").unlink()
    assert "no readable record of its training data" in refusal(place, continue_from=PROJECT).message
    scratch = place.plan()
    assert scratch.continued is None
    assert "as an adapter of an older version" in scratch.estimate.chosen


def test_broken_and_foreign_adapters_are_refused(place: Workplace, tmp_path: Path) -> None:
    parent = current(place)
    assert "No adapter at '/no/such/adapter'" in refusal(place, continue_from="/no/such/adapter").message
    assert "No adapter at 'unknown-project'" in refusal(place, continue_from="unknown-project").message
    (tmp_path / "empty").mkdir()
    assert "does not contain" in refusal(place, continue_from=str(tmp_path / "empty")).message

    foreign = write_tiny_adapter(tmp_path / "foreign", place.base, 0)
    (foreign / "adapter_manifest.json").unlink()
    assert "it has no manifest" in refusal(place, continue_from=str(foreign)).message

    large = write_tiny_adapter(tmp_path / "large", place.base, 0, lora_alpha=5000)
    assert (
        "its alpha is 5000, and that of a training is at most 4096" in refusal(place, continue_from=str(large)).message
    )

    mlx = tmp_path / "mlx"
    mlx.mkdir()
    save_file({"model.layers.0.self_attn.q_proj.lora_a": torch.ones(32, 4)}, mlx / "adapters.safetensors")
    (mlx / "adapter_config.json").write_text(json.dumps({"fine_tune_type": "lora"}))
    assert "the format of mlx-lm" in refusal(place, continue_from=str(mlx)).message

    weights = parent / "adapter_model.safetensors"
    tensors = load_file(weights)
    next(iter(tensors.values()))[0, 0] = float("nan")
    weights.chmod(0o644)
    save_file(tensors, weights)
    message = refusal(place, continue_from=PROJECT).message
    assert "altered" in message or "NaN" in message


def test_most_of_the_code_changed_is_a_reason_to_start_from_scratch(place: Workplace) -> None:
    for file in range(24):
        place.write(file, version=3)
    request = place.plan()
    assert request.continued is None
    assert "% of the units are new or have changed since" in request.estimate.chosen
    assert place.plan(continue_from=PROJECT).continued is not None


def test_files_that_a_short_training_did_not_cut_into_units_are_no_change(trained: Workplace, place: Workplace) -> None:
    snapshot = read_snapshot(current(trained))
    assert snapshot is not None
    uncut = snapshot.files[0].model_copy(update={"units": None})
    snapshot = snapshot.model_copy(update={"files": (uncut, *snapshot.files[1:])})
    found = trained.plan(continue_from="none").found
    assert changes_in_sources(snapshot, found, Selection()).is_nothing
    changed = place.plan(continue_from="none").found
    assert not changes_in_sources(snapshot, changed, Selection()).is_nothing


def test_a_change_that_must_not_be_trained_on_is_nothing_to_catch_up(place: Workplace) -> None:
    place.write(file_of(place, "train"))  # as it was
    with pytest.raises(DataError, match="Nothing to catch up"):
        place.plan()
    held_out = place.code / f"m{file_of(place, 'held_out')}.py"
    place.write(file_of(place, "held_out"))
    held_out.rename(place.code / "renamed.py")
    with pytest.raises(DataError, match="Nothing to catch up"):
        place.plan()


def test_the_base_of_the_named_adapter_is_used_if_none_is_given(place: Workplace) -> None:
    request = place.plan(base_model=None, continue_from=str(current(place)))
    assert request.base.path == place.base


def test_what_a_short_training_has_not_seen_is_named_in_both_answers(place: Workplace) -> None:
    adapter = current(place)
    manifest = manifest_of(adapter)
    prepared = manifest.data.summary.train_examples
    rewrite_manifest(adapter, run=manifest.run.model_copy(update={"examples_seen": 4}))
    expected = f"it has seen 4 of the {prepared} examples that were prepared"
    assert expected in place.plan().estimate.chosen
    place.write(file_of(place, "train"))  # as it was
    with pytest.raises(DataError, match=expected) as caught:
        place.plan()
    assert caught.value.code == "nothing_to_catch_up"
    assert "continue_from = 'none' and config.num_epochs = 1" in caught.value.message
    snapshot = read_snapshot(adapter)
    assert snapshot is not None
    unread = [file.model_copy(update={"part": "unused", "units": None}) for file in snapshot.files[:2]]
    write_snapshot(adapter / SNAPSHOT_FILE_NAME, snapshot.model_copy(update={"files": (*unread, *snapshot.files[2:])}))
    rewrite_manifest(adapter, run=manifest.run)
    with pytest.raises(DataError, match="of the files that were read, and 2 files were not"):
        place.plan()
