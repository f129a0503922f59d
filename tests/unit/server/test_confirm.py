"""Which clients are asked."""

from __future__ import annotations

from typing import Any

import pytest
from mcp.server.mcpserver import Context
from mcp.types import ClientCapabilities

from server.confirm import shows_forms


@pytest.mark.parametrize(
    ("declared", "asked"),
    [
        ({}, False),
        ({"elicitation": {}}, True),
        ({"elicitation": {"form": {}}}, True),
        ({"elicitation": {"form": {}, "url": {}}}, True),
        ({"elicitation": {"url": {}}}, False),
    ],
)
def test_a_client_is_asked_if_it_shows_forms(
    declared: dict[str, Any], asked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Context, "client_capabilities", ClientCapabilities.model_validate(declared))
    assert shows_forms(Context()) is asked


def test_a_client_without_capabilities_is_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Context, "client_capabilities", None)
    assert not shows_forms(Context())
