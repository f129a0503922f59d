"""`VllmClient`: have a running vLLM load an adapter, and ask it for log-probabilities.

The endpoints are those of https://docs.vllm.ai/en/latest/features/lora/ and of its OpenAI-compatible server.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from peft_core.errors import VllmError, sanitize
from peft_core.system.addresses import local_address

MAX_ANSWER_BYTES = 8 << 20
_SWITCH = "VLLM_ALLOW_RUNTIME_LORA_UPDATING=True"


def vllm_address(text: str) -> str | None:
    """Return the address of a server without the path of its API; None if it is no http address."""
    address = local_address(text).removesuffix("/v1").rstrip("/")
    try:
        parts = urlsplit(address)
        valid = parts.port is None or parts.port > 0
    except ValueError:
        return None
    plain = parts.scheme in ("http", "https") and parts.hostname and not (parts.path or parts.query or parts.fragment)
    return address if plain and valid and parts.username is None and address.isprintable() else None


class VllmClient:
    """A client of one server. Every method raises `VllmError` if the server is absent, refuses, or takes too long.

    Args:
        address: Such as http://127.0.0.1:8000.
        timeout_s: limit of each call.
        api_key: sent to the server if it is given.
    """

    def __init__(self, address: str, *, timeout_s: float = 120.0, api_key: str | None = None) -> None:
        self.address = address
        self._timeout_s = timeout_s
        self._api_key = api_key

    def version(self) -> str:
        """Return the version; empty if the server does not say it."""
        status, answer = self._call("GET", "/version")
        version = answer.get("version") if status == 200 else None
        return sanitize(version, limit=40) if isinstance(version, str) else ""

    def models(self) -> dict[str, str | None]:
        """Return the names of the models, each with the base model that it is an adapter of; None: it is no adapter."""
        status, answer = self._call("GET", "/v1/models")
        data = answer.get("data")
        if status != 200 or not isinstance(data, list):
            raise self._refused(status, answer)
        known = [model for model in data if isinstance(model, dict) and isinstance(model.get("id"), str)]
        return {model["id"]: model["parent"] if isinstance(model.get("parent"), str) else None for model in known}

    def load(self, name: str, directory: Path) -> None:
        """Have an adapter loaded from a directory, which the server reads itself."""
        status, answer = self._call("POST", "/v1/load_lora_adapter", {"lora_name": name, "lora_path": str(directory)})
        if status == 200:
            return
        message = _message(answer)
        if status == 404 and "error" not in answer:
            raise VllmError(
                "vLLM was started without permission to load adapters.",
                code="vllm_refused",
                suggestions=[f"Start it with {_SWITCH} in its environment and --enable-lora"],
            )
        if status == 404:
            raise VllmError(
                f"vLLM cannot read {directory}: {message}",
                code="vllm_refused",
                suggestions=["It must run on this machine, or see the same directory under the same path"],
            )
        raise self._refused(status, answer)

    def unload(self, name: str) -> None:
        status, answer = self._call("POST", "/v1/unload_lora_adapter", {"lora_name": name})
        if status not in (200, 404):
            raise self._refused(status, answer)

    def log_probs(self, model: str, document: Sequence[int]) -> list[float]:
        """Return the log-probabilities of the tokens after the first one, each given those before it."""
        question = {"model": model, "prompt": list(document), "max_tokens": 1, "temperature": 0, "prompt_logprobs": 0}
        status, answer = self._call("POST", "/v1/completions", question)
        if status != 200:
            raise self._refused(status, answer)
        try:
            positions = answer["choices"][0]["prompt_logprobs"]
            values = [
                float(position[str(token)]["logprob"])
                for token, position in zip(document[1:], positions[1:], strict=True)
            ]
        except (KeyError, IndexError, TypeError, ValueError) as error:
            raise VllmError("vLLM answered without log-probabilities of the prompt.", code="vllm_refused") from error
        return values

    def _call(self, method: str, path: str, body: Mapping[str, Any] | None = None) -> tuple[int, dict[str, Any]]:
        """Return the status and the JSON object of an answer; any other text is under "text"."""
        import httpx  # noqa: PLC0415 -- not at the server's start

        headers = {"Authorization": f"Bearer {self._api_key}"} if self._api_key else {}
        deadline, raw = time.monotonic() + self._timeout_s, b""
        # No redirects and no proxies: what the adapter has learned stays at this address.
        with (
            _errors(self.address),
            httpx.Client(timeout=self._timeout_s, follow_redirects=False, trust_env=False, headers=headers) as client,
            client.stream(method, self.address + path, json=body) as answer,
        ):
            for part in answer.iter_bytes():
                raw += part
                if len(raw) > MAX_ANSWER_BYTES or time.monotonic() > deadline:
                    raise VllmError(f"What runs at {self.address} sends an answer without end.", code="vllm_refused")
        try:
            parsed = json.loads(raw)
        except (ValueError, RecursionError):
            parsed = None
        return answer.status_code, parsed if isinstance(parsed, dict) else {"text": raw.decode("utf-8", "replace")}

    def _refused(self, status: int, answer: Mapping[str, Any]) -> VllmError:
        message = _message(answer)
        advice = []
        if status in (401, 403):
            advice = ["Set VLLM_API_KEY, and name the server in CODEBASE_GARDENER_VLLM_BASE_URL"]
        elif "rank" in message:
            advice = ["Start vLLM with a larger --max-lora-rank"]
        return VllmError(f"vLLM answers {status}: {message}", code="vllm_refused", suggestions=advice)


def _message(answer: Mapping[str, Any]) -> str:
    """Return what an error answer says, in one line that ends with a full stop."""
    error = answer.get("error")
    text = error.get("message") if isinstance(error, dict) else error or answer.get("detail") or answer.get("text")
    return f"{sanitize(str(text or 'no reason'), limit=250).rstrip('.')}."


@contextmanager
def _errors(address: str) -> Iterator[None]:
    import httpx  # noqa: PLC0415 -- not at the server's start

    try:
        yield
    except httpx.TimeoutException as error:
        raise VllmError(f"vLLM at {address} did not answer in time.", code="vllm_timeout") from error
    except httpx.ConnectError as error:
        raise VllmError(f"vLLM does not run at {address}.", code="vllm_unreachable") from error
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise VllmError(f"What runs at {address} does not answer as vLLM does.", code="vllm_unreachable") from error


def key_from_environment() -> str | None:
    """Return the key that vLLM itself reads from the environment."""
    return os.environ.get("VLLM_API_KEY") or None
