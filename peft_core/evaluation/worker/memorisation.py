"""How much of its training text a model repeats word for word.

A model continues the beginnings of units that the adapter was trained on, with greedy decoding, and what it writes is searched
in all training text. The base model does the same: what it repeats it knew before, or anyone could guess. The measure is
"extractable memorisation" (Carlini et al., arXiv 2202.07646): a prompt of the training set, and 50 tokens that follow.

B prompts, T tokens of training text, W written tokens
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager

import structlog
import torch
from transformers import PreTrainedModel

from peft_core.base_models.tokenizer import BaseTokenizer
from peft_core.evaluation.worker.greedy import write_greedily
from peft_core.modeling.batches import Document
from peft_core.planning.evaluation_budget import MEMORISED_TOKENS, MEMORY_PROMPT_TOKENS
from peft_core.schemas.evaluation import Memorisation, Repetition
from peft_core.system.cancellation import StopFlag

_LEARNED_PROMPT_TOKENS = 32  # of the unit itself
_BATCH_PROMPTS = 8
_CHUNK_TOKENS = 1 << 20  # of training text that is searched together
_MULTIPLIER = 6364136223846793005  # of a rolling hash modulo 2^64; odd

_log = structlog.get_logger(__name__)


def measure_memorisation(
    causal: PreTrainedModel,
    without_adapter: Callable[[], AbstractContextManager[object]],
    trained: Sequence[Document],
    tokenizer: BaseTokenizer,
    *,
    limit: int,
    seed: int,
    stop: StopFlag,
) -> Memorisation | None:
    """Let both models continue at most `limit` beginnings of training documents. None: there is no prompt.

    The adapter must be active, and fusion undone (`undo_fusion`).
    """
    prompts = choose_prompts(trained, tokenizer, limit, seed)
    if not prompts:
        return None
    with_adapter = _continue(causal, prompts, tokenizer, stop)
    with without_adapter():
        base = _continue(causal, prompts, tokenizer, stop)
    memorisation = Memorisation(
        prompts=len(prompts),
        tokens=MEMORISED_TOKENS,
        base=_repetition(base, trained, tokenizer),
        adapter=_repetition(with_adapter, trained, tokenizer),
    )
    _log.info("memorisation_measured", **memorisation.without_texts.model_dump())
    return memorisation


def choose_prompts(
    trained: Sequence[Document], tokenizer: BaseTokenizer, limit: int, seed: int
) -> list[tuple[int, ...]]:
    """Choose at most `limit` documents at random and return their beginnings.

    Each ends within the longest piece of the document that carries loss, and 50 more tokens of it follow.
    """
    order = list(range(len(trained)))
    random.Random(f"memorisation/{seed}").shuffle(order)  # noqa: S311 -- a sample, not a secret
    prompts: list[tuple[int, ...]] = []
    for index in order:
        if len(prompts) >= limit:
            break
        ids = trained[index].ids_T.tolist()
        first, last = _learned_piece(trained[index].learn_T.tolist())
        last -= ids[last - 1 : last] == [tokenizer.end_of_text]
        if last - first < _LEARNED_PROMPT_TOKENS + MEMORISED_TOKENS:
            continue
        prompt = ids[: first + _LEARNED_PROMPT_TOKENS]
        if len(prompt) > MEMORY_PROMPT_TOKENS:
            prompt = [*tokenizer.beginning, *prompt[-MEMORY_PROMPT_TOKENS:]]
        prompts.append(tuple(prompt))
    return prompts


def longest_runs(written: Sequence[Sequence[int]], trained: Sequence[Document]) -> list[tuple[int, int]]:
    """Return for each row of tokens the first and the number of tokens of its longest run that is in a trained document.

    A run of k+1 tokens begins where a run of k does, so the candidates become fewer with each token. Runs are compared by hash.
    """
    text_W = _joined([torch.tensor(row, dtype=torch.int64) for row in written], separator=-1)
    longest_W = torch.zeros_like(text_W)
    for documents in _chunks(trained):
        text_T = _joined([document.ids_T.long() for document in documents], separator=-2)
        start_W, start_T = torch.arange(len(text_W)), torch.arange(len(text_T))
        hash_W, hash_T, length = text_W.clone(), text_T.clone(), 0
        while (is_known := torch.isin(hash_W, hash_T)).any():
            start_W, hash_W, length = start_W[is_known], hash_W[is_known], length + 1
            longest_W[start_W] = longest_W[start_W].clamp(min=length)
            is_written = torch.isin(hash_T, hash_W)
            start_T, hash_T = start_T[is_written], hash_T[is_written]
            # Neither can begin beyond a separator, which is in the other text nowhere.
            hash_W = hash_W * _MULTIPLIER + text_W[start_W + length]
            hash_T = hash_T * _MULTIPLIER + text_T[start_T + length]
    runs = []
    for row in longest_W.split([len(row) + 1 for row in written]):
        start = int(row.argmax())
        runs.append((start, int(row[start])))
    return runs


def _repetition(written: Sequence[Sequence[int]], trained: Sequence[Document], tokenizer: BaseTokenizer) -> Repetition:
    runs = longest_runs(written, trained)
    row = max(range(len(runs)), key=lambda index: runs[index][1])
    start, length = runs[row]
    text = tokenizer.text(written[row][start : start + length])
    return Repetition(
        prompts=sum(length == MEMORISED_TOKENS for _, length in runs),
        longest_tokens=length,
        longest_lines=sum(bool(line.strip()) for line in text.splitlines()),
        text=text,
    )


def _learned_piece(learn: Sequence[bool]) -> tuple[int, int]:
    """Return where the longest piece with loss begins and ends."""
    best, first = (0, 0), 0
    for position, is_learned in enumerate([*learn, False]):
        if is_learned:
            continue
        best = max(best, (first, position), key=lambda piece: piece[1] - piece[0])
        first = position + 1
    return best


def _continue(
    causal: PreTrainedModel, prompts: Sequence[Sequence[int]], tokenizer: BaseTokenizer, stop: StopFlag
) -> list[list[int]]:
    """Write 50 tokens after each prompt, or fewer if the model ends the text."""
    positions = range(len(prompts))
    batches = [positions[first : first + _BATCH_PROMPTS] for first in range(0, len(prompts), _BATCH_PROMPTS)]
    ends = [tokenizer.end_of_text]
    written = write_greedily(causal, prompts, batches, max_new_tokens=MEMORISED_TOKENS, ends=ends, stop=stop)
    return [continuation.ids for continuation in written]


def _joined(texts: Sequence[torch.Tensor], *, separator: int) -> torch.Tensor:
    """Return the texts end to end, each followed by a separator."""
    mark = torch.tensor([separator])
    return torch.cat([part for text in texts for part in (text, mark)])


def _chunks(documents: Sequence[Document]) -> Iterator[list[Document]]:
    chunk: list[Document] = []
    tokens = 0
    for document in documents:
        chunk.append(document)
        tokens += len(document)
        if tokens >= _CHUNK_TOKENS:
            yield chunk
            chunk, tokens = [], 0
    if chunk:
        yield chunk
