"""Links in results (`resource_link`) to what a person may open: the report, the adapter, an exported directory."""

from __future__ import annotations

from pathlib import Path

from mcp.types import Annotations, CallToolResult, ResourceLink
from mcp_types.version import is_version_at_least

from peft_core.schemas.export import ExportReport
from peft_core.schemas.results import Status, TrainingStatus
from server.resources import ADAPTER_URI

FIRST_VERSION = "2025-06-18"  # of the protocol; older clients refuse a result with content that they do not know
DIRECTORY = "inode/directory"
FOR_PEOPLE = Annotations(audience=["user"])


def links_of_status(status: TrainingStatus) -> list[ResourceLink]:
    """Return links to the report and the adapter of a job that has completed; no links for other jobs."""
    if status.status is not Status.COMPLETED:
        return []
    links = []
    if status.report_path:
        links.append(
            ResourceLink(
                uri=Path(status.report_path).as_uri(),
                name=Path(status.report_path).name,
                title=f"Report of {status.project_id}",
                description="Loss curves, confidence intervals and examples, to open in a browser.",
                mime_type="text/html",
                annotations=FOR_PEOPLE,
            )
        )
    if status.adapter_path:
        links.append(_adapter_link(status.project_id, Path(status.adapter_path)))
    return links


def link_to_export(report: ExportReport) -> ResourceLink:
    """Return a link to the directory of an export."""
    directory = Path(report.directory)
    return ResourceLink(
        uri=directory.as_uri(),
        name=directory.name,
        title=f"Export of {report.adapter_id}: {report.format}",
        mime_type=DIRECTORY,
        size=sum(file.bytes for file in report.files),
        annotations=FOR_PEOPLE,
    )


def without_unknown_content(result: CallToolResult, protocol_version: str | None) -> CallToolResult:
    """Return a result without links for a client of a protocol version that has none."""
    if protocol_version is None or is_version_at_least(protocol_version, FIRST_VERSION):
        return result
    return result.model_copy(
        update={"content": [part for part in result.content if not isinstance(part, ResourceLink)]}
    )


def _adapter_link(project_id: str, adapter: Path) -> ResourceLink:
    """Link to the adapter's resource, if that is this adapter: it always means the project's current one."""
    is_current = adapter.parent.parent.name == project_id and _target(adapter.parent / "current") == adapter.name
    return ResourceLink(
        uri=ADAPTER_URI.format(project_id=project_id) if is_current else adapter.as_uri(),
        name=adapter.name,
        title=f"Adapter of {project_id}",
        mime_type="application/json" if is_current else DIRECTORY,
    )


def _target(link: Path) -> str | None:
    try:
        return link.readlink().name
    except OSError:
        return None
