"""The MCP server: what it is called, what it can do, how it begins and ends."""

from __future__ import annotations

import os
import select
import signal
import threading
import time
from collections.abc import AsyncIterator, Mapping
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
from peft_core.manager import PEFTManager
from peft_core.schemas.validation import invalid_argument, refuse_unknown
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
        self,
        name: str,
        arguments: dict[str, Any],
        context: Context[PEFTManager, Any] | None = None,
    ) -> CallToolResult | InputRequiredResult:
        if name not in self._parameters:
            raise ToolError(f"There is no tool {name!r}. Tools: {', '.join(self._parameters)}.")
        parameters = self._parameters[name]
        try:
            # The SDK drops unknown arguments in silence: a misspelt one would do nothing.
            refuse_unknown(arguments, parameters)
            return await super().call_tool(name, arguments, context)
        except (ToolError, PeftMcpError) as error:
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


# FOLDED FROM server.app: Our errors → MCP tool errors: the only place. Only the text of a `ToolError` reaches a client.


def tool_error(error: ToolError | PeftMcpError, parameters: Mapping[str, Any]) -> ToolError:
    """What the client gets for `error`. `parameters`: the tool's input schema.

    Arguments that fail the schema and failures of the domain say what is allowed and what to do next; a crash stays the
    SDK's own (its text is withheld, the traceback is in the log).
    """
    if isinstance(error, PeftMcpError):
        return ToolError(f"{error} [{error.code}]")
    cause = error.__cause__
    if isinstance(cause, ValidationError) and not isinstance(error, UnexpectedToolError):
        cause = invalid_argument(cause, parameters)
    return tool_error(cause, parameters) if isinstance(cause, PeftMcpError) else error


# FOLDED FROM server.app: How the server ends: with its client, at once, and by force where something holds it up.
#
# Nothing is lost by it. Jobs belong to the runner, a process of its own; the inference process ends when its input does.
#

GRACE_S = 1.0  # after the client has closed our input: clients wait two seconds before they send signals


def exit_when_stdin_closes(stdin: int) -> None:
    """End this process soon after `stdin` was closed at its other end.

    The orderly way is the SDK's: it reads to the end, cancels what is open and returns. A thread in the middle of a large
    repository would hold that up. A file or a terminal never hangs up; there the orderly way is the only one.
    """
    own = os.dup(stdin)  # the SDK may put something else in its place

    def watch() -> None:
        poll = select.poll()
        poll.register(own, 0)  # no event but those that cannot be declined: hung up, error
        poll.poll()
        time.sleep(GRACE_S)
        os._exit(0)

    threading.Thread(target=watch, name="client-watch", daemon=True).start()


async def leave_on_signal() -> None:
    """End at once. The thread that reads stdin cannot be woken, so an orderly return would wait for the client."""
    with anyio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
        async for received in signals:
            os._exit(128 + received)
