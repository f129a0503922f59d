"""Links to the report and the adapter, after the texts of a result."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from mcp.server.mcpserver import Context
from mcp.types import CallToolResult, ResourceLink, TextContent

from peft_core.jobs.status import status_of
from peft_core.schemas.export import ExportedFile, ExportReport, Verification
from peft_core.schemas.results import Status, TrainingStatus
from server.app import PEFTServer
from server.format_results import format_export, format_status
from server.tools import make_tool
from tests.factories import make_evaluation, make_job

NOW = datetime(2026, 1, 1, tzinfo=UTC).timestamp()


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    """An adapter with a report, not its project's current one."""
    directory = tmp_path / "my data" / "web" / "lora" / "adapter-01"
    directory.mkdir(parents=True)
    (directory / "report.html").write_text("<!doctype html>")
    return directory


def status_with(adapter: Path, status: Status = Status.COMPLETED) -> TrainingStatus:
    job = make_job(status=status, evaluation=make_evaluation(), adapter_path=str(adapter))
    return status_of(job, None, adapter / "train.log", now=NOW)


def links_of(result: CallToolResult) -> dict[str, str]:
    return {part.name: part.uri for part in result.content if isinstance(part, ResourceLink)}


def test_a_completed_training_links_to_its_report_and_to_the_resource_of_the_current_adapter(adapter: Path) -> None:
    (adapter.parent / "current").symlink_to("adapter-01")
    result = format_status(status_with(adapter))
    assert links_of(result) == {
        "report.html": f"file://{adapter}/report.html".replace(" ", "%20"),
        "adapter-01": "adapter://web",
    }
    assert isinstance(result.content[0], TextContent)


def test_an_adapter_that_is_not_current_is_linked_by_its_directory(adapter: Path) -> None:
    (adapter.parent / "current").symlink_to("adapter-00")
    assert links_of(format_status(status_with(adapter)))["adapter-01"] == adapter.as_uri()


@pytest.mark.parametrize("status", [Status.IN_PROGRESS, Status.FAILED, Status.CANCELLED])
def test_a_job_that_has_not_completed_links_to_nothing(adapter: Path, status: Status) -> None:
    assert links_of(format_status(status_with(adapter, status))) == {}


def test_an_export_links_to_its_directory(tmp_path: Path) -> None:
    report = ExportReport(
        summary="Exported.",
        to="gguf-lora",
        format="f32",
        directory=str(tmp_path / "gguf-lora-f32"),
        files=[ExportedFile(path="a.gguf", bytes=70, sha256=""), ExportedFile(path="export.json", bytes=7, sha256="")],
        adapter_path="/adapters/a",
        adapter_id="a",
        base_model="base",
        base_fingerprint={},
        verification=Verification(status="verified"),
        usage=[],
        created_at="2026-01-01T00:00:00+00:00",
        elapsed_s=1.0,
    )
    (link,) = (part for part in format_export(report).content if isinstance(part, ResourceLink))
    assert (link.uri, link.name, link.size) == ((tmp_path / "gguf-lora-f32").as_uri(), "gguf-lora-f32", 77)


async def linked(ctx: Context[Any, Any]) -> CallToolResult:
    """Return a link."""
    link = ResourceLink(uri="file:///report.html", name="report.html")
    return CallToolResult(content=[TextContent(type="text", text="done"), link])


@pytest.mark.parametrize(
    ("version", "links"), [("2024-11-05", 0), ("2025-03-26", 0), ("2025-06-18", 1), ("2026-07-28", 1)]
)
async def test_clients_of_versions_without_links_do_not_get_any(
    version: str, links: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Context, "protocol_version", version)
    result = await PEFTServer([make_tool(linked, "Linked")]).call_tool("linked", {}, Context())
    assert isinstance(result, CallToolResult)
    assert len(links_of(result)) == links
    assert isinstance(result.content[0], TextContent)
