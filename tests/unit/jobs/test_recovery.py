from __future__ import annotations

from pathlib import Path

from peft_core.adapters.manifest import MANIFEST_NAME
from peft_core.adapters.registry import Registry
from peft_core.jobs.recovery import recover
from peft_core.jobs.store import Store
from peft_core.paths import DataPaths
from peft_core.schemas.events import HeldOutMeasured, JobStarted
from peft_core.schemas.results import Metrics, Status
from tests.factories import make_job
from tests.unit.adapters.test_registry import write_draft


def test_a_job_with_a_published_adapter_is_completed_even_if_its_manifest_is_unreadable(tmp_path: Path) -> None:
    paths = DataPaths(tmp_path)
    store, registry = Store(paths.database, lambda: 0.0), Registry(paths)
    store.create()
    store.insert(make_job("a-01"))
    store.append("a-01", JobStarted())
    store.append("a-01", HeldOutMeasured(step=0, loss=2.0, whole_set=True))
    published = registry.publish(write_draft(tmp_path / "draft", "a-01"), "web", "a-01")
    (published / MANIFEST_NAME).chmod(0o644)
    (published / MANIFEST_NAME).write_text('{"schema_version": 2}')
    recover(store, registry)
    job = store.get("a-01")
    assert (job.status, job.adapter_path) == (Status.COMPLETED, str(published))
    assert job.metrics == Metrics(base_loss=2.0)
