"""Which lines and completions of an example are scored."""

from __future__ import annotations

from pathlib import Path

import pytest

from peft_core.base_models.tokenizer import BaseTokenizer, load_tokenizer
from peft_core.evaluation.worker.scoring import HeldOutExample, make_held_out_examples
from peft_core.schemas.dataset import Example, Segment
from tests.tiny_models import write_tiny_tokenizer

CODE = "def total(items):\n    first = 1\n    second = 2\n    third = 3\n    fourth = 4\n    fifth = 5\n"


@pytest.fixture
def tokenizer(tmp_path: Path) -> BaseTokenizer:
    write_tiny_tokenizer(tmp_path)
    return load_tokenizer(tmp_path)


def make_example(tokenizer: BaseTokenizer, *, ends: bool) -> HeldOutExample:
    example = Example(segments=(Segment(text=CODE),), path="a.py", language="python", kind="function", ends=ends)
    (held_out,) = make_held_out_examples([example], tokenizer, 512)
    return held_out


def test_completion_points_near_the_end_of_a_cut_off_text_are_skipped(tokenizer: BaseTokenizer) -> None:
    complete, cut_off = make_example(tokenizer, ends=True), make_example(tokenizer, ends=False)
    assert [point.expected.count("\n") for point in complete.completion_points] == [3, 2, 1]
    assert [point.expected.count("\n") for point in cut_off.completion_points] == [3]


def test_the_last_line_of_a_cut_off_text_is_scored(tokenizer: BaseTokenizer) -> None:
    assert make_example(tokenizer, ends=False).lines == make_example(tokenizer, ends=True).lines
