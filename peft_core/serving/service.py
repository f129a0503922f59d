"""Start, find and stop the endpoint.

Its process holds `serving.lock`, and writes `serving.json` and `serving.token` (`state.py`).
"""

from __future__ import annotations

import json
import subprocess
import threading
import urllib.error
import urllib.request
from contextlib import suppress
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from peft_core.adapters.registry import Registry
from peft_core.config import Settings
from peft_core.errors import InvalidArgument, ServingError
from peft_core.schemas.frozen import FrozenModel
from peft_core.schemas.results import ErrorInfo
from peft_core.schemas.serving import DEFAULT_PORT, EndpointState, ServedModel, Serving, ServingStopped
from peft_core.serving.models import default_model, served_models
from peft_core.serving.state import MAX_STATE_BYTES, read_state, token
from peft_core.system.child_process import log_tail, open_log, python_module
from peft_core.system.lock import FileLock

ENDPOINT = python_module("peft_core.endpoint")
START_TIMEOUT_S = 60.0
STOP_TIMEOUT_S = 15.0
REQUEST_TIMEOUT_S = 5.0

# No proxy: the endpoint is on this machine.
_HTTP = urllib.request.build_opener(urllib.request.ProxyHandler({}))


class EndpointOptions(FrozenModel):
    """What the endpoint's process is given on its standard input, as JSON."""

    settings: Settings
    port: int = DEFAULT_PORT  # 0: a free one
    default_project: str | None = None  # as in EndpointState


class ServingService:
    def __init__(self, settings: Settings, registry: Registry) -> None:
        self._settings = settings
        self._paths = settings.paths
        self._registry = registry

    def serve(self, project_id: str | None, port: int | None) -> Serving:
        """Return the running endpoint, or start one.

        Raises:
            InvalidArgument: The project has no adapter, or the endpoint runs at another port.
            ServingError: It cannot be started: the port is taken, or it does not answer.
        """
        models = self._models(project_id)
        running = self._find()
        if running is None:
            options = EndpointOptions(
                settings=self._settings, port=DEFAULT_PORT if port is None else port, default_project=project_id
            )
            running = self._start(options)
        elif port not in (None, 0) and not running.address.endswith(f":{port}"):
            raise InvalidArgument(
                "port",
                port,
                f"the endpoint already runs at {running.address}",
                suggestions=["Omit port to use it", "Or call stop_serving first"],
            )
        elif project_id not in (None, running.default_project):
            running = self._call(running, "/default", {"project_id": project_id})
        return self._report(running, models)

    def stop(self) -> ServingStopped:
        """End the endpoint; requests that are being answered are finished first, for some seconds.

        Raises:
            ServingError: It does not end.
        """
        running = self._find()
        if running is None:
            return ServingStopped(status="not_running", summary="Nothing is served, so there was nothing to stop.")
        self._call(running, "/shutdown", {})
        with FileLock(self._paths.serving_lock) as lock:  # held until the process has ended
            if not lock.acquire(STOP_TIMEOUT_S):
                raise ServingError(
                    f"The endpoint at {running.address} has not ended after {STOP_TIMEOUT_S:g} s; it is finishing requests.",
                    code="serving_busy",
                    suggestions=["Call stop_serving again"],
                )
        return ServingStopped(
            status="stopped", address=running.address, summary=f"The endpoint at {running.address} has ended."
        )

    def _models(self, project_id: str | None) -> list[ServedModel]:
        models = served_models(self._registry.adapters())
        if not any(model.project_id for model in models):
            raise ServingError(
                "There is no adapter to serve.",
                code="nothing_to_serve",
                suggestions=["Train one with train_adapter"],
            )
        if project_id is not None and project_id not in {model.project_id for model in models}:
            raise InvalidArgument(
                "project_id",
                project_id,
                f"must be a project with a current adapter: {', '.join(m.project_id for m in models if m.project_id)}",
            )
        return models

    def _find(self) -> EndpointState | None:
        """Return the running endpoint; None if no process holds its lock.

        Raises:
            ServingError: A process holds the lock, but does not answer.
        """
        self._paths.root.mkdir(parents=True, exist_ok=True)
        with FileLock(self._paths.serving_lock) as lock:
            # Waits a moment: another server may be testing the lock, too, or an endpoint may be starting.
            if lock.acquire(0.2):
                return None
        state = read_state(self._paths)
        if state is not None and self._health(state) == state.run_id:
            return state
        raise ServingError(
            "The endpoint is starting, or does not answer.",
            code="serving_unreachable",
            suggestions=["Call serve_adapter again in some seconds", f"Its log is {self._log}"],
        )

    def _start(self, options: EndpointOptions) -> EndpointState:
        with open_log(self._log) as output:
            start = output.tell()
            process = subprocess.Popen(  # noqa: S603 -- a module of ours, with an absolute interpreter path
                ENDPOINT,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=output,
                cwd=self._paths.root,
                start_new_session=True,  # it outlives this process and signals to this process's group
            )
        killer = threading.Timer(START_TIMEOUT_S, process.kill)
        killer.start()
        try:
            assert process.stdin is not None  # noqa: S101 -- requested as a pipe
            assert process.stdout is not None  # noqa: S101 -- the same
            with suppress(BrokenPipeError):
                process.stdin.write(options.model_dump_json().encode())
                process.stdin.close()
            line = process.stdout.readline(MAX_STATE_BYTES)
        finally:
            killer.cancel()
            process.stdout.close()  # type: ignore[union-attr]
        threading.Thread(target=process.wait, daemon=True).start()  # reaps it, should it end first
        with suppress(ValidationError):
            return EndpointState.model_validate_json(line)
        try:
            problem = ErrorInfo.model_validate_json(line)
        except ValidationError:
            tail = log_tail(self._log, start=start, lines=1)
            raise ServingError(
                f"The endpoint could not be started.{f' Its log ends with: {tail}.' if tail else ''}",
                code="serving_start",
                suggestions=["Call serve_adapter again", f"The log is {self._log}"],
            ) from None
        if problem.code == "already_serving" and (running := self._find()) is not None:  # another server was faster
            return running
        raise ServingError(problem.message, code=problem.code, suggestions=problem.suggestions)

    @property
    def _log(self) -> Path:
        return self._paths.logs / "serving.log"

    def _health(self, state: EndpointState) -> str | None:
        try:
            with _HTTP.open(f"{state.address}/health", timeout=REQUEST_TIMEOUT_S) as response:
                answer = json.loads(response.read(MAX_STATE_BYTES))
        except (OSError, ValueError):
            return None
        return answer.get("run_id") if isinstance(answer, dict) else None

    def _call(self, state: EndpointState, path: str, body: dict[str, Any]) -> EndpointState:
        request = urllib.request.Request(  # noqa: S310 -- an address of this machine, http
            state.address + path,
            data=json.dumps(body).encode(),
            headers={"Authorization": f"Bearer {token(self._paths)}", "Content-Type": "application/json"},
        )
        try:
            with _HTTP.open(request, timeout=REQUEST_TIMEOUT_S) as response:
                return EndpointState.model_validate_json(response.read(MAX_STATE_BYTES))
        except (OSError, ValidationError) as error:
            raise ServingError(
                f"The endpoint at {state.address} does not answer: {error}.",
                code="serving_unreachable",
                suggestions=["Call it again in some seconds", f"Its log is {self._log}"],
            ) from error

    def _report(self, state: EndpointState, models: list[ServedModel]) -> Serving:
        adapters = [model.name for model in models if model.project_id is not None]
        name = default_model(models, state.default_project)
        token_path = self._paths.serving_token
        curl = (
            f"curl -s {state.address}/v1/completions -H \"Authorization: Bearer $(cat '{token_path}')\" "
            f'-H \'Content-Type: application/json\' -d \'{{"model": "{name}", "prompt": "def ", "max_tokens": 40}}\''
        )
        return Serving(
            summary=f"Serving {', '.join(adapters)} at {state.address}, an OpenAI-compatible endpoint on this machine, until "
            "stop_serving is called.",
            address=state.address,
            token_path=str(token_path),
            models=models,
            default_model=name,
            started_at=state.started_at,
            usage=[
                curl,
                f"OpenAI client: base_url={state.address + '/v1'!r}, api_key: the content of the token file, model={name!r}",
                f"llama.vscode: llama-vscode.endpoint = {state.address!r}, llama-vscode.api_key = the token",
                f"llama.vim: g:llama_config = {{'endpoint_fim': '{state.address}/infill', 'api_key': the token}}",
            ],
            next="A newly trained adapter of a project is used from its publication on. stop_serving ends the endpoint.",
        )
