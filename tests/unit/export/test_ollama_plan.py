"""Tests of the name, the address and the way of an export to Ollama, without a server."""

from __future__ import annotations

from pathlib import Path

import pytest

from peft_core.config import Settings
from peft_core.export.ollama_plan import plan_ollama
from peft_core.ollama import OllamaClient, OllamaStatus
from peft_core.schemas.export import ExportOptions
from tests.factories import make_base

NAMED = ExportOptions(model_name="x")


@pytest.fixture
def settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Settings:
    monkeypatch.delenv("OLLAMA_HOST", raising=False)
    return Settings(data_dir=tmp_path, ollama_base_url=None)


@pytest.fixture
def version(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    answer = {"version": "0.33.0"}
    monkeypatch.setattr(
        OllamaClient, "status", lambda self: OllamaStatus(address=self.address, reachable=True, **answer)
    )
    return answer


@pytest.mark.parametrize(
    ("base", "name"),
    [
        ("qwen2.5-coder:1.5b", "qwen2.5-coder-1.5b-web:latest"),
        ("Qwen/Qwen2.5-Coder-0.5B", "qwen2.5-coder-0.5b-web:latest"),
        ("tiny:latest", "tiny-latest-web:latest"),
    ],
)
def test_the_name_holds_base_and_project(settings: Settings, version: dict[str, str], base: str, name: str) -> None:
    adapter = settings.paths.projects / "web" / "lora" / "20260101-000000-abcdef"
    plan, _ = plan_ollama(adapter, make_base(name=base), ExportOptions(), settings)
    assert plan.model == name


@pytest.mark.parametrize(("number", "lora"), [("0.33.0", True), ("0.34.0", True), ("0.34.1", False)])
def test_a_lora_file_is_sent_where_the_version_takes_one(
    settings: Settings, version: dict[str, str], number: str, lora: bool
) -> None:
    version["version"] = number
    assert plan_ollama(Path("/a"), make_base(), NAMED, settings)[1] is lora
    assert plan_ollama(Path("/a"), make_base(format="huggingface"), NAMED, settings)[1] is False


def test_a_version_that_is_too_old_is_not_used(settings: Settings, version: dict[str, str]) -> None:
    version["version"] = "0.3.1"
    plan, _ = plan_ollama(Path("/a"), make_base(), NAMED, settings)
    assert plan.address is None
    assert "0.3.1 at http://127.0.0.1:11434 is too old" in plan.reason


def test_another_machine_needs_the_setting(
    settings: Settings, version: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OLLAMA_HOST", "gpu.example:11434")
    plan, _ = plan_ollama(Path("/a"), make_base(), NAMED, settings)
    assert plan.address is None
    assert "names another machine" in plan.reason
    allowed = settings.model_copy(update={"ollama_base_url": "http://gpu.example:11434"})
    assert plan_ollama(Path("/a"), make_base(), NAMED, allowed)[0].address == "http://gpu.example:11434"
