from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from peft_core.errors import MAX_MESSAGE, PeftMcpError, sanitize


@given(st.text())
def test_sanitized_text_is_printable_and_keeps_its_length_and_its_lines(text: str) -> None:
    sanitized = sanitize(text, limit=None, keep="\n\t")
    assert len(sanitized) == len(text)
    assert sanitized.count("\n") == text.count("\n")
    assert sanitized.replace("\n", "").replace("\t", "").isprintable()
    assert sanitize(sanitized, limit=None, keep="\n\t") == sanitized


@given(st.text(), st.integers(min_value=5, max_value=20))
def test_sanitized_text_is_never_longer_than_the_limit(text: str, limit: int) -> None:
    assert len(sanitize(text, limit=limit)) == min(len(text), limit)


@pytest.mark.parametrize("hostile", ["\x1b[31m", "\u202e", "\0", "\r", "\ue000", "\ud800"])
def test_sanitize_replaces_characters_that_control_a_terminal_or_reorder_text(hostile: str) -> None:
    assert sanitize(f"a{hostile}b", keep="\n\t") == f"a\N{REPLACEMENT CHARACTER}{hostile[1:]}b"


def test_sanitize_keeps_both_ends_of_text_that_is_too_long() -> None:
    assert sanitize("a" * 50 + "b" * 50, limit=11) == "aaaaa … bbb"


def test_an_error_bounds_and_sanitizes_its_message_and_its_suggestions() -> None:
    error = PeftMcpError("\x1b" + "x" * 5_000, suggestions=["line\nbreak\x07"])
    assert len(error.message) == MAX_MESSAGE
    assert error.message.startswith("\N{REPLACEMENT CHARACTER}x")
    assert error.suggestions == ("line\nbreak\N{REPLACEMENT CHARACTER}",)
