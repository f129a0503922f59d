"""`OllamaClient`: use a running Ollama with a base model and the models that `export_adapter` has created from adapters.

It wraps the client package `ollama` (extra `ollama`): every call has a time limit, what is transient is tried again, and an
answer says which model wrote it. The HTTP API is documented at https://docs.ollama.com/api.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from peft_core.errors import OllamaError, sanitize
from peft_core.schemas.frozen import FrozenModel
from peft_core.system.addresses import local_address
from peft_core.system.packages import install_extra

if TYPE_CHECKING:
    import ollama

DEFAULT_ADDRESS = "http://127.0.0.1:11434"
MERGED_KEY = "peft_mcp.merged_adapter"  # in the metadata of a merged GGUF file
_OLDEST = (0, 5, 5)  # from here on, models are created from uploaded files
_LAST_WITH_ADAPTERS = (0, 34, 0)
_TRANSIENT_STATUS = (429, 500, 502, 503, 504)
_ATTEMPTS = 3
_VERSION = re.compile(r"(\d{1,6})\.(\d{1,6})\.(\d{1,6})", re.ASCII)
T = TypeVar("T")


class OllamaStatus(FrozenModel):
    """What is known about a server."""

    address: str
    reachable: bool
    version: str = ""
    models: dict[str, str] = {}  # noqa: RUF012 -- pydantic copies defaults; name -> digest of its manifest
    reason: str = ""  # why it is not reachable

    @property
    def takes_adapters(self) -> bool:
        """Whether a model can be created from a base model and an adapter; later versions take whole models only."""
        number = _number(self.version)
        return number is not None and _OLDEST <= number <= _LAST_WITH_ADAPTERS

    @property
    def is_too_old(self) -> bool:
        number = _number(self.version)
        return number is not None and number < _OLDEST


class OllamaAnswer(FrozenModel):
    """A text, and who wrote it."""

    text: str
    model: str
    adapter_applied: bool
    fallback_reason: str = ""  # why the base model answered instead
    finish_reason: str = ""
    prompt_tokens: int = 0
    completion_tokens: int = 0
    elapsed_s: float = 0.0


class OllamaModelInfo(FrozenModel):
    """A model in Ollama."""

    model: str
    has_adapter: bool  # beside its base model, or merged by peft-mcp
    base_model: str = ""  # that it was created from; empty: unknown
    template: str = ""


class OllamaClient:
    """A client of one server. Every method raises `OllamaError` if the server is absent, refuses, or takes too long.

    Args:
        address: URL of the server. None: `OLLAMA_HOST`, else http://127.0.0.1:11434.
        timeout_s: limit of a call that answers a question about the server.
        generation_timeout_s: limit of a call that generates text; loading the model is part of it.
    """

    def __init__(
        self, address: str | None = None, *, timeout_s: float = 10.0, generation_timeout_s: float = 300.0
    ) -> None:
        self.address = local_address(address or os.environ.get("OLLAMA_HOST", "") or DEFAULT_ADDRESS)
        self._timeout_s = timeout_s
        self._generation_timeout_s = generation_timeout_s

    # -- questions -----------------------------------------------------------------------------------------------------

    def status(self) -> OllamaStatus:
        """Return version and models of the server. Does not raise: an absent server is a status, too."""
        try:
            version = self._call(lambda client: _get(client, "/api/version"))
            listed = self._call(lambda client: client.list())
        except OllamaError as error:
            return OllamaStatus(address=self.address, reachable=False, reason=error.message)
        models = {model.model: (model.digest or "") for model in listed.models if model.model}
        number = version.get("version") if isinstance(version, dict) else None
        return OllamaStatus(address=self.address, reachable=True, version=sanitize(number or ""), models=models)

    def show(self, model: str) -> OllamaModelInfo:
        """Describe a model, above all whether an adapter is in it.

        Raises:
            OllamaError: code 'ollama_no_model' if there is none.
        """
        shown = self._call(lambda client: client.show(model))
        merged = MERGED_KEY in (shown.modelinfo or {})
        beside = any(line.startswith("ADAPTER ") for line in (shown.modelfile or "").splitlines())
        parent = (shown.details.parent_model if shown.details else None) or ""
        return OllamaModelInfo(
            model=model, has_adapter=merged or beside, base_model=sanitize(parent), template=shown.template or ""
        )

    # -- use -----------------------------------------------------------------------------------------------------------

    def generate(
        self,
        prompt: str,
        model: str,
        *,
        base_model: str | None = None,
        suffix: str | None = None,
        raw: bool = False,
        options: Mapping[str, Any] | None = None,
    ) -> OllamaAnswer:
        """Continue a prompt, or fill in before `suffix`. If the model cannot answer, its base model does, and says why.

        Args:
            prompt: The text to continue.
            model: The model with the adapter, as `export_adapter` has named it.
            base_model: The model to fall back to. None: the one that `model` was created from, if Ollama knows it.
            suffix: The text after the gap.
            raw: Whether the prompt is taken as it is, without the model's template.
            options: Such as {"temperature": 0, "num_predict": 64, "stop": ["def "]}.

        Raises:
            OllamaError: the server is not reachable, or the base model cannot answer either.
        """
        try:
            info = self.show(model)
            base_model = base_model or info.base_model or None
            answer = self._generate(prompt, model, suffix, options, raw=raw)
        except OllamaError as error:
            if base_model is None or error.code == "ollama_unreachable":
                raise
            fallback = self._generate(prompt, base_model, suffix, options, raw=raw)
            return fallback.model_copy(update={"fallback_reason": error.message})
        reason = "" if info.has_adapter else f"{model} is in Ollama, but no adapter is in it."
        return answer.model_copy(update={"adapter_applied": info.has_adapter, "fallback_reason": reason})

    def _generate(
        self, prompt: str, model: str, suffix: str | None, options: Mapping[str, Any] | None, *, raw: bool
    ) -> OllamaAnswer:
        started = time.monotonic()
        answer = self._call(
            lambda client: client.generate(
                model=model, prompt=prompt, suffix=suffix or "", raw=raw, options=dict(options or {}), stream=False
            ),
            timeout_s=self._generation_timeout_s,
        )
        return OllamaAnswer(
            text=answer.response or "",
            model=model,
            adapter_applied=False,
            finish_reason=answer.done_reason or "",
            prompt_tokens=answer.prompt_eval_count or 0,
            completion_tokens=answer.eval_count or 0,
            elapsed_s=round(time.monotonic() - started, 3),
        )

    # -- creation ------------------------------------------------------------------------------------------------------

    def upload(self, file: Path, *, timeout_s: float) -> str:
        """Send a file, and return its digest. The server keeps it under this digest."""
        return self._call(lambda client: client.create_blob(file), timeout_s=timeout_s)

    def create(
        self, model: str, *, timeout_s: float, say: Callable[[str], None] = lambda _: None, **recipe: Any
    ) -> None:
        """Create a model from uploaded files or from another model, and return when the server has stored it.

        Args:
            model: The new name. An existing model of this name is replaced.
            timeout_s: Limit of the whole creation.
            say: Called with each new stage.
            recipe: Arguments of `ollama.Client.create`: files, adapters, from_, template, system, parameters, license.

        Raises:
            OllamaError: the server refuses, also if it says so only after its status 200. `from_` names no model of this
                server: it would fetch that from the Internet.
        """
        source = recipe.get("from_")
        if source is not None and canonical(source) not in map(canonical, self.status().models):
            raise OllamaError(f"Ollama has no model {sanitize(source)}; it is not fetched.", code="ollama_no_model")
        _require_installed()
        deadline, last = time.monotonic() + timeout_s, ""
        with self._errors(), self._client(timeout_s) as client:
            for progress in client.create(model, stream=True, **recipe):
                if time.monotonic() > deadline:
                    raise OllamaError(f"Ollama did not create the model in {timeout_s:g} s.", code="ollama_timeout")
                if progress.status and progress.status != last:
                    last = progress.status
                    say(sanitize(last))
        if last != "success":
            raise OllamaError(f"Ollama stopped creating the model after {sanitize(last)!r}.", code="ollama_refused")

    # -- calls ---------------------------------------------------------------------------------------------------------

    def _call(self, action: Callable[[ollama.Client], T], *, timeout_s: float | None = None) -> T:
        """Do one call, and repeat it if the failure may pass, within the time limit of one."""
        _require_installed()
        import stamina  # noqa: PLC0415 -- an optional dependency

        limit = timeout_s or self._timeout_s
        with self._errors(), self._client(limit) as client:
            for attempt in stamina.retry_context(
                on=_is_transient, attempts=_ATTEMPTS, timeout=limit, wait_initial=0.1, wait_max=1.0, wait_jitter=0.1
            ):
                with attempt:
                    return action(client)
        raise AssertionError("the last attempt raises")

    @contextmanager
    def _client(self, timeout_s: float) -> Iterator[ollama.Client]:
        import ollama  # noqa: PLC0415 -- an optional dependency

        # No redirects and no proxies: the code that an adapter has learned goes to this address only.
        client = ollama.Client(self.address, timeout=timeout_s, follow_redirects=False, trust_env=False)
        try:
            yield client
        finally:
            client._client.close()  # noqa: SLF001 -- the same

    @contextmanager
    def _errors(self) -> Iterator[None]:
        import httpx  # noqa: PLC0415 -- comes with ollama
        import ollama  # noqa: PLC0415 -- an optional dependency

        try:
            yield
        except ollama.ResponseError as error:
            missing = error.status_code == 404 and "not found" in error.error
            raise OllamaError(
                f"Ollama answers: {sanitize(error.error, limit=300)}.",
                code="ollama_no_model" if missing else "ollama_refused",
                details={"status": error.status_code},
            ) from error
        except httpx.TimeoutException as error:
            raise OllamaError(f"Ollama at {self.address} did not answer in time.", code="ollama_timeout") from error
        except (ConnectionError, httpx.TransportError) as error:
            raise OllamaError(
                f"Ollama does not run at {self.address}.",
                code="ollama_unreachable",
                suggestions=["Start it with `ollama serve`", "Or set CODEBASE_GARDENER_OLLAMA_BASE_URL"],
            ) from error
        except httpx.InvalidURL as error:
            raise OllamaError(f"{sanitize(self.address)} is no address.", code="ollama_unreachable") from error
        except ValueError as error:  # an answer that is no JSON, or not of the expected form
            raise OllamaError(
                f"What runs at {self.address} does not answer as Ollama does.", code="ollama_unreachable"
            ) from error


def _require_installed() -> None:
    if find_spec("ollama") is None or find_spec("stamina") is None:
        raise OllamaError(
            "The client of Ollama is not installed here.",
            code="ollama_not_installed",
            suggestions=[f"Install it: {install_extra('ollama')}"],
        )


def _get(client: ollama.Client, path: str) -> Any:
    """Return the JSON of a path for which the package has no method."""
    return client._request_raw("GET", path).json()  # type: ignore[no-untyped-call] # noqa: SLF001


def canonical(model: str) -> str:
    """Return a model's name with its tag, in one case: Ollama compares names so."""
    name = model.lower()
    return name if name.rfind(":") > name.rfind("/") else f"{name}:latest"


def _number(version: str) -> tuple[int, int, int] | None:
    """Return a version as numbers; None for 0.0.0, a build by hand, and for anything else."""
    match = _VERSION.match(version)
    number = (int(match[1]), int(match[2]), int(match[3])) if match else None
    return None if number == (0, 0, 0) else number


def _is_transient(error: Exception) -> bool:
    import httpx  # noqa: PLC0415 -- comes with ollama
    import ollama  # noqa: PLC0415 -- an optional dependency

    if isinstance(error, ollama.ResponseError):
        return error.status_code in _TRANSIENT_STATUS
    return isinstance(error, ConnectionError | httpx.TransportError) and not isinstance(error, httpx.TimeoutException)
