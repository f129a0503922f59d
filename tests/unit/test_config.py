"""The settings and their documentation."""

from __future__ import annotations

import runpy
from pathlib import Path

DOCS = Path(__file__).parents[2] / "docs"


def test_the_settings_page_lists_the_settings_as_they_are() -> None:
    generated = runpy.run_path(str(DOCS / "generate_settings.py"))["page"]()
    written = (DOCS / "settings.md").read_text(encoding="utf-8")
    assert written == generated, "docs/settings.md is out of date: run `make generated`"
