"""The arguments of `peft-mcp`."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from peft_core.config import Settings
from server.cli.arguments import parse_arguments
from server.cli.run import COMMANDS

ROOT = Path(__file__).parents[4]
MINIMAL = {
    "train": ["train", "."],
    "status": ["status"],
    "refresh": ["refresh"],
    "evaluate": ["evaluate", "web", "."],
    "compare": ["compare", "web", "api"],
    "cancel": ["cancel", "web"],
    "resume": ["resume", "web"],
    "list": ["list"],
    "disk": ["disk"],
    "doctor": ["doctor"],
}


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_prints_json_on_request(command: str) -> None:
    assert parse_arguments(MINIMAL[command]).json is False
    assert parse_arguments([*MINIMAL[command], "--json"]).json is True


@pytest.mark.parametrize(
    "wrong",
    [
        ["frobnicate"],
        ["train"],
        ["train", ".", "--max-steps", "many"],
        ["train", ".", "--max", "3"],  # an abbreviation, which another option could take over later
        ["evaluate", "web"],
        ["evaluate", "web", ".", "--fail-unless", "harms"],
        ["status", "web", "other"],
        ["refresh", "web", "--install-hook", "--remove-hook"],
    ],
)
def test_wrong_usage_ends_with_code_2(wrong: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        parse_arguments(wrong)
    assert ended.value.code == 2
    assert "usage: peft-mcp" in capsys.readouterr().err


def test_the_help_names_every_command_every_setting_and_the_exit_codes(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        parse_arguments(["--help"])
    assert ended.value.code == 0
    text = capsys.readouterr().out
    for name in (*COMMANDS, "serve", "exit codes", *(f"CODEBASE_GARDENER_{s.upper()}" for s in Settings.model_fields)):
        assert name in text


def test_the_help_of_every_command_can_be_printed(capsys: pytest.CaptureFixture[str]) -> None:
    for command in (*COMMANDS, "serve"):
        with pytest.raises(SystemExit):
            parse_arguments([command, "--help"])  # a stray % in a help text would raise ValueError
        assert f"usage: peft-mcp {command}" in capsys.readouterr().out


@pytest.mark.parametrize("page", ["README.md", "docs/command-line.md"])
def test_the_commands_of_the_documentation_are_valid(page: str) -> None:
    commands = re.findall(r"^    peft-mcp (.*)", (ROOT / page).read_text(), re.MULTILINE)
    assert commands
    for command in commands:
        parse_arguments(shlex.split(command, comments=True))  # exits with code 2 for one that is not


def test_the_documentation_names_every_command() -> None:
    page = (ROOT / "docs" / "command-line.md").read_text()
    assert [command for command in COMMANDS if not re.search(rf"`(peft-mcp )?{command} ?[^`]*`", page)] == []
