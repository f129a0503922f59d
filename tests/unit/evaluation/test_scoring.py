"""What is asked of base and adapter on an example."""

from __future__ import annotations

from pathlib import Path

import pytest

from peft_core.evaluation.worker.scoring import HeldOutExample, held_out_examples_of
from peft_core.modeling.tokenizer import BaseTokenizer, load_tokenizer
from peft_core.schemas.dataset import Example, Segment
from tests.tiny_models import write_tiny_tokenizer

CODE = "def total(items):\n    first = 1\n    second = 2\n    third = 3\n    fourth = 4\n    fifth = 5\n"


@pytest.fixture
def tokenizer(tmp_path: Path) -> BaseTokenizer:
    write_tiny_tokenizer(tmp_path)
    return load_tokenizer(tmp_path)


def trial_of(tokenizer: BaseTokenizer, *, ends: bool) -> HeldOutExample:
    example = Example(segments=(Segment(text=CODE),), path="a.py", language="python", kind="function", ends=ends)
    (trial,) = held_out_examples_of([example], tokenizer, 512)
    return trial


def test_nobody_is_asked_to_write_what_is_not_known(tokenizer: BaseTokenizer) -> None:
    whole, part = trial_of(tokenizer, ends=True), trial_of(tokenizer, ends=False)
    assert [cut.expected.count("\n") for cut in whole.cuts] == [3, 2, 1]
    assert [cut.expected.count("\n") for cut in part.cuts] == [3]


def test_the_last_line_of_a_text_that_breaks_off_counts(tokenizer: BaseTokenizer) -> None:
    assert trial_of(tokenizer, ends=False).lines == trial_of(tokenizer, ends=True).lines
