"""A base model in llama.cpp, with adapters as LoRA files: in F16, where it generates the same text as PEFT in float32.

llama.cpp takes adapters only when it starts, so an additional one starts it anew beside the old one; both map the same file of
weights. Prompts are encoded here, with the tokenizer of the training.
"""

from __future__ import annotations

import itertools
import math
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from peft_core.adapters.files import AdapterFiles
from peft_core.base_models.tokenizer import BaseTokenizer, load_tokenizer, require_rows
from peft_core.errors import InferenceError
from peft_core.inference.worker.models import Completion, EncodedPrompt, OnToken, first_stop
from peft_core.llamacpp.worker.base_file import base_in_f16
from peft_core.llamacpp.worker.gguf_lora import write_gguf_lora
from peft_core.llamacpp.worker.lora_pairs import Lora, read_lora
from peft_core.llamacpp.worker.server import LlamaServer, threads_for
from peft_core.modeling.adapter_model import PROBE, require_effect
from peft_core.modeling.convert import ensure_hf_directory
from peft_core.schemas.base_model import Base
from peft_core.schemas.generation import Engine, GenerationRequest
from peft_core.schemas.results import LoadCheck

MAX_CONTEXT = 8192  # tokens: the cache of keys and values is allocated when llama.cpp starts
_GREEDY_BELOW = 0.01  # temperature, as in torch_model
_PROBE_TOKENS = 24
_PROBE_TOP = 200  # the likeliest next tokens whose log-probabilities are compared

_names = (f"adapter_{number}" for number in itertools.count())


class LlamaModel:
    """A `LoadedModel` in llama.cpp."""

    def __init__(self, base: Base, tokenizer: BaseTokenizer, files: tuple[Path, Path], engine_reason: str) -> None:
        """Start llama.cpp without adapters. `files`: the base model in F16, and the directory of its tokenizer.

        Raises:
            InferenceError: llama.cpp refuses the file.
        """
        self.base = base
        self.tokenizer = tokenizer
        self.engine_reason = engine_reason
        self.files = files
        self._loras: dict[str, Lora] = {}
        self._positions: dict[str, int] = {}  # in the running server, which may have removed ones too
        self._selected: str | None = None
        self._server = self._start({})

    @classmethod
    def load(cls, base: Base, base_models_dir: Path, engine_reason: str, say: Callable[[str], None]) -> LlamaModel:
        """Load a base model, which is written in F16 first if that was not done before.

        Raises:
            StorageError: There is no space for the file.
            InferenceError: llama.cpp refuses it.
        """
        # kill-point: inference worker, load_adapter: llama.cpp's file of the base model is about to be looked for
        file = base_in_f16(base, base_models_dir, say)
        directory = ensure_hf_directory(base, base_models_dir, say)
        tokenizer = load_tokenizer(directory)
        require_rows(tokenizer, base)
        return cls(base, tokenizer, (file, directory), engine_reason)

    @property
    def engine(self) -> Engine:
        return "llamacpp"

    @property
    def context_length(self) -> int:
        return min(self.base.shape.context_length, MAX_CONTEXT)

    def add(self, files: AdapterFiles) -> tuple[str, LoadCheck]:
        """See `LoadedModel.add`. The probe is a position of a fixed text, and its likeliest tokens with and without adapter."""
        name = next(_names)
        loras = {**self._loras, name: read_lora(files)}
        server = self._start(loras)
        position = len(loras) - 1
        change = _largest_change(self._probe(server, position), self._probe(server, None))
        require_effect(0, change)  # llama.cpp refuses tensors that it does not know
        self._server, self._loras = server, loras
        self._positions = {name: number for number, name in enumerate(loras)}
        self._selected = name
        return name, LoadCheck(unmatched_keys=0, max_logit_change=change)

    def select(self, name: str | None) -> None:
        self._selected = name

    def remove(self, name: str) -> None:
        """See `LoadedModel.remove`. Its memory is freed when llama.cpp starts the next time."""
        self._loras.pop(name, None)
        self._positions.pop(name, None)
        self._selected = None

    def complete(self, prompt: EncodedPrompt, request: GenerationRequest, on_token: OnToken) -> Completion:
        text, tokens, finish_reason = "", 0, "length"

        def on_chunk(chunk: Mapping[str, Any]) -> bool:
            nonlocal text, tokens, finish_reason
            choice = _choice(chunk)
            text += choice["text"]
            tokens = int(chunk.get("timings", {}).get("predicted_n", tokens))
            finish_reason = choice["finish_reason"] or finish_reason
            # kill-point: inference worker, generate: tokens are being generated (pass 3)
            on_token(tokens, lambda: text)
            return first_stop(text, request.stop) is not None

        question = self._question(prompt, request)
        self._server.stream(question, None if self._selected is None else self._positions[self._selected], on_chunk)
        stop_at = first_stop(text, request.stop)
        ended = stop_at is not None or finish_reason == "stop"
        return Completion(text[:stop_at], tokens, "stop" if ended else "length")

    def _question(self, prompt: EncodedPrompt, request: GenerationRequest) -> dict[str, Any]:
        """Return the request to llama.cpp. Every sampling setting is given: the file of a base model may contain others."""
        greedy = request.temperature < _GREEDY_BELOW
        return {
            "prompt": prompt.ids,
            "max_tokens": min(request.max_new_tokens, self.context_length - len(prompt.ids)),
            "temperature": 0.0 if greedy else request.temperature,
            "top_p": request.top_p,
            "samplers": ["temperature"] if greedy else ["temperature", "top_p"],
            "repeat_penalty": 1.0,
            "seed": request.seed,
            "cache_prompt": True,  # for the same adapter only
        }

    def _start(self, loras: Mapping[str, Lora]) -> LlamaServer:
        # kill-point: inference worker, load_adapter: llama.cpp is about to be started
        with tempfile.TemporaryDirectory(prefix="peft-mcp-lora-") as directory:  # read at the start, then not needed
            paths = [Path(directory, f"{name}.gguf") for name in loras]
            for path, lora in zip(paths, loras.values(), strict=True):
                write_gguf_lora(lora, self.base, path)
            return LlamaServer(self.files[0], paths, context=self.context_length, threads=threads_for(self.base))

    def _probe(self, server: LlamaServer, adapter: int | None) -> Mapping[int, float]:
        """Return log-probabilities of the likeliest tokens after a fixed text."""
        ids = self.tokenizer.ids(PROBE)[:_PROBE_TOKENS]
        question = {"prompt": ids, "max_tokens": 1, "temperature": 0, "logprobs": _PROBE_TOP, "cache_prompt": False}
        choice = _choice(server.complete(question, adapter))
        top = choice["logprobs"]["content"][0]["top_logprobs"]
        return {
            entry["id"]: float(entry["logprob"]) if entry["logprob"] is not None else math.nan  # JSON has no NaN
            for entry in top
        }


def _largest_change(one: Mapping[int, float], other: Mapping[int, float]) -> float:
    """Return the largest difference of a log-probability, from below: of an unlisted token it is at most the smallest listed.

    NaN if one of them is.
    """
    values = (*one.values(), *other.values())
    if not one or not other or any(map(math.isnan, values)):
        return math.nan
    smallest = min(one.values()), min(other.values())
    return max(abs(one.get(token, smallest[0]) - other.get(token, smallest[1])) for token in one.keys() | other.keys())


def _choice(answer: Mapping[str, Any]) -> Mapping[str, Any]:
    if "choices" not in answer:
        raise InferenceError(f"llama.cpp could not answer: {answer.get('error', answer)}.", code="llamacpp_failed")
    choice: Mapping[str, Any] = answer["choices"][0]
    return choice
