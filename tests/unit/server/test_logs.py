"""What of a failed call is in the log."""

from __future__ import annotations

import logging

import pytest

from server.logs import leave_out_values


@pytest.mark.parametrize(
    ("template", "arguments", "line"),
    [
        (
            "Tool %r failed: %r",
            ("load_adapter", "No adapter at 'hf_secret'. [adapter_not_found]"),
            "Tool 'load_adapter' failed: [adapter_not_found]",
        ),
        ("Tool %r failed: %r", ("load_adapter", "hf_secret"), "Tool 'load_adapter' failed: [error]"),
        ("Tool %r rejected arguments: %r", ("generate", ["seed"]), "Tool 'generate' rejected arguments: ['seed']"),
        ("100% of it failed: %r", (), "100% of it failed: %r"),
    ],
)
def test_a_failed_call_is_logged_with_the_code_of_its_error_alone(
    template: str, arguments: tuple[object, ...], line: str
) -> None:
    record = logging.LogRecord("mcp", logging.INFO, __file__, 1, template, arguments, None)
    assert leave_out_values(record)
    assert record.getMessage() == line
