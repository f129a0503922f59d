"""The server's environment variables, as clients set them."""

from __future__ import annotations

from pathlib import Path

import pytest

from peft_core.config import Settings
from tests.factories import make_base, record_base
from tests.model_files import write_adapter, write_model
from tests.survival.wire import server


@pytest.mark.parametrize("blank", ["", " "])
def test_blank_variables_count_as_unset(tmp_path: Path, blank: str) -> None:
    """Clients pass "" for `${X:-}` and for a question that the user left open."""
    home, repository = tmp_path / "home", tmp_path / "repository"
    for directory in (home, repository):
        directory.mkdir()
    record_base(write_adapter(home / ".codebase-gardener" / "projects" / "web" / "lora" / "adapter-01"), make_base())
    prefix = Settings.model_config["env_prefix"]
    blanks = {f"{prefix}{name.upper()}": blank for name in Settings.model_fields}
    with server(Path("unused"), cwd=repository, HOME=str(home), **blanks) as client:
        listed = client.call("list_adapters")["structuredContent"]["adapters"]
        client.call("train_adapter", project_id="web", training_data=str(repository))
        client.call("get_training_status", project_id="web")
    assert [adapter["adapter_id"] for adapter in listed] == ["adapter-01"]
    assert list(repository.iterdir()) == []


def test_blank_variables_of_libraries_count_as_unset(tmp_path: Path) -> None:
    """With HF_HOME="" the cache of the hub would be `hub` in the repository."""
    home, repository = tmp_path / "home", tmp_path / "repository"
    repository.mkdir(parents=True)
    snapshots = home / ".cache" / "huggingface" / "hub" / "models--org--tiny" / "snapshots"
    write_model(snapshots / ("0" * 40))
    names = ("HF_HOME", "HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "OLLAMA_HOST", "OLLAMA_MODELS", "XDG_CACHE_HOME")
    with server(tmp_path / "data", cwd=repository, HOME=str(home), **dict.fromkeys(names, "")) as client:
        listed = client.call("list_base_models")["structuredContent"]["base_models"]
    assert "org/tiny" in {model["base_model"] for model in listed}
    assert list(repository.iterdir()) == []


def test_a_blank_setting_in_python_counts_as_unset(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CODEBASE_GARDENER_DATA_DIR", raising=False)
    assert Settings(data_dir="").data_dir == Path("~/.codebase-gardener").expanduser().resolve()
