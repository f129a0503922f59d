"""llama.cpp inside this process, with one base model and any number of adapters.

The package `xllamacpp` contains llama-server. Its HTTP server cannot be switched off: it gets a random key, a free port of
127.0.0.1 and no other origin; requests do not use it. Adapters are given at the start only.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from peft_core.errors import InferenceError, sanitize
from peft_core.schemas.base_model import Base
from peft_core.system.machine import usable_cores

SMALL_PARAMETERS = 500_000_000  # up to here one thread is as fast as two, and much faster on a busy machine
BATCH = 512  # tokens of a prompt between two reports of progress

OnChunk = Callable[[Mapping[str, Any]], bool]
"""Takes a part of an answer; returns whether to end the generation."""


def threads_for(base: Base) -> int:
    """Return the number of threads that computes fastest for a base model of this size."""
    return 1 if base.shape.parameters <= SMALL_PARAMETERS else usable_cores()


class LlamaServer:
    """A running llama.cpp. Dropping the last reference to it ends it and frees its memory."""

    def __init__(
        self, model: Path, adapters: Sequence[Path], *, context: int, threads: int, slots: int = 1, exact: bool = False
    ) -> None:
        """Load the files.

        Args:
            model: The base model, as one GGUF file or the first of several.
            adapters: LoRA files for it. A request chooses one by its position.
            context: Tokens of a conversation, prompt and answer together, in each slot.
            threads: Number of threads.
            slots: Requests that are computed side by side.
            exact: Keep keys and values in F32, and no prompt of an earlier request.

        Raises:
            InferenceError: llama.cpp refuses a file.
        """
        import xllamacpp  # noqa: PLC0415 -- an optional package

        params = xllamacpp.CommonParams()
        params.model.path = str(model)
        params.lora_adapters = [_adapter(xllamacpp, path) for path in adapters]
        params.n_parallel, params.n_ctx, params.kv_unified = slots, slots * context, False
        params.n_batch = params.n_ubatch = BATCH
        params.n_gpu_layers = 0
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
        params.warmup = params.fit_params = params.ui = False
        params.offline, params.verbosity = True, 1
        if exact:
            params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        params.cache_ram_mib = 0
        params.port, params.hostnames = 0, ["127.0.0.1"]
        params.api_keys, params.cors_origins = [secrets.token_urlsafe(32)], "http://127.0.0.1"
        try:
            self._server = xllamacpp.Server(params)
        except Exception as error:  # the binding raises bare RuntimeError, ValueError or Exception
            raise InferenceError(
                f"llama.cpp refuses the files: {sanitize(error)}.",
                code="llamacpp_refused",
                suggestions=["The reason is in the log of the inference process"],
            ) from error
        self._adapters = len(adapters)

    def complete(self, question: Mapping[str, Any], adapter: int | None) -> Mapping[str, Any]:
        """Return the whole answer to a request in the form of OpenAI's completions.

        Args:
            question: The request; the prompt is a list of tokens.
            adapter: Position of the adapter to use. None: the base model.
        """
        answer: Mapping[str, Any] = self._server.handle_completions(self._request(question, adapter))
        return answer

    def stream(self, question: Mapping[str, Any], adapter: int | None, on_chunk: OnChunk) -> None:
        """Pass on each part of an answer as it comes, and reports of progress while a prompt is read. See `complete`."""
        failure: list[BaseException] = []

        def guarded(chunk: Mapping[str, Any]) -> bool:
            try:
                return on_chunk(chunk)
            except BaseException as error:  # noqa: BLE001 -- the binding would swallow it
                failure.append(error)
                return True

        streamed = {**question, "stream": True, "return_progress": True, "timings_per_token": True}
        self._server.handle_completions(self._request(streamed, adapter), guarded)
        if failure:
            raise failure[0]

    def _request(self, question: Mapping[str, Any], adapter: int | None) -> dict[str, Any]:
        """Name every adapter with its scale: one that is not named keeps the scale of an earlier request, or of the start."""
        scales = [{"id": number, "scale": float(number == adapter)} for number in range(self._adapters)]
        return {**question, "lora": scales} if scales else dict(question)


def _adapter(xllamacpp: Any, path: Path) -> Any:
    adapter = xllamacpp.CommonAdapterLoraInfo()
    adapter.path, adapter.scale = str(path), 1.0
    return adapter
