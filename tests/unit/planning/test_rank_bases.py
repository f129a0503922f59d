"""Properties of the ranking of base models, whatever they are."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from peft_core.planning.rank_bases import ENOUGH_STEPS, Candidate, is_clearly_better, is_code_model, rank

CODER = Candidate(
    name="ollama:coder:0.5b",
    model="coder",
    is_code_model=True,
    fills_in_middle=True,
    parameters=500_000_000,
    bits_per_weight=16.0,
    fits_now=True,
    sees_everything=True,
    steps=225,
)
CHAT = replace(CODER, name="bundled", model="chat", is_code_model=False, fills_in_middle=False, parameters=135_000_000)


@st.composite
def distinct_candidates(draw: st.DrawFn) -> list[Candidate]:
    numbers = draw(st.integers(1, 8))
    return [
        Candidate(
            name=f"base-{number}",
            model=f"model-{draw(st.integers(0, 3))}",
            is_code_model=draw(st.booleans()),
            fills_in_middle=draw(st.booleans()),
            parameters=draw(st.sampled_from([135_000_000, 500_000_000, 7_000_000_000])),
            bits_per_weight=draw(st.sampled_from([4.5, 8.5, 16.0])),
            fits_now=draw(st.booleans()),
            sees_everything=draw(st.booleans()),
            steps=draw(st.sampled_from([1, ENOUGH_STEPS - 1, ENOUGH_STEPS, 5000])),
        )
        for number in range(numbers)
    ]


def names(groups: list[list[Candidate]]) -> list[list[str]]:
    return [[candidate.name for candidate in group] for group in groups]


@given(distinct_candidates(), st.randoms())
def test_the_order_in_which_bases_are_found_does_not_matter(candidates: list[Candidate], random: st.DataObject) -> None:
    shuffled = list(candidates)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    assert names(rank(shuffled)) == names(rank(candidates))


@given(distinct_candidates())
def test_each_base_is_ranked_once_beside_the_copies_of_its_model(candidates: list[Candidate]) -> None:
    groups = rank(candidates)
    assert sorted(name for group in names(groups) for name in group) == sorted(each.name for each in candidates)
    models = [{each.model for each in group} for group in groups]
    assert all(len(model) == 1 for model in models)
    assert len(groups) == len({each.model for each in candidates})


@given(distinct_candidates())
def test_the_first_can_be_trained_if_any_can_and_is_for_code_if_one_of_those_is(candidates: list[Candidate]) -> None:
    first = rank(candidates)[0][0]
    possible = [each for each in candidates if each.fits_now and each.is_trained_enough]
    if possible:
        assert first in possible
        assert first.kind == max(each.kind for each in possible)
        assert first.parameters == max(each.parameters for each in possible if each.kind == first.kind)


@given(distinct_candidates(), st.data())
def test_removing_another_base_does_not_change_the_first(candidates: list[Candidate], data: st.DataObject) -> None:
    first = rank(candidates)[0][0]
    others = [each for each in candidates if each != first]
    kept = data.draw(st.lists(st.sampled_from(others), unique_by=lambda each: each.name)) if others else []
    assert rank([*kept, first])[0][0] == first


@given(distinct_candidates())
def test_a_base_that_improves_never_falls(candidates: list[Candidate]) -> None:
    first, *rest = (replace(each, model=each.name) for each in candidates)
    better = replace(first, fits_now=True, sees_everything=True, is_code_model=True, fills_in_middle=True)

    def place(candidate: Candidate) -> int:
        return [group[0].name for group in rank([candidate, *rest])].index(candidate.name)

    assert place(better) <= place(first)


def test_of_several_copies_the_most_precise_is_recommended() -> None:
    copies = [replace(CODER, name="q4", bits_per_weight=4.5), replace(CODER, name="bf16", bits_per_weight=16.0)]
    assert names(rank(copies)) == [["bf16", "q4"]]


def test_a_large_model_for_code_that_is_hardly_trained_comes_after_a_chat_model() -> None:
    slow = replace(
        CODER, model="7b", name="7b", parameters=7_000_000_000, sees_everything=False, steps=ENOUGH_STEPS - 1
    )
    assert [group[0] for group in rank([slow, CHAT, CODER])] == [CODER, CHAT, slow]


@pytest.mark.parametrize(
    "change",
    [
        {"fits_now": False},
        {"sees_everything": False, "steps": 5},
        {"is_code_model": False},
        {"fills_in_middle": False},
    ],
)
def test_a_base_is_clearly_better_only_if_nothing_speaks_against_it(change: dict[str, bool]) -> None:
    assert is_clearly_better(CODER, CHAT)
    assert not is_clearly_better(replace(CODER, **change), CHAT)  # type: ignore[arg-type]


def test_size_alone_is_not_clearly_better_and_nothing_is_than_a_model_for_code() -> None:
    assert not is_clearly_better(replace(CHAT, parameters=7_000_000_000), CHAT)
    assert not is_clearly_better(CODER, replace(CODER, parameters=100_000_000))


@pytest.mark.parametrize(
    "name",
    [
        "qwen2.5-coder:0.5b",
        "Qwen/Qwen2.5-Coder-1.5B-Instruct",
        "Qwen2.5 Coder 7B",
        "bigcode/starcoder2-3b",
        "bigcode/tiny_starcoder_py",
        "deepseek-ai/deepseek-coder-1.3b-base",
        "codellama:7b-code",
        "google/codegemma-2b",
        "Salesforce/codegen-350M-mono",
        "codestral:22b",
        "JetBrains/Mellum-4b-base",
        "ibm-granite/granite-3b-code-base",
        "01-ai/Yi-Coder-1.5B",
        "opencoder-1.5b",
        "stable-code:3b",
    ],
)
def test_models_for_code_are_known_by_their_names(name: str) -> None:
    assert is_code_model(name)


@pytest.mark.parametrize(
    "name",
    [
        "SmolLM2-135M-Instruct",
        "llama3.2:1b",
        "org/encoder-decoder-small",
        "google/flan-t5",
        "encoded-1b",
        "gemma3:270m",
    ],
)
def test_other_models_are_not(name: str) -> None:
    assert not is_code_model(name)
