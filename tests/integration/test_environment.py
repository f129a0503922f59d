"""The server's environment variables, as clients set them."""

from __future__ import annotations

from pathlib import Path

import pytest

from peft_core.config import Settings
from tests.factories import make_base, record_base
from tests.model_files import write_adapter
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


def test_a_blank_setting_in_python_counts_as_unset(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CODEBASE_GARDENER_DATA_DIR", raising=False)
    assert Settings(data_dir="").data_dir == Path("~/.codebase-gardener").expanduser().resolve()
