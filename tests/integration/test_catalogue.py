"""Adapters and jobs as clients find them: listed resources, and ids that are completed while one types."""

from __future__ import annotations

import os
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from mcp.client import Client
from mcp.shared.exceptions import MCPError
from mcp.types import Completion, PromptReference, Resource, ResourceTemplateReference

from peft_core.adapters.manifest import write_manifest
from peft_core.config import Settings
from peft_core.jobs.store import Store
from peft_core.paths import DataPaths
from peft_core.schemas.evaluation import Verdict
from peft_core.schemas.results import Status
from peft_core.schemas.training import EvaluatedAdapter
from server.app import build_server
from server.catalogue import MAX_LISTED
from tests.factories import make_evaluation, make_job, make_manifest, make_request
from tests.model_files import write_adapter


def add_adapter(data_dir: Path, project_id: str, *, age_days: float = 0, verdict: Verdict | None = None) -> None:
    lora = data_dir / "projects" / project_id / "lora"
    created_at = (datetime.now(UTC) - timedelta(days=age_days)).isoformat(timespec="seconds")
    manifest = make_manifest("adapter-01", evaluation=make_evaluation(verdict) if verdict else None)
    write_manifest(write_adapter(lora / "adapter-01"), manifest.model_copy(update={"created_at": created_at}))
    current = lora / "current"
    current.symlink_to("adapter-01")
    seconds = time.time() - age_days * 86_400
    os.utime(current, (seconds, seconds), follow_symlinks=False)


def store(data_dir: Path) -> Store:
    store = Store(DataPaths(data_dir).database, time.time)
    store.create()
    return store


async def list_resources(data_dir: Path, era: str) -> dict[str, Resource]:
    async with Client(build_server(Settings(data_dir=data_dir)), mode=era) as client:
        return {resource.uri: resource for resource in (await client.list_resources()).resources}


async def complete(
    data_dir: Path, era: str, ref: PromptReference | ResourceTemplateReference, **typed: str
) -> Completion:
    ((name, value),) = typed.items()
    async with Client(build_server(Settings(data_dir=data_dir)), mode=era) as client:
        return (await client.complete(ref, {"name": name, "value": value})).completion


async def test_what_prevents_a_list_of_resources_reaches_the_client(data_dir: Path, era: str) -> None:
    store(data_dir)
    (data_dir / "peft.db").write_bytes(b"no database any more" * 100)
    template = ResourceTemplateReference(uri="training://{job_id}")
    async with Client(build_server(Settings(data_dir=data_dir)), mode=era) as client:
        for ask in (client.list_resources, lambda: client.complete(template, {"name": "job_id", "value": "2"})):
            with pytest.raises(MCPError, match=r"database of jobs .* is damaged: .* Move it away"):
                await ask()


async def test_adapters_are_listed_newest_first_with_verdict_and_age(data_dir: Path, era: str) -> None:
    add_adapter(data_dir, "web", age_days=2.5, verdict=Verdict.HELPS)
    add_adapter(data_dir, "api", age_days=0.25)
    listed = await list_resources(data_dir, era)
    assert [uri for uri in listed if uri.startswith("adapter://")] == ["adapter://api", "adapter://web"]
    assert listed["adapter://web"].title == "web: helps, 2 days old"
    assert listed["adapter://api"].title == "api: not evaluated, 6 hours old"
    assert listed["adapter://api"].annotations is not None


async def test_jobs_are_listed_with_project_and_state(data_dir: Path, era: str) -> None:
    jobs, now = store(data_dir), time.time()
    done = {"status": Status.COMPLETED, "evaluation": make_evaluation(Verdict.NO_DIFFERENCE)}
    evaluated = make_request(evaluated=EvaluatedAdapter(adapter_path=Path("/adapter"), accept_unproven_base=False))
    jobs.insert(make_job("20260101-000000-aaaaaa", "web", created_at=now - 3 * 3600, **done))
    jobs.insert(make_job("20260101-000001-bbbbbb", "api", status=Status.FAILED, created_at=now - 90, request=evaluated))
    listed = await list_resources(data_dir, era)
    assert [(uri, resource.title) for uri, resource in listed.items() if uri.startswith("training://")] == [
        ("training://20260101-000001-bbbbbb", "api: evaluation failed, 2 min old"),
        ("training://20260101-000000-aaaaaa", "web: training completed, no difference, 3 hours old"),
    ]


async def test_every_listed_resource_can_be_read(data_dir: Path, era: str) -> None:
    add_adapter(data_dir, "web")
    store(data_dir).insert(make_job("20260101-000000-aaaaaa", status=Status.CANCELLED))
    async with Client(build_server(Settings(data_dir=data_dir)), mode=era) as client:
        resources = (await client.list_resources()).resources
        assert {"adapter://web", "training://20260101-000000-aaaaaa"} <= {resource.uri for resource in resources}
        for resource in resources:
            (content,) = (await client.read_resource(resource.uri)).contents
            assert content.text  # type: ignore[union-attr]


async def test_only_the_newest_jobs_are_listed(data_dir: Path) -> None:
    jobs = store(data_dir)
    for number in range(MAX_LISTED + 5):
        jobs.insert(make_job(f"20260101-{number:06}-aaaaaa", status=Status.CANCELLED))
    listed = [uri for uri in await list_resources(data_dir, "legacy") if uri.startswith("training://")]
    assert len(listed) == MAX_LISTED
    assert listed[0] == f"training://20260101-{MAX_LISTED + 4:06}-aaaaaa"


async def test_a_forged_manifest_is_listed_without_control_characters_and_without_an_age(data_dir: Path) -> None:
    lora = data_dir / "projects" / "web" / "lora"
    manifest = make_manifest("adapter-01")
    base = manifest.base.model_copy(update={"name": "evil\n\x1b[2Jname"})
    forged = manifest.model_copy(update={"base": base, "created_at": "yesterday"})
    write_manifest(write_adapter(lora / "adapter-01"), forged)
    (lora / "current").symlink_to("adapter-01")
    resource = (await list_resources(data_dir, "legacy"))["adapter://web"]
    assert resource.title == "web: not evaluated"
    assert (resource.description or "").isprintable()


async def test_ids_are_completed_from_what_exists(data_dir: Path, era: str) -> None:
    add_adapter(data_dir, "web")
    add_adapter(data_dir, "worker")
    store(data_dir).insert(make_job("20260101-000000-aaaaaa", "Website", status=Status.FAILED))
    adapters = ResourceTemplateReference(type="ref/resource", uri="adapter://{project_id}")
    jobs = ResourceTemplateReference(type="ref/resource", uri="training://{job_id}")
    train = PromptReference(type="ref/prompt", name="train_and_evaluate")
    use = PromptReference(type="ref/prompt", name="complete_with_adapter")
    assert set((await complete(data_dir, era, adapters, project_id="w")).values) == {"web", "worker"}
    assert (await complete(data_dir, era, use, project_id="we")).values == ["web"]
    assert (await complete(data_dir, era, train, project_id="we")).values == ["Website", "web"]
    assert (await complete(data_dir, era, jobs, job_id="2026")).values == ["20260101-000000-aaaaaa"]
    assert (await complete(data_dir, era, jobs, job_id="1999")).values == []
    assert (await complete(data_dir, era, train, path="/")).values == []


async def test_at_most_a_hundred_completions_are_sent_and_the_others_are_counted(data_dir: Path) -> None:
    jobs = store(data_dir)
    for number in range(130):
        jobs.insert(make_job(f"20260101-{number:06}-aaaaaa", status=Status.CANCELLED))
    ref = ResourceTemplateReference(type="ref/resource", uri="training://{job_id}")
    completion = await complete(data_dir, "legacy", ref, job_id="")
    assert (len(completion.values), completion.total, completion.has_more) == (100, 130, True)
    assert completion.values[0] == "20260101-000129-aaaaaa"
