"""The person's consent, asked for with a form (elicitation) before what cannot be undone or takes long.

It never blocks a client: one that shows no forms, or a person who does not answer, leaves the decision with the client, which
asks for permission before calls as its user has set.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from mcp.server.mcpserver import Context
from mcp.types import ElicitRequest, ElicitRequestFormParams, ElicitResult

from peft_core.errors import Declined
from server.ask_client import ask
from server.progress import Report, with_progress

ANSWER_WITHIN_S = 50.0  # most clients give up on a call after 60 s
FORM: dict[str, Any] = {"type": "object", "properties": {}}  # to accept or to decline is the whole answer


async def require_consent(ctx: Context[Any, Any], question: str, nothing_done: str) -> None:
    """Return if the person agrees, or cannot be asked, or does not answer in time.

    `nothing_done` says what has not happened, such as "Nothing was deleted".

    Raises:
        Declined: the person declined, or closed the question.
        InputNeeded: the client makes the call again with the answer.
    """
    if not shows_forms(ctx):
        return
    request = ElicitRequest(params=ElicitRequestFormParams(message=question, requested_schema=FORM))
    answer = await with_progress(ctx, partial(_ask, ctx, request))
    if answer is None or answer.action == "accept":
        return
    how = "declined" if answer.action == "decline" else "closed the question without an answer"
    raise Declined(
        f"{nothing_done}: the person was asked to confirm, and {how}.",
        suggestions=["Ask them what they want before you call this tool again"],
        details={"action": answer.action},
    )


def shows_forms(ctx: Context[Any, Any]) -> bool:
    """Whether the client declared elicitation by form; an empty declaration, from before there were modes, means forms."""
    capabilities = ctx.client_capabilities
    elicitation = capabilities.elicitation if capabilities is not None else None
    return elicitation is not None and (elicitation.form is not None or elicitation.url is None)


async def _ask(ctx: Context[Any, Any], request: ElicitRequest, report: Report) -> ElicitResult | None:
    await report(0.0, None, "waiting for the person's answer")
    return await ask(ctx, "consent", request, ElicitResult, timeout_s=ANSWER_WITHIN_S)
