"""The plugin folder, the marketplace file and the registry's server.json are valid and agree with the package."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft7Validator
from jsonschema.validators import validator_for

from peft_core.config import Settings
from server.app import TOOLS

ROOT = Path(__file__).parents[2]
PLUGIN = ROOT / "plugin"
SCHEMAS = ROOT / "tests" / "schemas"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
SKILL = PLUGIN / "skills" / "train-adapter" / "SKILL.md"
CHECKED = [
    (PLUGIN / "plugin.json", "agent-plugin-1.0.0.json"),
    (PLUGIN / "mcp.json", "agent-plugin-mcp-1.0.0.json"),
    (ROOT / "server.json", "mcp-registry-server-2025-12-11.json"),
]
_CALL = re.compile(r"\b([a-z_]+)\(([^()]*)\)")


def read(path: Path) -> dict[str, Any]:
    document: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return document


@pytest.mark.parametrize(("path", "schema_name"), CHECKED, ids=lambda value: getattr(value, "name", value))
def test_a_file_is_valid_against_the_public_schema_that_it_names(path: Path, schema_name: str) -> None:
    document, schema = read(path), read(SCHEMAS / schema_name)
    validator = validator_for(schema, default=Draft7Validator)(schema)
    assert [error.message for error in validator.iter_errors(document)] == []
    assert document["$schema"] == schema["$id"]
    broken = {**document, "name": "Not A Name", "mcpServers": {"peft-mcp": {"command": ""}}}
    assert not validator.is_valid(broken), "the schema would accept anything"


def lint(directory: Path) -> subprocess.CompletedProcess[str]:
    """Check the files of Claude Code and the skill by the rules of their documentation."""
    command = [
        sys.executable,
        "-m",
        "skillsaw",
        "lint",
        "--strict",
        "--no-custom-rules",
        "--no-plugins",
        str(directory),
    ]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def copy_of_the_plugin(directory: Path) -> Path:
    for name in ("plugin", ".claude-plugin"):
        shutil.copytree(ROOT / name, directory / name)
    return directory


def test_the_marketplace_the_plugin_and_its_skill_are_accepted_by_a_linter(tmp_path: Path) -> None:
    for directory in (copy_of_the_plugin(tmp_path), tmp_path / "plugin"):
        checked = lint(directory)
        assert checked.returncode == 0, checked.stdout


@pytest.mark.parametrize(
    ("file", "old", "new"),
    [
        (".claude-plugin/marketplace.json", '"owner"', '"owners"'),
        ("plugin/.claude-plugin/plugin.json", '"version": "0.1.0"', '"version": 1'),
        ("plugin/skills/train-adapter/SKILL.md", "name: train-adapter", "name: another"),
    ],
)
def test_the_linter_rejects_a_broken_file(tmp_path: Path, file: str, old: str, new: str) -> None:
    path = copy_of_the_plugin(tmp_path) / file
    text = path.read_text(encoding="utf-8")
    assert old in text
    path.write_text(text.replace(old, new), encoding="utf-8")
    assert lint(tmp_path).returncode != 0


def test_all_files_have_the_name_and_the_version_of_the_package() -> None:
    manifests = [read(PLUGIN / "plugin.json"), read(PLUGIN / ".claude-plugin" / "plugin.json")]
    server = read(ROOT / "server.json")
    assert {manifest["name"] for manifest in manifests} == {PROJECT["name"]}
    versions = [manifest["version"] for manifest in manifests]
    versions += [server["version"], *(package["version"] for package in server["packages"])]
    assert set(versions) == {PROJECT["version"]}
    (entry,) = read(ROOT / ".claude-plugin" / "marketplace.json")["plugins"]
    assert (entry["name"], (ROOT / entry["source"]).resolve()) == (PROJECT["name"], PLUGIN)
    (package,) = server["packages"]
    assert package["identifier"] == PROJECT["name"]


def test_the_readme_proves_the_name_in_the_registry() -> None:
    """The registry reads the marker from the package's page on PyPI, which is the README."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert f"mcp-name: {read(ROOT / 'server.json')['name']} " in readme


def test_the_plugin_starts_the_command_of_the_package() -> None:
    (server,) = read(PLUGIN / "mcp.json")["mcpServers"].values()
    assert server["command"] in PROJECT["scripts"]
    assert read(PLUGIN / ".claude-plugin" / "plugin.json")["mcpServers"] == "./mcp.json"


def test_the_variables_in_server_json_are_settings() -> None:
    (package,) = read(ROOT / "server.json")["packages"]
    prefix = Settings.model_config["env_prefix"]
    known = {f"{prefix}{name.upper()}" for name in Settings.model_fields}
    assert {variable["name"] for variable in package["environmentVariables"]} <= known


def test_the_skill_names_tools_and_arguments_that_exist() -> None:
    parameters = {tool.name: set(tool.parameters["properties"]) for tool in TOOLS}
    calls = _CALL.findall(SKILL.read_text(encoding="utf-8"))
    assert len(calls) > 10
    for name, arguments in calls:
        assert name in parameters, name
        named = {argument.split("=")[0].strip() for argument in arguments.split(", ") if "=" in argument}
        assert named <= parameters[name], (name, named)
