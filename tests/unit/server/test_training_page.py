"""The training page as a file: small, alone, and without a way to parse text as HTML."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import server.training_page
from server.app import TOOLS

PAGE = Path(server.training_page.__file__).with_name("page.html").read_text(encoding="utf-8")


def test_the_page_is_small() -> None:
    assert len(PAGE.encode()) < 30_000


def test_the_page_refers_to_nothing_else() -> None:
    assert set(re.findall(r"https?://[^\"' ]+", PAGE)) == {"http://www.w3.org/2000/svg"}
    assert not re.search(r"\b(src|href)=|url\(|@import|fetch\(|XMLHttpRequest|WebSocket|import\(", PAGE)


@pytest.mark.parametrize(
    "sink", ["innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval(", "Function("]
)
def test_the_page_parses_no_text_as_html_or_code(sink: str) -> None:
    assert sink not in PAGE


def test_the_tools_that_answer_with_a_job_name_the_page() -> None:
    shown = {tool.name for tool in TOOLS if tool.meta}
    assert shown == {"train_adapter", "evaluate_adapter", "get_training_status", "resume_training"}
