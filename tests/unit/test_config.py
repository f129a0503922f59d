"""The settings and their documentation."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest
from pydantic import ValidationError

from peft_core.config import Settings

DOCS = Path(__file__).parents[2] / "docs"


def test_the_settings_page_lists_the_settings_as_they_are() -> None:
    generated = runpy.run_path(str(DOCS / "generate_settings.py"))["page"]()
    written = (DOCS / "settings.md").read_text(encoding="utf-8")
    assert written == generated, "docs/settings.md is out of date: run `make generated`"


@pytest.mark.parametrize(
    ("name", "value", "problem"),
    [
        ("data_dir", "~no-such-user/data", "home directory"),
        ("allowed_roots", "/code:~no-such-user/code", "home directory"),
        ("allowed_roots", "code", "must be an absolute path"),
        ("data_dir", "/data/caf\udce9", "it must be UTF-8"),
        ("allowed_roots", "/code:/caf\udce9", "it must be UTF-8"),
        ("keep_runs", "99999999999999999999999", "less than or equal to 1000000"),
        ("launcher", "accelerate launch --config 'a b", "No closing quotation"),
    ],
)
def test_a_setting_that_cannot_be_used_is_refused_by_its_name(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str, problem: str
) -> None:
    monkeypatch.setenv(f"CODEBASE_GARDENER_{name.upper()}", value)
    with pytest.raises(ValidationError, match=problem) as caught:
        Settings()
    assert [error["loc"] for error in caught.value.errors()] == [(name,)]


@pytest.mark.parametrize(("given", "level"), [("info", "INFO"), ("CRITICAL", "ERROR"), ("DEBUG", "DEBUG")])
def test_the_log_level_is_taken_as_codebase_gardener_takes_it(
    monkeypatch: pytest.MonkeyPatch, given: str, level: str
) -> None:
    monkeypatch.setenv("CODEBASE_GARDENER_LOG_LEVEL", given)
    assert Settings().log_level == level
