"""The text of a tool result, and what is left to its data."""

from __future__ import annotations

import json

import pytest
from mcp.types import TextContent

from peft_core.schemas.results import TrainingDataReport
from server.format_results import format_inspection
from tests.factories import make_job


def report_of(held_out: list[str]) -> TrainingDataReport:
    request = make_job().request
    return TrainingDataReport(
        training_data="code",
        base_model="base",
        device="cpu",
        train_examples=90,
        held_out_examples=10,
        train_tokens=9000,
        held_out_tokens=1000,
        files=20,
        languages={"python": 20},
        left_out={"tiny": 1},
        secrets_removed=0,
        held_out_files=held_out,
        largest_files={},
        samples=[],
        config=request.config,
        estimate=request.estimate,
    )


@pytest.mark.parametrize("count", [2, 5, 6, 30])
def test_every_held_out_file_is_named_in_the_text_or_the_data(count: int) -> None:
    names = [f"file_{n}.py" for n in range(count)]
    result = format_inspection(report_of(names))
    text, data = (part.text for part in result.content if isinstance(part, TextContent))
    shown = json.loads(data)
    assert "left_out" not in shown
    assert shown.get("held_out_files") == (names if count > 5 else None)
    assert all(name in text + data for name in names)
