"""The MCP server: its tools, how errors reach the client, and how the process ends."""

from __future__ import annotations

import os
import select
import signal
import threading
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from importlib.metadata import version
from typing import Any

import anyio
from mcp.server.mcpserver import Context, MCPServer
from mcp.server.mcpserver.exceptions import ToolError, UnexpectedToolError
from mcp.server.mcpserver.tools import Tool
from mcp.types import CallToolResult, InputRequiredResult
from pydantic import ValidationError

from peft_core.config import Settings
from peft_core.errors import PeftMcpError
from peft_core.manager import PROJECT_ID, PEFTManager
from peft_core.schemas.validation import invalid_argument, refuse_unknown
from server.ask_client import InputNeeded
from server.catalogue import add_catalogue
from server.identity import DESCRIPTION, ICONS, WEBSITE
from server.links import without_unknown_content
from server.prompts import PROMPTS
from server.resources import TrainingUpdates, add_adapter_resource, add_settings_resource, add_training_resource
from server.tasks import Tasks
from server.tools import adapters, base_models, export, inference, serving, storage, training
from server.training_page import add_report_resource, training_app

INSTRUCTIONS = (
    "peft-mcp trains a LoRA adapter on one code base, locally and in the background: call train_adapter with a project id "
    "and the repository's path, then get_training_status until the job has ended. "
    "The result says whether the adapter helps, measured on files it was not trained on; if it does, call load_adapter with "
    "the project id, then generate (compare_with_base=true shows the difference), and unload_adapter to free the memory. "
    "refresh_project brings an adapter up to date with code that has changed. "
    "export_adapter takes an adapter to other runtimes, serve_adapter to editors. "
    "Jobs keep running after you disconnect and are found again by project id; list_adapters shows all adapters and which "
    "are loaded."
)
TOOLS = [
    *base_models.TOOLS,
    *training.TOOLS,
    *adapters.TOOLS,
    *inference.TOOLS,
    *export.TOOLS,
    *serving.TOOLS,
    *storage.TOOLS,
]
CHANGE_PROJECTS = frozenset(
    {"train_adapter", "refresh_project", "cancel_training", "delete_adapter"}
)  # no check after these
EXIT_GRACE_S = 1.0  # after the client closed stdin; clients wait two seconds before they send signals


class PEFTServer(MCPServer[PEFTManager]):
    """`MCPServer` that rejects unknown arguments, and whose errors say what is allowed and what to do next."""

    def __init__(self, tools: list[Tool], **options: Any) -> None:
        self._tools = {tool.name: tool for tool in tools}
        super().__init__("peft-mcp", tools=tools, **options)

    async def call_tool(
        self, name: str, arguments: dict[str, Any], context: Context[PEFTManager, Any] | None = None
    ) -> CallToolResult | InputRequiredResult:
        if name not in self._tools:
            raise ToolError(f"There is no tool {name!r}. Tools: {', '.join(self._tools)}.")
        tool = self._tools[name]
        try:
            # The SDK drops unknown arguments silently: a misspelt one would have no effect.
            refuse_unknown(arguments, tool.parameters)
            result = await super().call_tool(name, arguments, context)
        except (ToolError, PeftMcpError) as error:
            if isinstance(error.__cause__, InputNeeded):
                return error.__cause__.result
            raise to_tool_error(error, tool) from error.__cause__
        if context is not None and name not in CHANGE_PROJECTS and (project_id := _project_in(arguments)) is not None:
            context.request_context.lifespan_context.check_due(project_id)
        if isinstance(result, CallToolResult) and context is not None:
            return without_unknown_content(result, context.protocol_version)
        return result


def _project_in(arguments: dict[str, Any]) -> str | None:
    """Return the project that a call is about: tools that take an adapter's path also take a project id."""
    named = arguments.get("project_id") or arguments.get("adapter_path")
    try:
        return PROJECT_ID.validate_python(named)
    except ValidationError:
        return None


def build_server(settings: Settings) -> PEFTServer:
    updates, tasks = TrainingUpdates(), Tasks(settings.answer_within_s, read_only=read_only_tools(TOOLS))

    @asynccontextmanager
    async def lifespan(_: MCPServer[PEFTManager]) -> AsyncIterator[PEFTManager]:
        async with PEFTManager(settings) as manager, anyio.create_task_group() as group:
            group.start_soon(exit_on_signal)
            tasks.start(group)
            group.start_soon(updates.publish_changes, manager)
            manager.check_due()
            yield manager
            group.cancel_scope.cancel()

    server = PEFTServer(
        TOOLS,
        title="PEFT: adapters for your code base",
        instructions=INSTRUCTIONS,
        version=version("peft-mcp"),
        description=DESCRIPTION,
        website_url=WEBSITE,
        icons=ICONS,
        lifespan=lifespan,
        subscriptions=updates.bus,
        extensions=[tasks, training_app()],
        log_level=settings.log_level,
    )
    add_training_resource(server, updates)
    add_adapter_resource(server)
    add_settings_resource(server)
    add_report_resource(server)
    add_catalogue(server)
    for prompt in PROMPTS:
        server.add_prompt(prompt)
    return server


def read_only_tools(tools: Sequence[Tool]) -> frozenset[str]:
    return frozenset(tool.name for tool in tools if tool.annotations is not None and tool.annotations.read_only_hint)


def to_tool_error(error: ToolError | PeftMcpError, tool: Tool) -> ToolError:
    """Convert `error` of `tool` to the only exception whose text reaches a client.

    Invalid arguments and `PeftMcpError`s say what is allowed and what to do next. A crash stays the SDK's error, which
    withholds the text; the traceback is in the log.
    """
    if isinstance(error, PeftMcpError):
        return ToolError(f"{error} [{error.code}]")
    cause = error.__cause__
    if isinstance(cause, PeftMcpError):
        return to_tool_error(cause, tool)
    if isinstance(cause, ValidationError) and not isinstance(error, UnexpectedToolError):
        schema = tool.fn_metadata.arg_model.model_json_schema()  # unlike the schema that is sent, it has exact bounds
        return to_tool_error(invalid_argument(cause, schema), tool)
    return error


# -- the end of the process ------------------------------------------------------------------------------------------
# The server exits with its client, immediately and if necessary by force. Nothing is lost: jobs belong to the runner,
# which is a separate process, and the inference worker exits when its standard input closes.


def exit_when_stdin_closes(stdin: int) -> None:
    """End this process soon after the client closed the other end of `stdin`.

    The SDK then cancels open calls and returns, but a thread in the middle of a large repository would delay the exit. A
    file or a terminal never hangs up: for these the SDK's way is the only one.
    """
    own = os.dup(stdin)  # the SDK may replace the descriptor

    def watch() -> None:
        poll = select.poll()
        poll.register(own, 0)  # only hang-up and error, which are always reported
        poll.poll()
        time.sleep(EXIT_GRACE_S)
        os._exit(0)

    threading.Thread(target=watch, name="client-watch", daemon=True).start()


async def exit_on_signal() -> None:
    """Exit immediately: the thread that reads stdin cannot be woken, so an orderly return would wait for the client."""
    with anyio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
        async for received in signals:
            os._exit(128 + received)
