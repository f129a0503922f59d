"""The MCP App: one page that shows a job while it runs and its result afterwards, for clients that render `ui://` resources.

`page.html` is all of it: it loads nothing, and reaches the server only through its host. It follows the job with
`get_training_status` and reads what no model needs from the resource below. The tools answer every other client in text.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mcp.server.apps import APP_MIME_TYPE, Apps
from mcp.server.mcpserver import Context, MCPServer
from mcp.server.mcpserver.resources import FileResource

from peft_core.manager import PEFTManager
from server.resources import resource_errors

PAGE_URI = "ui://peft-mcp/training.html"
SHOWN_ON_PAGE = {"ui": {"resourceUri": PAGE_URI}}  # `_meta` of the tools whose results the page shows


def training_app() -> Apps:
    """Return the extension that declares the page. The file is read when a client asks for it."""
    app = Apps()
    app.add_resource(
        FileResource(
            uri=PAGE_URI,
            name="training_page",
            title="Training page",
            description="Shows a job and its result in clients that support MCP Apps.",
            mime_type=APP_MIME_TYPE,
            meta={"ui": {"prefersBorder": True}},
            path=Path(__file__).with_name("page.html"),
            encoding="utf-8",
        )
    )
    return app


def add_report_resource(mcp: MCPServer[PEFTManager]) -> None:
    @mcp.resource(
        "training://{job_id}/report",
        title="Training report",
        description="A job's status, loss curve and quoted completions, for the training page.",
        mime_type="application/json",
    )
    async def report(job_id: str, ctx: Context[PEFTManager, Any]) -> str:
        with resource_errors():
            read = await ctx.request_context.lifespan_context.read_report(job_id)
        return read.model_dump_json(exclude_none=True)
