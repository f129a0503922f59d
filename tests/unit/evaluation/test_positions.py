"""Which positions of a file are measured, and what counts as right there."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from peft_core.data.languages import language_named
from peft_core.data.name_uses import read_syntax
from peft_core.evaluation.worker.names import invents_name, project_names
from peft_core.evaluation.worker.positions import Target, find_targets
from peft_core.schemas.dataset import CodeNames, HeldOutFile
from peft_core.schemas.evaluation import InFileMetric

TEXT = """import json

def read_units(path):
    if path.exists():
        for line in path.open():
            yield json.loads(line)
    return make_unit(path)  # make_unit

def other_units(path):
    return make_unit(path)
"""


def targets_of(text: str, rows: tuple[tuple[int, int], ...], *names: str) -> list[Target]:
    file = HeldOutFile(path="a.py", language="python", text=text, rows=rows)
    characters = [(at, at + 1) for at in range(len(text))]
    return find_targets(file, characters, read_syntax(text, language_named("python")), frozenset(names))


def written(target: Target, text: str = TEXT) -> str:
    return text[target.first : target.last]


def test_only_held_out_rows_are_measured() -> None:
    assert {target.row for target in targets_of(TEXT, ((2, 7),), "make_unit")} == {2, 3, 4, 5, 6}
    assert targets_of(TEXT, ()) == []


def test_lines_that_use_a_name_of_the_project_and_first_lines_of_blocks_are_marked() -> None:
    targets = targets_of(TEXT, ((0, 10),), "make_unit", "read_units")
    rows = {metric: [t.row for t in targets if metric in t.metrics] for metric in InFileMetric}
    assert rows[InFileMetric.LINES] == [2, 3, 4, 5, 6, 8, 9]
    assert rows[InFileMetric.PROJECT_LINES] == [6, 9], "a definition is no use, and a comment neither"
    assert rows[InFileMetric.BLOCK_STARTS] == [3, 4, 5, 9]
    assert rows[InFileMetric.PROJECT_NAMES] == [6, 9]
    assert {written(target) for target in targets if target.is_name} == {"make_unit"}


def test_a_brace_opens_no_block_in_python() -> None:
    text = "x = {\n    'first': 1,\n    name: 2222,\n}\nwhile x:  # comment\n    step_one()\n"
    assert [t.row for t in targets_of(text, ((0, 6),)) if InFileMetric.BLOCK_STARTS in t.metrics] == [5]


def test_prose_neither_opens_a_block_nor_is_its_first_line() -> None:
    text = """def total(parts):
    '''Add them up.

    Args:
        parts: The numbers to add up.
    '''
    # This is what counts:
        # indented further
    return sum(parts)
"""
    assert [t.row for t in targets_of(text, ((0, 9),)) if InFileMetric.BLOCK_STARTS in t.metrics] == [8]


def test_names_of_other_code_are_no_names_of_the_project() -> None:
    names = CodeNames(defined=frozenset({"ValueError", "isinstance", "OrderBook"}), used=frozenset())
    assert project_names(names) == {"OrderBook"}


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_rows_are_counted_as_editors_count_them(end: str) -> None:
    text = end.join(["a = 1\f", "b = 'x\u2028y'", "total = make_unit(a)", ""])
    (name,) = [target for target in targets_of(text, ((2, 3),), "make_unit") if target.is_name]
    assert (name.row, written(name, text)) == (2, "make_unit")


@given(st.lists(st.sampled_from(TEXT.splitlines(keepends=True))).map("".join), st.integers(0, 5), st.integers(0, 9))
def test_targets_lie_in_their_rows_and_in_order(text: str, start: int, size: int) -> None:
    targets = targets_of(text, ((start, start + size),), "make_unit")
    rows = text.splitlines()
    assert targets == sorted(targets, key=lambda target: (target.first, target.last))
    for target in targets:
        assert start <= target.row < start + size
        assert written(target, text) in rows[target.row]
        assert target.stop <= len(text)


@pytest.mark.parametrize(
    ("completion", "invents"),
    [
        ("order.close_all()\n", False),
        ("order.cancel_everything()\n", True),
        ("    # order.cancel_everything()\n    x = 'a.bad_name()'\n", False),
        ("name.strip().split(',')\n", False),
        ("order.from_prompt()\n", False),
        ("order.cut_of", False),
        ("def new_helper(order):\n", False),
        ("self->no_such_field = 1;\n", True),
        ("order.db.close_all().T\n", False),
    ],
)
def test_a_name_is_invented_if_neither_project_nor_prompt_nor_python_has_it(completion: str, invents: bool) -> None:
    assert invents_name(completion, "x = order.from_prompt()", {"order", "close_all"}) is invents
