"""The person's consent, asked for with a form (elicitation) before what cannot be undone, takes long or is downloaded.

It never blocks a client: one that shows no forms, or a person who does not answer, leaves the decision with the client, which
asks for permission before calls as its user has set.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from mcp.server.mcpserver import Context
from mcp.types import ElicitRequest, ElicitRequestFormParams, ElicitResult

from peft_core.errors import Declined, sanitize
from peft_core.manager import PEFTManager
from peft_core.schemas.training import TrainingConfig
from server.ask_client import ask
from server.progress import Report, with_progress

ANSWER_WITHIN_S = 50.0  # most clients give up on a call after 60 s
FORM: dict[str, Any] = {"type": "object", "properties": {}}  # to accept or to decline is the whole answer


async def require_consent(ctx: Context[Any, Any], question: str, nothing_done: str, *, about: str = "consent") -> None:
    """Return if the person agrees, or cannot be asked, or does not answer in time.

    `nothing_done` says what has not happened, such as "Nothing was deleted". `about` names the question within the call.

    Raises:
        Declined: the person declined, or closed the question.
        InputNeeded: the client makes the call again with the answer.
    """
    if not shows_forms(ctx):
        return
    request = ElicitRequest(params=ElicitRequestFormParams(message=question, requested_schema=FORM))
    answer = await with_progress(ctx, partial(_ask, ctx, about, request))
    if answer is None or answer.action == "accept":
        return
    how = "declined" if answer.action == "decline" else "closed the question without an answer"
    raise Declined(
        f"{nothing_done}: the person was asked to confirm, and {how}.",
        suggestions=["Ask them what they want before you call this tool again"],
        details={"action": answer.action},
    )


async def confirm_download(ctx: Context[PEFTManager, Any], arguments: Mapping[str, Any]) -> None:
    """Ask before a tool downloads the base model that its arguments name, or that its settings of a training choose.

    Raises:
        Declined, InputNeeded: as `require_consent`.
    """
    config = arguments.get("config")
    if isinstance(config, TrainingConfig):
        named = config.base_model  # None: the default
    elif (named := arguments.get("base_model")) is None and not arguments.get("use_base"):
        return
    would_download = ctx.request_context.lifespan_context.would_download
    if (model := await would_download(named, unless_in_memory=bool(arguments.get("use_base")))) is not None:
        question = f"Download the model {sanitize(model)} from the Hugging Face Hub? It may take gigabytes."
        await require_consent(ctx, question, "Nothing was downloaded", about="download")


def shows_forms(ctx: Context[Any, Any]) -> bool:
    """Whether the client declared elicitation by form; an empty declaration, from before there were modes, means forms."""
    capabilities = ctx.client_capabilities
    elicitation = capabilities.elicitation if capabilities is not None else None
    return elicitation is not None and (elicitation.form is not None or elicitation.url is None)


async def _ask(ctx: Context[Any, Any], about: str, request: ElicitRequest, report: Report) -> ElicitResult | None:
    await report(0.0, None, "waiting for the person's answer")
    return await ask(ctx, about, request, ElicitResult, timeout_s=ANSWER_WITHIN_S)
