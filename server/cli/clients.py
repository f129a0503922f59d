"""The configurations of MCP clients on this machine: do they start this server?

Only files are read. They may hold credentials of other servers, so nothing but our own entry is shown.
"""

from __future__ import annotations

import json
import shlex
import shutil
import sys
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

from peft_core.errors import sanitize

NAME = "peft-mcp"
MAX_BYTES = 32 << 20  # Claude Code keeps a history in its file
_DATA_DIR = "CODEBASE_GARDENER_DATA_DIR"
_VS_CODE = "Library/Application Support/Code/User" if sys.platform == "darwin" else ".config/Code/User"


@dataclass(frozen=True)
class _Client:
    name: str
    presence: str  # below the home directory: the client is used here if it exists
    user_file: str  # below the home directory
    project_file: str  # below the working directory
    key: str = "mcpServers"  # of the table of servers
    plugins_file: str = ""  # below both: says which plugins are enabled, if that is not in the files above
    add: str = ""  # shell command that adds the server, before its command; empty: the file has to be edited


def _same_file(name: str, presence: str, file: str, **options: str) -> _Client:
    """Return a client whose file has the same place below the home directory and below a project."""
    return _Client(name, presence, file, file, **options)


_CLIENTS = (
    _Client(
        "Claude Code",
        ".claude.json",
        ".claude.json",
        ".mcp.json",
        plugins_file=".claude/settings.json",
        add="claude mcp add --scope user peft-mcp --",
    ),
    _same_file("Codex", ".codex", ".codex/config.toml", key="mcp_servers", add="codex mcp add peft-mcp --"),
    _same_file("Gemini", ".gemini", ".gemini/settings.json", add="gemini mcp add --scope user peft-mcp"),
    _same_file("Kiro", ".kiro", ".kiro/settings/mcp.json"),
    _same_file("Cursor", ".cursor", ".cursor/mcp.json"),
    _Client("VS Code", _VS_CODE, f"{_VS_CODE}/mcp.json", ".vscode/mcp.json", key="servers"),
)


@dataclass(frozen=True)
class FoundClient:
    """A client that is used on this machine, and whether it starts the server. `fix` is empty if it does."""

    name: str
    message: str
    fix: str = ""


def find_clients(home: Path, working_directory: Path, data_dir: Path, command: str) -> list[FoundClient]:
    """Return the clients whose configuration is in the home or the working directory.

    Args:
        home: The user's home directory.
        working_directory: The project whose own configuration counts as well.
        data_dir: The data directory of this process, which that of a client's server should equal.
        command: The command that starts this server, to be added where it is missing.
    """
    found = []
    for client in _CLIENTS:
        files = list(dict.fromkeys([working_directory / client.project_file, home / client.user_file]))
        if any(file.is_file() for file in files) or (home / client.presence).exists():
            plugin_files = [place / client.plugins_file for place in (working_directory, home) if client.plugins_file]
            found.append(
                _examine(client, files, working_directory, data_dir, command)
                if not any(map(_enables_plugin, plugin_files or files))
                else _with_plugin(client, command)
            )
    return found


def _examine(client: _Client, files: list[Path], project: Path, data_dir: Path, command: str) -> FoundClient:
    """Return the first entry that works, else what is wrong with the first one that does not."""
    wrong: list[FoundClient] = []
    for file in filter(Path.is_file, files):
        shown = sanitize(file)
        try:
            entries = list(_own_entries(_read(file), client.key, project))
        except (OSError, ValueError) as error:
            message = f"{shown} cannot be examined: {sanitize(error)}"
            wrong.append(
                FoundClient(
                    client.name,
                    message,
                    f"Correct the file, or look for {NAME} in it: comments are not understood here",
                )
            )
            continue
        for entry in entries:
            message, fix = _problem(entry, data_dir, command)
            if not message:
                return FoundClient(client.name, f"{shown} starts {sanitize(' '.join(_words(entry)))}")
            wrong.append(FoundClient(client.name, f"{shown}: {message}", fix))
    if wrong:
        return wrong[0]
    return FoundClient(
        client.name, f"{sanitize(files[-1])} has no entry for {NAME}", _how_to_add(client, files[-1], command)
    )


def _read(file: Path) -> Mapping[str, Any]:
    """Return the tables of a configuration file.

    Raises:
        OSError: it cannot be read.
        ValueError: it is too large, or neither JSON nor TOML.
    """
    with file.open("rb") as opened:
        content = opened.read(MAX_BYTES + 1)
    if len(content) > MAX_BYTES:
        raise ValueError(f"it has more than {MAX_BYTES >> 20} MiB")
    text = content.decode()
    try:
        config = tomllib.loads(text) if file.suffix == ".toml" else json.loads(text or "{}")
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    return _table(config)


def _own_entries(config: Mapping[str, Any], key: str, project: Path) -> Iterator[Mapping[str, Any]]:
    """Yield the entries of this server, also those that Claude Code keeps per project."""
    for tables in (config, _table(_table(config.get("projects")).get(str(project)))):
        for name, entry in _table(tables.get(key)).items():
            words = _words(_table(entry))
            if name == NAME or NAME in (PurePath(word).name for word in words):
                yield _table(entry)


def _problem(entry: Mapping[str, Any], data_dir: Path, command: str) -> tuple[str, str]:
    """Return why an entry does not start this server with these data, and what to do; two empty texts if it does."""
    words = _words(entry)
    if entry.get("disabled") is True or entry.get("enabled") is False:
        return f"the entry for {NAME} is disabled", "Enable it in the client"
    if not words:
        return f"the entry for {NAME} has no command", f'Set "command" to {json.dumps(command)}'
    if shutil.which(words[0]) is None:
        return f"the command {sanitize(words[0])} does not exist here", f'Set "command" to {json.dumps(command)}'
    other = _table(entry.get("env")).get(_DATA_DIR)
    if isinstance(other, str) and other.strip() and "$" not in other and _resolved(other) != data_dir:
        message = f"its server uses the data directory {sanitize(other)}, and this command uses {data_dir}"
        return message, f"To see its trainings here, run: export {_DATA_DIR}={shlex.quote(sanitize(other))}"
    return "", ""


def _enables_plugin(file: Path) -> bool:
    """Return whether a file enables the plugin of this product, which starts the server."""
    try:
        config = _read(file)
    except (OSError, ValueError):
        return False
    enabled = {
        **_table(config.get("enabledPlugins")),
        **_table(config.get("plugins")),
    }  # Claude Code's and Codex's name
    return any(
        name.partition("@")[0] == NAME and (value is True or _table(value).get("enabled") is True)
        for name, value in enabled.items()
    )


def _with_plugin(client: _Client, command: str) -> FoundClient:
    if shutil.which(NAME) is not None:
        return FoundClient(client.name, f"the plugin {NAME} is enabled, and starts the server")
    directory = shlex.quote(str(PurePath(command).parent))
    return FoundClient(
        client.name,
        f"the plugin {NAME} is enabled, but the command {NAME} that it starts is not on the PATH",
        f'Before the client is started, run: export PATH="$PATH":{directory}',
    )


def _how_to_add(client: _Client, file: Path, command: str) -> str:
    if client.add:
        return f"{client.add} {shlex.quote(command)}"
    return f"Put into {sanitize(file)}: {json.dumps({client.key: {NAME: {'command': command, 'args': []}}})}"


def _words(entry: Mapping[str, Any]) -> list[str]:
    command, arguments = entry.get("command"), entry.get("args")
    words = [command, *(arguments if isinstance(arguments, list) else [])]
    return [word for word in words if isinstance(word, str) and word] if isinstance(command, str) and command else []


def _resolved(path: str) -> Path | None:
    try:
        return Path(path).expanduser().resolve()
    except (OSError, RuntimeError, ValueError):  # a loop of links, an unknown home directory, a NUL
        return None


def _table(value: object) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}
