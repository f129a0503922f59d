"""The path header of examples and of prompts."""

from __future__ import annotations

from pathlib import Path

import pytest

from peft_core.data.path_header import prompt_header
from peft_core.errors import InvalidArgument


@pytest.mark.parametrize(
    ("path", "header"),
    [
        ("src/app.py", "# src/app.py\n"),
        ("./src/app.py", "# src/app.py\n"),
        ("web/main.ts", "// web/main.ts\n"),
        ("site/index.html", "<!-- site/index.html -->\n"),
        ("a/--> evil.html", "<!-- a/\N{REPLACEMENT CHARACTER} evil.html -->\n"),
        ("notes.unknown", ""),
    ],
)
def test_a_prompt_begins_with_the_path_as_training_writes_it(path: str, header: str) -> None:
    assert prompt_header(path) == header


def test_the_code_tells_the_language_where_several_have_the_extension() -> None:
    assert prompt_header("src/fit.m") == "// src/fit.m\n"
    assert prompt_header("src/fit.m", "function y = fit(x)\n") == "% src/fit.m\n"


def test_an_absolute_path_is_taken_relative_to_its_repository(tmp_path: Path) -> None:
    (tmp_path / "project" / ".git").mkdir(parents=True)
    assert prompt_header(str(tmp_path / "project" / "src" / "app.py")) == "# src/app.py\n"


def test_an_absolute_path_outside_a_repository_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument, match="it is in no git repository"):
        prompt_header(str(tmp_path / "app.py"))
