"""The settings and their documentation."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

from peft_core.config import Settings

DOCS = Path(__file__).parents[2] / "docs"


def test_the_settings_page_lists_the_settings_as_they_are() -> None:
    generated = runpy.run_path(str(DOCS / "generate_settings.py"))["page"]()
    written = (DOCS / "settings.md").read_text(encoding="utf-8")
    assert written == generated, "docs/settings.md is out of date: run `make generated`"


@pytest.mark.parametrize(("given", "level"), [("info", "INFO"), ("CRITICAL", "ERROR"), ("DEBUG", "DEBUG")])
def test_the_log_level_is_taken_as_codebase_gardener_takes_it(
    monkeypatch: pytest.MonkeyPatch, given: str, level: str
) -> None:
    monkeypatch.setenv("CODEBASE_GARDENER_LOG_LEVEL", given)
    assert Settings().log_level == level
