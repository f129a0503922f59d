"""What `doctor` finds in the configurations of MCP clients."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest

from server.cli import clients
from server.cli.clients import FoundClient, find_clients

COMMAND = "/opt/peft/bin/peft-mcp"
WORKS = {"command": sys.executable, "args": ["-m", "server"]}
FILES = {  # client -> (file below the home directory, key)
    "Claude Code": (".claude.json", "mcpServers"),
    "Gemini": (".gemini/settings.json", "mcpServers"),
    "Kiro": (".kiro/settings/mcp.json", "mcpServers"),
    "Cursor": (".cursor/mcp.json", "mcpServers"),
    "VS Code": (f"{clients._VS_CODE}/mcp.json", "servers"),
}


@pytest.fixture
def home(tmp_path: Path) -> Path:
    (tmp_path / "home").mkdir()
    (tmp_path / "project").mkdir()
    return tmp_path / "home"


def find(home: Path) -> list[FoundClient]:
    return find_clients(home, home.parent / "project", home / ".codebase-gardener", COMMAND)


def write(file: Path, content: Any) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(content if isinstance(content, str) else json.dumps(content))
    return file


def test_clients_that_are_not_used_here_are_not_mentioned(home: Path) -> None:
    assert find(home) == []


@pytest.mark.parametrize("client", FILES)
def test_an_entry_that_works_is_found_in_the_user_s_file(home: Path, client: str) -> None:
    name, key = FILES[client]
    file = write(home / name, {key: {"other": {"command": "x"}, "peft-mcp": WORKS}})
    assert find(home) == [FoundClient(client, f"{file} starts {sys.executable} -m server")]


@pytest.mark.parametrize("client", FILES)
def test_a_client_without_an_entry_gets_the_command_or_the_lines_that_add_it(home: Path, client: str) -> None:
    name, key = FILES[client]
    file = write(home / name, {key: {"other": {"command": "x"}}})
    (found,) = find(home)
    assert found.message == f"{file} has no entry for peft-mcp"
    if found.fix.startswith("Put into"):
        entry = json.loads(found.fix.partition(": ")[2])
        assert entry[key]["peft-mcp"]["command"] == COMMAND
    else:
        assert shlex.split(found.fix)[1:3] == ["mcp", "add"]
        assert shlex.split(found.fix)[-1] == COMMAND


def test_codex_is_read_as_toml(home: Path) -> None:
    file = write(home / ".codex" / "config.toml", f'[mcp_servers.peft-mcp]\ncommand = "{sys.executable}"\n')
    assert find(home) == [FoundClient("Codex", f"{file} starts {sys.executable}")]


@pytest.mark.parametrize(
    ("name", "used", "content"),
    [
        ("Claude Code", ".claude.json", {"enabledPlugins": {"peft-mcp@peft-mcp": True}}),
        ("Codex", ".codex/config.toml", '[plugins."peft-mcp@peft-mcp"]\nenabled = true\n'),
    ],
)
def test_an_enabled_plugin_starts_the_server_if_its_command_is_on_the_path(
    home: Path, monkeypatch: pytest.MonkeyPatch, name: str, used: str, content: object
) -> None:
    write(home / used, "")
    write(home / (".claude/settings.json" if name == "Claude Code" else used), content)
    monkeypatch.setenv("PATH", str(home))
    (found,) = find(home)
    assert "not on the PATH" in found.message
    assert "/opt/peft/bin" in found.fix
    program = write(home / "peft-mcp", "#!/bin/sh\n")
    program.chmod(0o755)
    assert find(home) == [FoundClient(name, "the plugin peft-mcp is enabled, and starts the server")]


def test_a_disabled_plugin_starts_nothing(home: Path) -> None:
    write(home / ".claude.json", {})
    write(home / ".claude" / "settings.json", {"enabledPlugins": {"peft-mcp@peft-mcp": False, "other@x": True}})
    assert "has no entry" in find(home)[0].message


def test_a_client_whose_directory_exists_is_used_even_without_a_file(home: Path) -> None:
    (home / ".cursor").mkdir()
    (found,) = find(home)
    assert (found.name, "has no entry" in found.message) == ("Cursor", True)


def test_the_project_s_own_file_counts(home: Path) -> None:
    write(home / ".claude.json", {"mcpServers": {}})
    file = write(home.parent / "project" / ".mcp.json", {"mcpServers": {"peft-mcp": WORKS}})
    assert find(home) == [FoundClient("Claude Code", f"{file} starts {sys.executable} -m server")]


@pytest.mark.parametrize(("directory", "works"), [("project", True), ("other", False)])
def test_claude_code_keeps_entries_for_one_project_in_its_own_file(home: Path, directory: str, works: bool) -> None:
    entry = {"mcpServers": {"peft-mcp": WORKS}}
    write(home / ".claude.json", {"projects": {str(home.parent / directory): entry}})
    (found,) = find(home)
    assert (found.fix == "") is works


def test_an_entry_of_another_name_is_recognised_by_its_command(home: Path, tmp_path: Path) -> None:
    program = write(tmp_path / "bin" / "peft-mcp", "#!/bin/sh\n")
    program.chmod(0o755)
    write(home / ".cursor" / "mcp.json", {"mcpServers": {"adapters": {"command": str(program)}}})
    (found,) = find(home)
    assert found.message.endswith(f"starts {program}")


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ({"command": "/no/such/peft-mcp"}, "does not exist here"),
        ({"command": "no-such-program-anywhere"}, "does not exist here"),
        ({"url": "https://example.org"}, "has no command"),
        ({"command": ["peft-mcp"]}, "has no command"),
        ({**WORKS, "disabled": True}, "is disabled"),
        ({**WORKS, "enabled": False}, "is disabled"),
        ({**WORKS, "env": {"CODEBASE_GARDENER_DATA_DIR": "/elsewhere"}}, "uses the data directory /elsewhere"),
        ("peft-mcp", "has no command"),
    ],
)
def test_an_entry_that_cannot_work_is_reported_with_what_to_do(home: Path, entry: object, words: str) -> None:
    file = write(home / ".cursor" / "mcp.json", {"mcpServers": {"peft-mcp": entry}})
    (found,) = find(home)
    assert str(file) in found.message
    assert words in found.message
    assert found.fix


@pytest.mark.parametrize("place", ["~/.codebase-gardener", "${HOME}/data", "", " "])
def test_the_same_data_directory_and_variables_are_no_problem(
    home: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    monkeypatch.setenv("HOME", str(home))
    entry = {**WORKS, "env": {"CODEBASE_GARDENER_DATA_DIR": place}}
    write(home / ".cursor" / "mcp.json", {"mcpServers": {"peft-mcp": entry}})
    assert find(home)[0].fix == ""


@pytest.mark.parametrize(
    "content", ['{"mcpServers": {} // comment\n}', "[" * 100_000, "\x00", '{"a": 1', "x" * 2000], ids=range(5)
)
def test_a_file_that_cannot_be_read_is_reported(home: Path, monkeypatch: pytest.MonkeyPatch, content: str) -> None:
    monkeypatch.setattr(clients, "MAX_BYTES", 200_000)
    write(home / ".gemini" / "settings.json", content)
    (found,) = find(home)
    assert "cannot be examined" in found.message
    assert found.fix


@pytest.mark.parametrize("content", ["[]", '"peft-mcp"', '{"mcpServers": []}', '{"projects": [1]}', ""])
def test_a_file_of_another_shape_has_no_entry(home: Path, content: str) -> None:
    write(home / ".claude.json", content)
    (found,) = find(home)
    assert "has no entry" in found.message


def test_a_file_that_is_too_large_is_not_read(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clients, "MAX_BYTES", 100)
    write(home / ".claude.json", {"history": "x" * 200})
    (found,) = find(home)
    assert "cannot be examined" in found.message


def test_nothing_of_other_servers_and_no_secret_is_shown(home: Path) -> None:
    other = {"command": "secret-server", "env": {"API_KEY": "s3cr3t"}}
    ours = {**WORKS, "env": {"HF_TOKEN": "s3cr3t"}}
    write(home / ".cursor" / "mcp.json", {"mcpServers": {"other": other, "peft-mcp": ours}})
    write(home / ".kiro" / "settings" / "mcp.json", '{"mcpServers": {"other": {"env": {"API_KEY": "s3cr3t"}}')
    shown = repr(find(home))
    assert "s3cr3t" not in shown
    assert "secret-server" not in shown


def test_control_characters_of_an_entry_do_not_reach_the_terminal(home: Path) -> None:
    write(home / ".cursor" / "mcp.json", {"mcpServers": {"peft-mcp": {"command": "\x1b[2Jpeft-mcp"}}})
    (found,) = find(home)
    assert "\x1b" not in found.message
