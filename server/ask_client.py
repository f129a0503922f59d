"""Questions to the client in the middle of a call, in both protocol eras, that never block a call.

Before protocol version 2026-07-28, the server sends a request and waits. Since then a call ends with the question
(`InputRequiredResult`), and the client makes it again with the answer; `request_state`, which the SDK seals, carries the
answers of earlier rounds. The tool runs again from its beginning, so it must ask before it changes anything.
"""

from __future__ import annotations

import json
from typing import Any, TypeVar

from mcp.server.mcpserver import Context
from mcp.server.session import ServerSession
from mcp.shared.exceptions import MCPError
from mcp.shared.message import ServerMessageMetadata
from mcp.types import ElicitRequest, ElicitResult, InputRequiredResult, ListRootsRequest, ListRootsResult
from mcp_types.version import is_version_at_least
from pydantic import ValidationError

Answer = TypeVar("Answer", ElicitResult, ListRootsResult)

ASK_AGAIN_VERSION = "2026-07-28"  # the first version in which a call is made again with the answer


class InputNeeded(Exception):
    """A question that ends this round of the call; `result` is what the client gets."""

    def __init__(self, result: InputRequiredResult) -> None:
        super().__init__("the client has to answer first")
        self.result = result


async def ask(
    ctx: Context[Any, Any],
    key: str,
    request: ElicitRequest | ListRootsRequest,
    answer_type: type[Answer],
    *,
    timeout_s: float,
) -> Answer | None:
    """Return the client's answer; None if there is none in time, or none that can be understood.

    `key` names the question within the call. `timeout_s` is how long to wait, where the protocol lets the server wait.

    Raises:
        InputNeeded: the client makes the call again with the answer.
    """
    if not is_version_at_least(ctx.protocol_version or "", ASK_AGAIN_VERSION):
        return await _ask_and_wait(ctx, request, answer_type, timeout_s)
    state: dict[str, Any] = json.loads(ctx.request_state) if ctx.request_state else {"asked": [], "answers": {}}
    new = {name: answer.model_dump(mode="json", by_alias=True) for name, answer in (ctx.input_responses or {}).items()}
    answers = {**{name: new[name] for name in state["asked"] if name in new}, **state["answers"]}
    if key in answers:
        try:
            return answer_type.model_validate(answers[key])
        except ValidationError:
            return None
    if key in state["asked"]:
        return None
    state = {"asked": [*state["asked"], key], "answers": answers}
    raise InputNeeded(InputRequiredResult(input_requests={key: request}, request_state=json.dumps(state)))


async def _ask_and_wait(
    ctx: Context[Any, Any], request: ElicitRequest | ListRootsRequest, answer_type: type[Answer], timeout_s: float
) -> Answer | None:
    session: ServerSession = ctx.session
    try:
        return await session.send_request(
            request,
            answer_type,
            request_read_timeout_seconds=timeout_s,
            metadata=ServerMessageMetadata(related_request_id=ctx.request_id),
        )
    except (MCPError, ValidationError):  # no answer in time, a refusal, or something else than an answer
        return None
