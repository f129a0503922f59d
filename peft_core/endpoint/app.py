"""The endpoint's HTTP interface. One request is answered at a time, in order of arrival: one model is in memory."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, TypeVar

import anyio
import structlog
from anyio.to_thread import run_sync
from sse_starlette.sse import EventSourceResponse
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from peft_core.endpoint.requests import (
    AnyRequest,
    ChatRequest,
    CompletionRequest,
    InfillRequest,
    generation_of,
    parse,
)
from peft_core.errors import InferenceError, InvalidArgument, PeftMcpError
from peft_core.manager import PEFTManager
from peft_core.schemas.generation import MAX_SEED, Generation, GenerationRequest
from peft_core.schemas.serving import EndpointState, ServedModel
from peft_core.serving.models import default_model, served_models
from peft_core.serving.state import write_state

MAX_BODY_BYTES = 8 << 20
HOSTS = ["127.0.0.1", "localhost"]  # a page in a browser cannot reach it under another name
_WITHHELD = "\N{REPLACEMENT CHARACTER}"  # the beginning of a character whose other bytes are to come

log = structlog.get_logger(__name__)
ResultT = TypeVar("ResultT")


class UnknownModel(InvalidArgument):
    code = "model_not_found"


class Unauthorized(PeftMcpError):
    code = "invalid_api_key"


@dataclass(frozen=True)
class _Choice:
    """The model that a request is answered with."""

    name: str
    project_id: str  # whose adapter is loaded, and the base model with it
    use_base: bool  # without the adapter


@dataclass
class Endpoint:
    """The application and its state."""

    manager: PEFTManager
    token: str
    state: EndpointState
    shut_down: Callable[[], None]
    requests: int = 0  # answered so far
    _turn: anyio.Lock = field(default_factory=anyio.Lock)

    def app(self) -> Starlette:
        answers: dict[str, type[AnyRequest]] = {
            "/v1/completions": CompletionRequest,
            "/v1/chat/completions": ChatRequest,
            "/infill": InfillRequest,
        }
        routes = [
            Route("/health", self._health),
            Route("/v1/models", self._guarded(self._list_models)),
            Route("/default", self._guarded(self._set_default), methods=["POST"]),
            Route("/shutdown", self._guarded(self._shutdown), methods=["POST"]),
        ]
        for path, kind in answers.items():
            handler = self._guarded(self._answering(kind))
            # With the model in the path, for editors that send none.
            routes += [Route(prefix + path, handler, methods=["POST"]) for prefix in ("", "/models/{model}")]
        return Starlette(routes=routes, middleware=[Middleware(TrustedHostMiddleware, allowed_hosts=HOSTS)])

    # -- about the endpoint --------------------------------------------------------------------------------------------

    async def _health(self, _: Request) -> Response:
        return JSONResponse({"status": "ok", "run_id": self.state.run_id, "requests": self.requests})

    async def _list_models(self, _: Request) -> Response:
        created = int(time.time())
        data = [
            {"id": model.name, "object": "model", "created": created, "owned_by": "peft-mcp", "root": model.base_model}
            for model in await self._models()
        ]
        return JSONResponse({"object": "list", "data": data})

    async def _set_default(self, request: Request) -> Response:
        project_id = json.loads(await _body(request)).get("project_id")
        projects = [model.project_id for model in await self._models() if model.project_id is not None]
        if project_id not in projects:
            raise UnknownModel("project_id", project_id, f"must be one of {', '.join(projects) or 'none'}")
        self.state = self.state.model_copy(update={"default_project": project_id})
        write_state(self.manager.settings.paths, self.state)
        return _model_response(self.state)

    async def _shutdown(self, _: Request) -> Response:
        self.shut_down()
        return _model_response(self.state)

    async def warm_up(self) -> None:
        """Load the default adapter, so that the first request does not wait for it."""
        with suppress(PeftMcpError):  # the first request reports it
            async with self._turn:
                model = await self._find(None)
                await self.manager.load_adapter(model.project_id, compare_for_s=0)

    # -- generation ----------------------------------------------------------------------------------------------------

    def _answering(self, kind: type[AnyRequest]) -> Callable[[Request], Awaitable[Response]]:
        async def answer(request: Request) -> Response:
            asked = parse(kind, await _body(request))
            model = await self._find(request.path_params.get("model") or asked.model)
            if isinstance(asked, InfillRequest) and asked.only_warms_up:
                return JSONResponse({"content": "", "model": model.name, "stop": True, "tokens_predicted": 0})
            generation = generation_of(asked, random_seed=secrets.randbelow(MAX_SEED + 1))
            reply = _Reply(asked, model.name)
            if asked.stream:
                return self._stream(model, generation, reply)
            return JSONResponse(
                reply.whole(await _unless_disconnected(request, lambda: self._generate(model, generation)))
            )

        return answer

    def _stream(self, model: _Choice, generation: GenerationRequest, reply: _Reply) -> Response:
        """Return server-sent events. The generation ends when the client is gone."""
        events, to_client = anyio.create_memory_object_stream[str](16)
        sent = ""
        longest_stop = max((len(stop) for stop in generation.stop), default=1)

        async def on_text(text: str) -> None:
            nonlocal sent
            # What may become a stop text, or is half a character, waits for what follows.
            safe = text[: len(text) - longest_stop + 1].rstrip(_WITHHELD)
            if safe.startswith(sent) and len(safe) > len(sent):
                await events.send(reply.part(safe[len(sent) :]))
                sent = safe

        async def generate() -> None:
            async with events:
                try:
                    answer = await self._generate(model, generation, on_text)
                except Exception as error:  # noqa: BLE001 -- the status is sent already: the error becomes an event
                    await events.send(json.dumps(_error_body(_as_known(error))))
                    return
                if rest := answer.text.removeprefix(sent):
                    await events.send(reply.part(rest))
                for event in reply.last(answer):
                    await events.send(event)

        return EventSourceResponse(to_client, data_sender_callable=generate, sep="\n")

    async def _generate(
        self,
        model: _Choice,
        request: GenerationRequest,
        on_text: Callable[[str], Awaitable[None]] | None = None,
    ) -> Generation:
        """Generate with a model's adapter. Loading it takes milliseconds if it is in memory and has not changed.

        Raises:
            PeftMcpError: The adapter cannot be loaded, or the request cannot be answered.
        """
        async with self._turn:  # so that no other request loads another adapter in between
            loaded = await self.manager.load_adapter(model.project_id, compare_for_s=0)
            if loaded.status != "loaded":
                raise InferenceError(
                    f"The adapter of {model.project_id!r} cannot be loaded: {loaded.reason}", code="adapter_not_loaded"
                )
            answer = await self.manager.generate(request, use_base=model.use_base, on_text=on_text)
            self.requests += 1
            return answer

    async def _models(self) -> list[ServedModel]:
        """Return what is served now: adapters are published and deleted while the endpoint runs."""
        listed = await self.manager.list_adapters(compare_for_s=0)
        return await run_sync(served_models, listed.adapters)

    async def _find(self, name: str | None) -> _Choice:
        """Return the model of this name, or else the adapter of this project; None: what answers if no model is named.

        Raises:
            UnknownModel: There is none.
        """
        models = await self._models()
        name = name or default_model(models, self.state.default_project)  # for each request: adapters come and go
        for model in sorted(models, key=lambda model: model.name != name):  # a project may be called as a model is
            if name is not None and name in (model.name, model.project_id):
                return _Choice(model.name, model.loaded_with, use_base=model.project_id is None)
        raise UnknownModel("model", name, f"must be one of {', '.join(model.name for model in models) or 'none'}")

    # -- all requests --------------------------------------------------------------------------------------------------

    def _guarded(self, handle: Callable[[Request], Awaitable[Response]]) -> Callable[[Request], Awaitable[Response]]:
        """Require the token, and answer errors in OpenAI's form."""

        async def guarded(request: Request) -> Response:
            try:
                self._require_token(request)
                return await handle(request)
            except Exception as error:  # noqa: BLE001 -- the edge of the process: clients expect this form
                known = _as_known(error)
                return JSONResponse(_error_body(known), _status_of(known))

        return guarded

    def _require_token(self, request: Request) -> None:
        authorization = request.headers.get("authorization", "")
        given = authorization[7:].strip() if authorization[:7].lower() == "bearer " else ""
        given = given or request.headers.get("x-api-key", "") or request.headers.get("api-key", "")
        if not secrets.compare_digest(given.encode(), self.token.encode()):
            raise Unauthorized(
                "The token is missing or wrong. Every request needs the header Authorization: Bearer TOKEN; the token is in "
                "serving.token in the data directory."
            )


class _Reply:
    """An answer in the form of the interface that was used."""

    def __init__(self, asked: AnyRequest, model: str) -> None:
        self._asked = asked
        self._model = model
        self._id = f"cmpl-{secrets.token_hex(8)}"
        self._created = int(time.time())

    def whole(self, answer: Generation) -> dict[str, Any]:
        if isinstance(self._asked, InfillRequest):
            return self._infill(answer.text, answer)
        if isinstance(self._asked, ChatRequest):
            choice: dict[str, Any] = {"message": {"role": "assistant", "content": answer.text}}
        else:
            choice = {"text": answer.text}
        choice |= {"index": 0, "logprobs": None, "finish_reason": answer.finish_reason}
        return self._envelope([choice], "") | {"usage": _usage(answer)}

    def part(self, text: str) -> str:
        """Return an event with more of the text."""
        if isinstance(self._asked, InfillRequest):
            return json.dumps({"content": text, "stop": False, "model": self._model})
        return self._chunk(text, None)

    def last(self, answer: Generation) -> list[str]:
        """Return the events that end the answer."""
        if isinstance(self._asked, InfillRequest):
            return [json.dumps(self._infill("", answer))]
        end = [self._chunk("", answer.finish_reason)]
        if self._asked.wants_usage:
            end.append(json.dumps(self._envelope([], ".chunk") | {"usage": _usage(answer)}))
        return [*end, "[DONE]"]

    def _infill(self, text: str, answer: Generation) -> dict[str, Any]:
        return {
            "content": text,
            "stop": True,
            "model": self._model,
            "tokens_predicted": answer.completion_tokens,
            "tokens_evaluated": answer.prompt_tokens,
            "timings": {"predicted_n": answer.completion_tokens, "predicted_per_second": answer.tokens_per_second},
        }

    def _chunk(self, text: str, finish_reason: str | None) -> str:
        if isinstance(self._asked, ChatRequest):
            choice: dict[str, Any] = {"delta": {"role": "assistant", "content": text} if text else {}}
        else:
            choice = {"text": text}
        choice |= {"index": 0, "logprobs": None, "finish_reason": finish_reason}
        return json.dumps(self._envelope([choice], ".chunk") | ({"usage": None} if self._asked.wants_usage else {}))

    def _envelope(self, choices: list[dict[str, Any]], chunk: str) -> dict[str, Any]:
        kind = f"chat.completion{chunk}" if isinstance(self._asked, ChatRequest) else "text_completion"
        return {
            "id": self._id,
            "object": kind,
            "created": self._created,
            "model": self._model,
            "choices": choices,
        }


def _usage(answer: Generation) -> dict[str, int]:
    return {
        "prompt_tokens": answer.prompt_tokens,
        "completion_tokens": answer.completion_tokens,
        "total_tokens": answer.prompt_tokens + answer.completion_tokens,
    }


def _model_response(state: EndpointState) -> Response:
    return JSONResponse(state.model_dump(mode="json"))


async def _body(request: Request) -> bytes:
    """Read a request's body.

    Raises:
        InvalidArgument: It is too long.
    """
    parts, size = [], 0
    async for part in request.stream():
        size += len(part)
        if size > MAX_BODY_BYTES:
            raise InvalidArgument(
                "body", f"{size} bytes and more", f"must be at most {MAX_BODY_BYTES} bytes", code="too_large"
            )
        parts.append(part)
    return b"".join(parts)


async def _unless_disconnected(request: Request, work: Callable[[], Awaitable[ResultT]]) -> ResultT:
    """Await the work, and cancel it when the client closes its connection: editors drop requests at each key press."""
    results: list[ResultT] = []
    failures: list[PeftMcpError] = []

    async with anyio.create_task_group() as group:

        async def watch() -> None:
            while (await request.receive())["type"] != "http.disconnect":
                pass
            group.cancel_scope.cancel()

        group.start_soon(watch)
        with suppress(anyio.get_cancelled_exc_class()):
            try:
                results.append(await work())
            except PeftMcpError as error:  # outside the task group it would be an exception group
                failures.append(error)
        group.cancel_scope.cancel()
    if failures:
        raise failures[0]
    if not results:
        raise InferenceError("The client closed the connection.", code="client_closed")
    return results[0]


def _as_known(error: Exception) -> PeftMcpError:
    """Return an error of ours as it is, and any other, which is logged, as an internal one."""
    if isinstance(error, PeftMcpError):
        return error
    log.error("unexpected error", exc_info=error)
    return InferenceError(
        "The request ended with an unexpected error; it is in logs/serving.log.", code="internal_error"
    )


def _status_of(error: PeftMcpError) -> int:
    by_code = {
        "model_not_found": 404,
        "invalid_api_key": 401,
        "too_large": 413,
        "invalid_argument": 400,
        "client_closed": 499,
        "internal_error": 500,
    }
    if error.code in by_code:
        return by_code[error.code]
    unavailable = ("host_died", "host_start", "not_enough_memory", "training_runs", "adapter_not_loaded")
    return 503 if error.code in unavailable else 400


def _error_body(error: PeftMcpError) -> dict[str, Any]:
    kind = "invalid_request_error" if _status_of(error) < 500 else "server_error"
    return {
        "error": {
            "message": str(error),
            "type": kind,
            "param": error.details.get("field"),
            "code": error.code,
        }
    }
