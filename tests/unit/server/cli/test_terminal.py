"""What commands write to a terminal, and to a file in its place."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest

from peft_core.jobs.status import status_of
from peft_core.schemas.results import Phase, Status, TrainingStatus
from server.cli.terminal import Terminal, table, with_commands
from tests.factories import make_job


class Tty(io.StringIO):
    def isatty(self) -> bool:
        return True


def status(**changes: Any) -> TrainingStatus:
    job = make_job(status=changes.pop("state", Status.IN_PROGRESS), **changes)
    return status_of(job, 1 if job.status is Status.QUEUED else None, Path("/none"), now=0.0)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("Call list_adapters to see them.", "Run `peft-mcp list` to see them."),
        ("or call train_adapter(project_id='web')", "or run `peft-mcp train`"),
        ("start over with train_adapter.", "start over with `peft-mcp train`."),
        ("Call load_adapter.", "Call load_adapter."),
        ("retrain_adapters", "retrain_adapters"),
        ("no file /code/train_adapter/x or '~/list_adapters'", "no file /code/train_adapter/x or '~/list_adapters'"),
        ("train_adapter = 'train_adapter'", "`peft-mcp train` = 'train_adapter'"),
    ],
)
def test_tools_are_named_as_commands(text: str, shown: str) -> None:
    assert with_commands(text) == shown


def test_the_columns_of_a_table_are_aligned() -> None:
    assert table(("A", "LONG"), [("wide", "x"), ("", "y")]) == "A     LONG\nwide  x\n      y"


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Tty:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    return Tty()


def test_a_terminal_shows_a_bar_with_the_state_and_removes_it(terminal: Tty) -> None:
    with Terminal(io.StringIO(), terminal, as_json=False).progress() as show:
        show(status(phase=Phase.TRAINING, step=12, total_steps=24, loss=1.5))
    text = terminal.getvalue()
    assert "━" in text
    assert "web: training: step 12/24, loss 1.500" in text
    assert text.endswith("\x1b[2K")  # the line is erased


def test_a_bar_shows_names_as_they_are(terminal: Tty) -> None:
    with Terminal(io.StringIO(), terminal, as_json=False).progress() as show:
        show(status(phase=Phase.LOADING_MODEL, detail="[red]x[/red]"))
    assert "[red]x[/red]" in terminal.getvalue()


@pytest.mark.parametrize("err", [io.StringIO(), Tty()], ids=["file", "dumb terminal"])
def test_where_no_bar_can_be_drawn_each_phase_gets_a_line(err: io.StringIO, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "dumb")
    with Terminal(io.StringIO(), err, as_json=False).progress() as show:
        show(status(state=Status.QUEUED))
        show(status(phase=Phase.TRAINING, step=1, total_steps=9))
        show(status(phase=Phase.TRAINING, step=2, total_steps=9))
        show(status(phase=Phase.SAVING))
        show(status(state=Status.CANCELLED))
    assert err.getvalue().splitlines() == [
        "web: queued at position 1",
        "web: training: step 1/9",
        "web: writing the adapter",
    ]
