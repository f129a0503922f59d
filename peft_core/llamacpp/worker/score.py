"""Log-probabilities that llama.cpp computes from a file: a `LlamaRequest` (JSON) in, `LlamaScores` or an ErrorInfo out.

llama.cpp runs inside this process, which is a child of the export worker: a file that crashes it ends nothing else. By hand:
`python -m peft_core.llamacpp.worker.score < request.json`.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from peft_core.errors import ExportError, InferenceError, sanitize
from peft_core.llamacpp.runtime import runtime_name
from peft_core.llamacpp.worker.server import LlamaServer
from peft_core.schemas.frozen import FrozenModel
from peft_core.system.child_process import answer_request
from peft_core.system.failures import TaskKind

TASK = TaskKind(
    name="comparison in llama.cpp",
    crash_code="llamacpp_failed",
    log="the log of the export",
    memory_advice=("Close other programs, or export with verification on a machine with more memory.",),
)
_FORCE = (
    1e6  # added to a logit so that the next token of the text is chosen; reported log-probabilities are those before
)
_SLACK = 16  # positions of a slot beyond the longest document


class LlamaRequest(FrozenModel):
    model: Path
    lora: Path | None  # None: the model alone
    documents: tuple[tuple[int, ...], ...]  # token ids
    top: int  # the likeliest tokens of each position that are returned
    threads: int


class Position(FrozenModel):
    """What the model says about the token that follows a prefix."""

    target: float  # log-probability of the document's next token
    ids: tuple[int, ...]
    log_probs: tuple[float, ...]


class LlamaScores(FrozenModel):
    """For each document, its positions 1, 2, ...; the prefix of position n has n tokens."""

    with_adapter: tuple[tuple[Position, ...], ...]
    without_adapter: tuple[tuple[Position, ...], ...] | None  # None: there is no adapter in the request
    runtime: str


def score(request: LlamaRequest) -> LlamaScores:
    """Load the file and ask for the log-probabilities at every position of the documents.

    Raises:
        ExportError: llama.cpp refuses the file.
    """
    try:
        server = LlamaServer(
            request.model,
            [] if request.lora is None else [request.lora],
            context=max(map(len, request.documents)) + _SLACK,
            threads=request.threads,
            slots=len(request.documents),
            exact=True,
        )
    except InferenceError as error:
        raise ExportError(error.message, code="export_not_loadable") from error
    with_adapter = _score_all(server, request, None if request.lora is None else 0)
    without = _score_all(server, request, None) if request.lora is not None else None
    return LlamaScores(with_adapter=with_adapter, without_adapter=without, runtime=runtime_name())


def _score_all(server: LlamaServer, request: LlamaRequest, adapter: int | None) -> tuple[tuple[Position, ...], ...]:
    """Score the documents side by side, each in a slot of its own: llama.cpp computes them as one batch."""

    def one(slot: int) -> tuple[Position, ...]:
        document = request.documents[slot]
        return tuple(_ask(server, request, document[:n], document[n], slot, adapter) for n in range(1, len(document)))

    with ThreadPoolExecutor(len(request.documents)) as threads:
        return tuple(threads.map(one, range(len(request.documents))))


def _ask(
    server: LlamaServer, request: LlamaRequest, prefix: Sequence[int], target: int, slot: int, adapter: int | None
) -> Position:
    question: dict[str, Any] = {
        "prompt": list(prefix),
        "max_tokens": 1,
        "temperature": 0,
        "cache_prompt": True,  # of this slot alone, and only for the same adapter
        "id_slot": slot,
        "logprobs": request.top,
        "logit_bias": [[target, _FORCE]],
    }
    answer = server.complete(question, adapter)
    try:
        token = answer["choices"][0]["logprobs"]["content"][0]
        top = token["top_logprobs"]
        if token["id"] != target:
            raise ExportError(f"llama.cpp chose token {token['id']} where {target} was forced.")
    except (KeyError, IndexError, TypeError) as error:
        raise ExportError(f"llama.cpp answered without log-probabilities: {sanitize(answer)}.") from error
    return Position(
        target=_number(token["logprob"]),
        ids=tuple(entry["id"] for entry in top),
        log_probs=tuple(_number(entry["logprob"]) for entry in top),
    )


def _number(value: object) -> float:
    return float(value) if isinstance(value, int | float) else float("nan")  # JSON has no NaN: llama.cpp writes null


if __name__ == "__main__":
    sys.exit(answer_request(LlamaRequest, score, TASK))
