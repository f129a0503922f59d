"""What a bridge passes on of a run on the cluster, and what it deletes of an earlier one."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

from pydantic import BaseModel

from peft_core.cluster.attachment import _FROM_A_RUN, Record, run
from peft_core.paths import JobPaths
from peft_core.schemas.events import AdaptersCompared, AdapterWritten, Event, JobFailed
from peft_core.schemas.results import Metrics
from peft_core.schemas.task import TrainingTask
from peft_core.system.cancellation import StopFlag
from tests.factories import make_cluster_plan, make_request


def test_every_event_of_a_training_may_come_from_the_cluster_and_none_that_the_runner_writes() -> None:
    union, _ = get_args(Event)
    of_the_runner = {kind for kind in get_args(union) if kind.__name__.startswith("Job")} - {JobFailed}
    assert set(_FROM_A_RUN) == set(get_args(union)) - of_the_runner - {AdaptersCompared}


def test_what_an_earlier_bridge_was_transferring_is_deleted(tmp_path: Path) -> None:
    written = AdapterWritten(metrics=Metrics())
    paths = JobPaths(tmp_path)
    paths.adapter.mkdir()
    paths.cluster.write_text(Record(name="peft-mcp-x", written=written.model_dump_json()).model_dump_json())
    for name in (".receiving-abc", ".sending-abc", ".tokenizer-abc"):
        (tmp_path / name / "checkpoint").mkdir(parents=True)
    request = make_request(cluster=make_cluster_plan())
    task = TrainingTask(job_id="j", project_id="web", request=request, job_dir=tmp_path, base_models_dir=tmp_path)
    emitted: list[BaseModel] = []
    assert run(task, emitted.append, StopFlag(), patience_s=0.0) == 0
    assert emitted == [written]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "cluster.json"]
