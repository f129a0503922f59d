"""The person's consent before a deletion and before a long training, from a real client in both protocol eras."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import anyio
import pytest
from huggingface_hub import constants
from mcp.client import Client
from mcp.client.extension import advertise
from mcp.client.session import ClientRequestContext
from mcp.types import (
    CallToolResult,
    ElicitRequestFormParams,
    ElicitRequestParams,
    ElicitResult,
    InputRequiredResult,
    ListRootsResult,
    Root,
)
from pydantic import FileUrl

from peft_core.adapters.manifest import write_manifest
from peft_core.base_models import resolve
from peft_core.config import Settings
from peft_core.planning import target
from peft_core.schemas.cluster import ClusterAnswer, ClusterNode
from peft_core.system.lock import FileLock
from server.app import build_server
from server.tasks import EXTENSION_ID
from server.tools import training
from tests.clients import text_of
from tests.factories import make_manifest
from tests.model_files import write_adapter

Action = Literal["accept", "decline", "cancel"]
ADAPTER = {"project_id": "web", "adapter_id": "adapter-01"}


class Person:
    """Who answers a client's forms: with an action, or not at all."""

    def __init__(self, action: Action | None) -> None:
        self.action = action
        self.asked: list[str] = []

    async def __call__(self, _: ClientRequestContext, params: ElicitRequestParams) -> ElicitResult:
        assert isinstance(params, ElicitRequestFormParams)
        assert params.requested_schema == {"type": "object", "properties": {}}
        self.asked.append(params.message)
        if self.action is None:
            await anyio.sleep_forever()
        return ElicitResult(action=self.action or "cancel", content={} if self.action == "accept" else None)


@pytest.fixture
def adapter(data_dir: Path) -> Path:
    """The only adapter of the project web, which is its current one."""
    directory = write_adapter(data_dir / "projects" / "web" / "lora" / "adapter-01")
    write_manifest(directory, make_manifest("adapter-01"))
    (directory.parent / "current").symlink_to("adapter-01")
    return directory


@pytest.fixture
def busy_runner(data_dir: Path) -> Iterator[None]:
    """Jobs stay in the queue, because this process holds the lock of the runner."""
    data_dir.mkdir()
    with FileLock(data_dir / "runner.lock") as lock:
        assert lock.acquire()
        yield


@pytest.fixture
def long_training() -> dict[str, Any]:
    """The arguments of a training that takes hours."""
    records = [{"text": f"def function_{n}(value):\n    return value * {n} + {n * n}\n"} for n in range(80)]
    return {"project_id": "web", "records": records, "config": {"max_steps": 1_000_000, "max_length": 128}}


async def call(data_dir: Path, era: str, person: Person | None, tool: str, arguments: dict[str, Any]) -> CallToolResult:
    async with Client(build_server(Settings(data_dir=data_dir)), mode=era, elicitation_callback=person) as client:
        return await client.call_tool(tool, arguments)


async def test_an_adapter_is_deleted_after_the_person_has_agreed(data_dir: Path, era: str, adapter: Path) -> None:
    person = Person("accept")
    result = await call(data_dir, era, person, "delete_adapter", ADAPTER)
    assert not result.is_error, text_of(result)
    assert not adapter.exists()
    (question,) = person.asked
    assert question.startswith("Delete adapter adapter-01 of project web (its current adapter, not evaluated, ")
    assert question.endswith("MB)? This cannot be undone.")


@pytest.mark.parametrize(("action", "words"), [("decline", "declined"), ("cancel", "closed the question")])
async def test_nothing_is_deleted_if_the_person_does_not_agree(
    data_dir: Path, era: str, adapter: Path, action: Action, words: str
) -> None:
    result = await call(data_dir, era, Person(action), "delete_adapter", ADAPTER)
    assert result.is_error
    assert text_of(result).startswith("Nothing was deleted: the person was asked to confirm, and ")
    assert words in text_of(result)
    assert adapter.is_dir()


async def test_a_client_without_forms_deletes_without_a_question(data_dir: Path, era: str, adapter: Path) -> None:
    result = await call(data_dir, era, None, "delete_adapter", ADAPTER)
    assert not result.is_error, text_of(result)
    assert not adapter.exists()


async def test_the_person_is_not_asked_about_an_adapter_that_does_not_exist(
    data_dir: Path, era: str, adapter: Path
) -> None:
    person = Person("accept")
    result = await call(data_dir, era, person, "delete_adapter", {"project_id": "web", "adapter_id": "adapter-02"})
    assert result.is_error
    assert "no adapter 'adapter-02'" in text_of(result)
    assert person.asked == []


@pytest.mark.parametrize(("action", "is_kept"), [("accept", False), ("decline", True)])
async def test_an_adapter_is_freed_from_disk_only_if_the_person_agrees(
    data_dir: Path, era: str, adapter: Path, action: Action, is_kept: bool
) -> None:
    person = Person(action)
    result = await call(data_dir, era, person, "disk_usage", {"free": ["'adapters/web/adapter-01'"]})
    assert result.is_error is is_kept, text_of(result)
    assert adapter.exists() is is_kept
    (question,) = person.asked
    assert question.startswith("Delete adapters/web/adapter-01 (")


async def test_what_is_made_again_when_it_is_needed_is_freed_without_a_question(data_dir: Path, adapter: Path) -> None:
    converted = data_dir / "base_models" / "0123456789abcdef" / "model.safetensors"
    converted.parent.mkdir(parents=True)
    converted.write_bytes(bytes(5000))
    async with Client(build_server(Settings(data_dir=data_dir)), mode="legacy") as client:
        listed = (await client.call_tool("disk_usage", {})).structured_content or {}
    (name,) = (item["name"] for item in listed["items"] if item["kind"] == "converted_base")
    person = Person("decline")
    result = await call(data_dir, "legacy", person, "disk_usage", {"free": [name]})
    assert not result.is_error, text_of(result)
    assert person.asked == []
    assert not converted.exists()


async def test_a_question_without_an_answer_does_not_block_the_call(
    data_dir: Path, adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("server.confirm.ANSWER_WITHIN_S", 0.2)
    person = Person(None)
    with anyio.fail_after(60):
        result = await call(data_dir, "legacy", person, "delete_adapter", ADAPTER)
    assert len(person.asked) == 1
    assert not result.is_error, text_of(result)
    assert not adapter.exists()


async def test_a_call_that_is_made_again_without_an_answer_is_not_asked_again(data_dir: Path, adapter: Path) -> None:
    async with Client(
        build_server(Settings(data_dir=data_dir)), mode="2026-07-28", elicitation_callback=Person("decline")
    ) as client:
        asked = await client.session.call_tool("delete_adapter", ADAPTER, allow_input_required=True)
        assert isinstance(asked, InputRequiredResult)
        assert adapter.is_dir()
        again = await client.session.call_tool(
            "delete_adapter", ADAPTER, request_state=asked.request_state, allow_input_required=True
        )
    assert isinstance(again, CallToolResult)
    assert not again.is_error
    assert not adapter.exists()


async def test_an_answer_to_a_question_that_was_not_asked_counts_for_nothing(data_dir: Path, adapter: Path) -> None:
    async with Client(
        build_server(Settings(data_dir=data_dir)), mode="2026-07-28", elicitation_callback=Person("decline")
    ) as client:
        asked = await client.session.call_tool(
            "delete_adapter",
            ADAPTER,
            input_responses={"consent": ElicitResult(action="accept", content={})},
            allow_input_required=True,
        )
    assert isinstance(asked, InputRequiredResult)
    assert adapter.is_dir()


@pytest.mark.usefixtures("busy_runner")
async def test_a_long_training_is_queued_after_the_person_has_agreed(
    data_dir: Path, era: str, long_training: dict[str, Any]
) -> None:
    person = Person("accept")
    result = await call(data_dir, era, person, "train_adapter", long_training)
    assert result.structured_content is not None, text_of(result)
    assert result.structured_content["status"] == "queued"
    (question,) = person.asked
    assert question.startswith("Start a training for project web that takes about ")
    assert " h and " in question


@pytest.mark.usefixtures("busy_runner")
async def test_no_training_is_started_if_the_person_declines(
    data_dir: Path, era: str, long_training: dict[str, Any]
) -> None:
    result = await call(data_dir, era, Person("decline"), "train_adapter", long_training)
    assert result.is_error
    assert text_of(result).startswith("No training was started: the person was asked to confirm, and declined.")
    assert not (data_dir / "peft.db").exists()


@pytest.mark.usefixtures("busy_runner")
async def test_without_forms_a_long_training_is_queued_and_the_answer_says_how_to_stop_it(
    data_dir: Path, era: str, long_training: dict[str, Any]
) -> None:
    result = await call(data_dir, era, None, "train_adapter", long_training)
    assert result.structured_content is not None, text_of(result)
    assert result.structured_content["status"] == "queued"
    assert "cancel_training stops it" in text_of(result)


@pytest.mark.usefixtures("busy_runner")
@pytest.mark.parametrize(("has_base", "asked"), [(False, 1), (True, 0)])
async def test_the_person_is_asked_before_a_large_base_model_is_sent_to_the_cluster(
    data_dir: Path,
    era: str,
    long_training: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    has_base: bool,
    asked: int,
) -> None:
    node = {"node_id": "1", "name": "gpu-1", "cpus": 8, "gpus": 1, "memory_bytes": 64_000_000_000, "device": "cuda"}
    described = ClusterNode.model_validate({**node, "device_memory_bytes": 40_000_000_000, "has_base": has_base})
    answer = ClusterAnswer(address="ray://head:10001", nodes=(described,))
    monkeypatch.setattr(target, "_ask", lambda *_: answer)
    monkeypatch.setattr(training, "ASK_ABOVE_BYTES", 10_000_000)  # less than the bundled base has
    monkeypatch.setenv("CODEBASE_GARDENER_CLUSTER", "ray://head:10001")
    person = Person("accept")
    config = {**long_training["config"], "max_steps": 2, "run_on": "cluster"}
    result = await call(data_dir, era, person, "train_adapter", {**long_training, "config": config})
    assert result.structured_content is not None, text_of(result)
    assert result.structured_content["status"] == "queued"
    assert "It trains on the node gpu-1 of the cluster at ray://head:10001 and reserves 1 GPU" in text_of(result)
    assert len(person.asked) == asked
    for question in person.asked:
        assert "MB), which not all nodes have" in question


@pytest.mark.usefixtures("busy_runner")
async def test_a_short_training_is_queued_without_a_question(
    data_dir: Path, era: str, long_training: dict[str, Any]
) -> None:
    person = Person("decline")
    short = {**long_training, "config": {**long_training["config"], "max_steps": 2}}
    result = await call(data_dir, era, person, "train_adapter", short)
    assert not result.is_error, text_of(result)
    assert person.asked == []


@pytest.mark.usefixtures("busy_runner")
async def test_the_roots_and_the_consent_are_asked_for_in_one_call(
    data_dir: Path, era: str, tmp_path: Path, long_training: dict[str, Any]
) -> None:
    root = tmp_path / "root"
    root.mkdir()
    records = "".join(json.dumps(record) + "\n" for record in long_training["records"])
    (root / "records.jsonl").write_text(records)

    async def list_roots(_: ClientRequestContext) -> ListRootsResult:
        return ListRootsResult(roots=[Root(uri=FileUrl(root.as_uri()))])

    person = Person("accept")
    arguments = {**long_training, "records": None, "training_data": "records.jsonl"}
    async with Client(
        build_server(Settings(data_dir=data_dir)),
        mode=era,
        elicitation_callback=person,
        list_roots_callback=list_roots,
    ) as client:
        result = await client.call_tool("train_adapter", arguments)
    assert not result.is_error, text_of(result)
    assert len(person.asked) == 1


async def test_a_client_that_follows_tasks_is_asked_for_its_roots_before_a_task_is_created(
    data_dir: Path, tmp_path: Path
) -> None:
    asked = []

    async def list_roots(_: ClientRequestContext) -> ListRootsResult:
        asked.append("roots")
        return ListRootsResult(roots=[Root(uri=FileUrl(tmp_path.as_uri()))])

    (tmp_path / "taken").write_text("in the way")
    async with Client(
        build_server(Settings(data_dir=data_dir)),
        mode="2026-07-28",
        list_roots_callback=list_roots,
        extensions=[advertise(EXTENSION_ID)],
    ) as client:
        result = await client.call_tool("load_adapter", {"adapter_path": "./taken"})
    assert asked == ["roots"]
    assert result.is_error
    assert f"{tmp_path / 'taken'} is a file" in text_of(result)


@pytest.mark.parametrize(
    ("tool", "arguments"),
    [
        ("train_adapter", {"project_id": "web", "records": [{"text": "x"}], "config": {"base_model": "org/new"}}),
        ("load_adapter", {"adapter_path": "web", "base_model": "org/new"}),
        ("generate", {"prompt": "def ", "use_base": True}),  # the default base
    ],
)
async def test_no_base_model_is_downloaded_if_the_person_does_not_agree(
    data_dir: Path, era: str, adapter: Path, monkeypatch: pytest.MonkeyPatch, tool: str, arguments: dict[str, Any]
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(resolve, "download", lambda ref: pytest.fail(f"{ref} was downloaded"))
    settings = Settings(data_dir=data_dir, allow_downloads=True, default_base_model="org/new")
    person = Person("decline")
    async with Client(build_server(settings), mode=era, elicitation_callback=person) as client:
        result = await client.call_tool(tool, arguments)
    assert person.asked == ["Download the model org/new from the Hugging Face Hub? It may take gigabytes."]
    assert text_of(result).startswith("Nothing was downloaded: the person was asked to confirm, and declined.")
