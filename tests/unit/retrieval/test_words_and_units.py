"""The words of code, and units from training examples."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from peft_core.base_models.families import FIM_TOKENS
from peft_core.data.augment import ExampleFormat, reformat_example
from peft_core.data.token_counter import EstimatedTokenCounter
from peft_core.retrieval.units import CodeUnit, units_of
from peft_core.retrieval.words import MAX_WORD, words
from peft_core.schemas.dataset import Example, FillInTheMiddle, Segment
from peft_core.schemas.training import TaskMixture

CODE = '''def load(path, strict):
    """Read a configuration file from the given path."""
    values = parse(path.read_text(), comments=True)
    if strict and values.unknown:
        raise ValueError(f"unknown: {values.unknown}")
    return values
'''


def example_of(text: str, **changes: object) -> Example:
    header = Segment(text="# a/b.py\n", learn=False, literal=True)
    fields = {"path": "a/b.py", "language": "python", "kind": "function", "start_line": 7, "end_line": 12, **changes}
    return Example.model_validate({"segments": (header, Segment(text=text, literal=True)), **fields})


def test_an_identifier_is_found_as_a_whole_and_by_its_parts() -> None:
    assert words("HTTPClient.send_all(x)") == ["httpclient", "http", "client", "send_all", "send", "all", "x"]
    assert words("__init__ 42") == ["init"]


@given(st.text(max_size=200))
def test_words_are_lower_case_and_occur_in_the_text(text: str) -> None:
    for word in words(text):
        assert word == word.lower()
        assert word in text.lower()


def test_a_long_run_of_letters_is_not_a_word() -> None:
    assert words("a" * (MAX_WORD + 1) + " b") == ["b"]


@pytest.mark.parametrize("tokens", FIM_TOKENS, ids=lambda tokens: tokens.prefix)
@pytest.mark.parametrize("seed", range(5))
def test_a_unit_is_the_code_of_the_file_in_whichever_format_it_was_trained_on(
    tokens: FillInTheMiddle, seed: int
) -> None:
    class Coder(EstimatedTokenCounter):
        fill_in_the_middle = tokens

    example, drawn = reformat_example(
        example_of(CODE), TaskMixture(fill_in_the_middle=1), Coder(), max_length=512, seed=seed
    )
    assert drawn is ExampleFormat.FILL_IN_THE_MIDDLE
    assert units_of([example], FIM_TOKENS) == [CodeUnit("a/b.py", "python", 7, 12, CODE)]


def test_an_instruction_gives_its_answer_as_a_unit() -> None:
    example, drawn = reformat_example(
        example_of(CODE), TaskMixture(instructions=1), EstimatedTokenCounter(), max_length=512, seed=0
    )
    assert drawn is ExampleFormat.INSTRUCTION
    (unit,) = units_of([example], FIM_TOKENS)
    assert unit.text == CODE.rstrip("\n")


def test_records_and_repeated_texts_are_not_units() -> None:
    record = Example(segments=(Segment(text="Question"),), path="record 3", language="text", kind="record")
    assert units_of([record], FIM_TOKENS) == []
    assert len(units_of([example_of(CODE), example_of(CODE, path="a/copy.py")], FIM_TOKENS)) == 1
