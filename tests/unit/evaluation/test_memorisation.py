"""Which training text is asked for, and the search for it in what a model writes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from peft_core.base_models.tokenizer import BaseTokenizer, load_tokenizer
from peft_core.evaluation.worker import memorisation
from peft_core.evaluation.worker.memorisation import (
    choose_prompts,
    longest_runs,
)
from peft_core.modeling.batches import Document
from peft_core.planning.evaluation_budget import MEMORISED_TOKENS
from tests.tiny_models import write_tiny_tokenizer

TOKENS = st.lists(st.integers(0, 2), max_size=12)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> BaseTokenizer:
    directory = tmp_path_factory.mktemp("tokenizer")
    write_tiny_tokenizer(directory)
    return load_tokenizer(directory)


def document(ids: list[int], *, context: int = 1, end: bool = False) -> Document:
    ids = [*ids, 0] if end else ids
    learn_T = torch.ones(len(ids), dtype=torch.bool)
    learn_T[:context] = False
    return Document(ids_T=torch.tensor(ids, dtype=torch.int32), learn_T=learn_T)


def longest_by_trying(row: list[int], trained: list[list[int]]) -> int:
    known = {run for ids in trained for run in runs_of(ids)}
    return max((len(run) for run in runs_of(row) if run in known), default=0)


def runs_of(ids: list[int]) -> list[tuple[int, ...]]:
    return [tuple(ids[first:last]) for first in range(len(ids)) for last in range(first + 1, len(ids) + 1)]


@given(written=st.lists(TOKENS, min_size=1, max_size=4), trained=st.lists(TOKENS, min_size=1, max_size=4))
@pytest.mark.parametrize("chunk", [1, 1 << 20])
def test_the_longest_run_is_found_within_one_document(
    written: list[list[int]], trained: list[list[int]], chunk: int
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(memorisation, "_CHUNK_TOKENS", chunk)
        runs = longest_runs(written, [document(ids) for ids in trained])
    assert [length for _, length in runs] == [longest_by_trying(row, trained) for row in written]
    for row, (start, length) in zip(written, runs, strict=True):
        assert length == 0 or longest_by_trying(row[start : start + length], trained) == length


def test_a_prompt_ends_within_a_unit_of_which_fifty_more_tokens_follow(tokenizer: BaseTokenizer) -> None:
    header, unit = list(range(3, 13)), list(range(13, 95))
    assert len(unit) == 32 + MEMORISED_TOKENS
    exact, short = document(header + unit, context=10, end=True), document(header + unit[1:], context=10, end=True)
    assert choose_prompts([short, exact], tokenizer, 9, seed=0) == [tuple(header + unit[:32])]


def test_a_long_header_is_cut_to_its_end(tokenizer: BaseTokenizer) -> None:
    header, unit = [3] * 100, [4] * 90
    (prompt,) = choose_prompts([document(header + unit, context=100)], tokenizer, 9, seed=0)
    assert prompt == (*tokenizer.beginning, *[3] * 32, *[4] * 32)


def test_as_many_documents_are_asked_for_as_the_limit_allows(tokenizer: BaseTokenizer) -> None:
    documents = [document([3 + number] * 100) for number in range(20)]
    assert len(choose_prompts(documents, tokenizer, 5, seed=0)) == 5
    assert len(set(choose_prompts(documents, tokenizer, 99, seed=0))) == 20
