"""Our errors → MCP tool errors: the only place. Only the text of a `ToolError` reaches a client."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mcp.server.mcpserver.exceptions import ToolError, UnexpectedToolError
from pydantic import ValidationError

from peft_core.errors import ModelError
from peft_core.validation import invalid_argument


def tool_error(error: ToolError | ModelError, parameters: Mapping[str, Any]) -> ToolError:
    """What the client gets for `error`. `parameters`: the tool's input schema.

    Arguments that fail the schema and failures of the domain say what is allowed and what to do next; a crash stays the
    SDK's own (its text is withheld, the traceback is in the log).
    """
    if isinstance(error, ModelError):
        return ToolError(f"{error} [{error.code}]")
    cause = error.__cause__
    if isinstance(cause, ValidationError) and not isinstance(error, UnexpectedToolError):
        cause = invalid_argument(cause, parameters)
    return tool_error(cause, parameters) if isinstance(cause, ModelError) else error
