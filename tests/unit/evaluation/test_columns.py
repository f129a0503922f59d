"""The table of base model and adapter with and without retrieved code."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from peft_core.evaluation.columns import summarise_columns
from peft_core.evaluation.report import column_tables, render_report
from peft_core.evaluation.summary import ExampleScore, Scores
from peft_core.schemas.evaluation import ColumnName, Columns
from tests.factories import make_evaluation

FILES = 8


def of_files(losses: Sequence[float], lines: int = 2) -> tuple[ExampleScore, ...]:
    return tuple(
        ExampleScore(file=f"f{number}.py", tokens=100, total_lines=10, loss=100 * loss, lines=lines)
        for number, loss in enumerate(losses)
    )


def with_losses(base: float, base_retrieved: float, adapter: float, adapter_retrieved: float) -> Columns:
    def column(loss: float) -> tuple[ExampleScore, ...]:
        return of_files([loss + number / 100 for number in range(FILES)], lines=round(10 / (1 + loss)))

    columns = summarise_columns(
        Scores(held_out=(), plain=column(base), retrieved=column(base_retrieved)),
        Scores(held_out=(), plain=column(adapter), retrieved=column(adapter_retrieved)),
        note="",
    )
    assert columns is not None
    return columns


def test_the_lowest_loss_is_best_and_every_change_has_an_interval() -> None:
    columns = with_losses(2.05, 1.93, 1.72, 1.50)
    assert columns.best is ColumnName.ADAPTER_RETRIEVED
    assert [column.name for column in columns.columns] == list(ColumnName)
    base, *others = columns.columns
    assert base.loss_change is base.lines_change is None
    assert [column.loss_change.change for column in others if column.loss_change] == pytest.approx(
        [-0.12, -0.33, -0.55]
    )
    for column in others:
        assert column.loss_change is not None
        assert column.loss_change.low is not None
        assert column.loss_change.low <= column.loss_change.change
    assert (columns.positions, columns.files, columns.lines, columns.tokens) == (FILES, FILES, 10 * FILES, 100 * FILES)
    assert "the adapter with retrieved code has the lowest loss, 1.535; the adapter 1.755" in columns.text


def test_retrieval_alone_is_named_when_it_is_best() -> None:
    columns = with_losses(2.0, 1.6, 1.8, 1.7)
    assert columns.best is ColumnName.BASE_RETRIEVED
    assert "generate(use_base=true" in columns.text
    evaluation = make_evaluation(columns=columns)
    assert "the base model with retrieved code has a lower loss than the adapter" in evaluation.caveats[-1]


def test_too_little_data_does_not_make_the_base_model_as_good_as_the_adapter() -> None:
    noisy = [1.8 + (-1) ** number * number / 10 for number in range(FILES)]
    columns = summarise_columns(
        Scores(held_out=(), plain=of_files([2.5] * FILES), retrieved=of_files([2.4] * FILES)),
        Scores(held_out=(), plain=of_files([1.7] * FILES), retrieved=of_files(noisy)),
        note="",
    )
    assert columns is not None
    assert columns.best is ColumnName.ADAPTER
    assert "Its difference from the adapter with retrieved code may be chance." in columns.text


def test_too_few_positions_are_explained() -> None:
    assert summarise_columns(Scores(held_out=()), Scores(held_out=()), note="") is None
    assert summarise_columns(Scores(held_out=()), Scores(held_out=()), note="Too few.") == Columns(text="Too few.")


def test_the_report_shows_the_columns() -> None:
    evaluation = make_evaluation(columns=with_losses(2.05, 1.93, 1.72, 1.50))
    tables = column_tables(evaluation)
    page = render_report(title="", subtitle="", result=evaluation, curve=None, tables=tables)
    assert "base model with retrieved code" in page
    assert "loss 1.965 (-0.120; 95 % interval" in page
