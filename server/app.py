"""The MCP server: what it is called, what it can do, how it begins and ends."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib.metadata import version
from typing import Any

import anyio
from mcp.server.mcpserver import Context, MCPServer
from mcp.server.mcpserver.exceptions import ToolError
from mcp.server.mcpserver.tools import Tool
from mcp.types import CallToolResult, InputRequiredResult

from peft_core.config import Settings
from peft_core.errors import ModelError
from peft_core.manager import PEFTManager
from peft_core.validation import refuse_unknown
from server.errors import tool_error
from server.leaving import leave_on_signal
from server.resources import TrainingUpdates, add_adapter_resource, add_training_resource
from server.tools import adapters, inference, training

INSTRUCTIONS = (
    "peft-mcp trains a LoRA adapter on one code base, on the user's machine, in the background: call train_adapter with a "
    "project id and the repository's path, then get_training_status until it is completed. "
    "The result says whether the adapter helps, measured on files it never saw; then load_adapter with the project id, and "
    "generate writes with it (compare_with_base=true shows what it changes), until unload_adapter frees the memory. "
    "Jobs go on without you and are found again by project id; list_adapters shows what there is and what is loaded."
)


class PEFTServer(MCPServer[PEFTManager]):
    """`MCPServer` with strict arguments and errors that say what to do."""

    def __init__(self, tools: list[Tool], **options: Any) -> None:
        self._parameters = {tool.name: tool.parameters for tool in tools}
        for schema in self._parameters.values():
            schema["additionalProperties"] = False
        super().__init__("peft-mcp", tools=tools, **options)

    async def call_tool(
        self, name: str, arguments: dict[str, Any], context: Context[PEFTManager, Any] | None = None
    ) -> CallToolResult | InputRequiredResult:
        if name not in self._parameters:
            raise ToolError(f"There is no tool {name!r}. Tools: {', '.join(self._parameters)}.")
        parameters = self._parameters[name]
        try:
            # The SDK drops unknown arguments in silence: a misspelt one would do nothing.
            refuse_unknown(arguments, parameters)
            return await super().call_tool(name, arguments, context)
        except (ToolError, ModelError) as error:
            raise tool_error(error, parameters) from error.__cause__


def build_server(settings: Settings) -> PEFTServer:
    updates = TrainingUpdates()

    @asynccontextmanager
    async def lifespan(_: MCPServer[PEFTManager]) -> AsyncIterator[PEFTManager]:
        async with PEFTManager(settings) as manager, anyio.create_task_group() as group:
            group.start_soon(leave_on_signal)
            group.start_soon(updates.tell, manager)
            yield manager
            group.cancel_scope.cancel()

    server = PEFTServer(
        [*training.TOOLS, *adapters.TOOLS, *inference.TOOLS],
        title="PEFT: adapters for your code base",
        instructions=INSTRUCTIONS,
        version=version("peft-mcp"),
        lifespan=lifespan,
        subscriptions=updates.bus,
        log_level=settings.log_level,
    )
    add_training_resource(server, updates)
    add_adapter_resource(server)
    return server
