"""Positions at which retrieved code is compared with the adapter: nothing that is measured is seen or searched for."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from peft_core.base_models.tokenizer import BaseTokenizer, load_tokenizer
from peft_core.evaluation.columns import MIN_POSITIONS
from peft_core.evaluation.worker.retrieved import Positions, choose_positions
from peft_core.schemas.dataset import Example, HeldOutFile, Segment
from tests.tiny_models import VOCABULARY, write_tiny_base

LENGTH = 400  # tokens, which are characters


def body(name: str) -> list[str]:
    return [f"def {name}(value):\n", "    start = 1\n", *(f"    {name}_{row} = value\n" for row in range(6)), "\n"]


def held_out(number: int) -> HeldOutFile:
    lines = ["import os\n", "import sys\n", "\n", *body(f"f{number}"), *body(f"g{number}")]
    return HeldOutFile(path=f"h{number}.py", language="python", text="".join(lines), rows=((3, 11), (12, 20)))


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> BaseTokenizer:
    return load_tokenizer(write_tiny_base(tmp_path_factory.mktemp("base")))


@pytest.fixture(scope="module")
def code(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("code") / "train.jsonl"
    example = Example(
        segments=(Segment(text="def start(value): ...\n", literal=True),),
        path="trained.py",
        language="python",
        kind="function",
        start_line=1,
    )
    path.write_text(f"{example.model_dump_json()}\n")
    return path


def text_of(ids: Sequence[int]) -> str:
    return "".join(VOCABULARY[token] for token in ids)


def chosen(tokenizer: BaseTokenizer, code: Path, *, files: int = 5, budget: int = 10**6) -> Positions:
    return choose_positions(
        [held_out(number) for number in range(files)], [code], tokenizer, length=LENGTH, budget=budget, seed=0
    )


def test_what_is_measured_comes_after_all_that_is_seen(tokenizer: BaseTokenizer, code: Path) -> None:
    positions = chosen(tokenizer, code)
    assert len(positions.plain) == 10
    for example in positions.plain:
        ids = example.document.ids_T.tolist()
        seen = [token for token, learn in zip(ids, example.document.learn_T.tolist(), strict=True) if not learn]
        measured = text_of(ids[len(seen) :])
        assert ids[: len(seen)] == seen
        assert text_of(seen[len(tokenizer.beginning) :]).startswith(f"# {example.example.path}\n")
        assert text_of(seen).endswith("start = 1\n")
        assert measured.startswith("    ")
        assert "def" not in measured
        assert len(ids) - len(seen) <= 0.2 * LENGTH
        texts = [text_of(ids[line.first : line.last]).strip() for line in example.lines]
        assert texts == [line.strip() for line in measured.splitlines() if line.strip()]


def test_columns_measure_the_same_tokens_behind_training_code(tokenizer: BaseTokenizer, code: Path) -> None:
    positions = chosen(tokenizer, code)
    for plain, retrieved in zip(positions.plain, positions.retrieved, strict=True):
        assert plain.document.targets == retrieved.document.targets
        own, behind = plain.document.ids_T.tolist(), retrieved.document.ids_T.tolist()
        size = len(tokenizer.beginning)
        assert behind[len(behind) - len(own) + size :] == own[size:]
        context = text_of(behind[size : size + len(behind) - len(own)])
        assert context == "# trained.py\n# def start(value): ...\n\n"
        shift = len(behind) - len(own)
        assert [line.first + shift for line in plain.lines] == [line.first for line in retrieved.lines]


def test_the_budget_limits_positions_and_files_take_turns(tokenizer: BaseTokenizer, code: Path) -> None:
    positions = chosen(tokenizer, code, budget=round(1.5 * LENGTH * MIN_POSITIONS))
    assert len({example.example.path for example in positions.plain}) == len(positions.plain) == MIN_POSITIONS
    assert positions.tokens <= 1.5 * LENGTH * MIN_POSITIONS


def test_too_few_positions_are_counted_and_none_is_measured(tokenizer: BaseTokenizer, code: Path) -> None:
    small = chosen(tokenizer, code, files=2)
    assert (small.plain, small.retrieved) == ((), ())
    assert "there are 4 positions in the held-out files" in small.note
    assert f"{MIN_POSITIONS} are needed" in small.note
    assert chosen(tokenizer, code, files=0) == Positions()
