"""A home directory without models, and as much time to read what a test puts there as a busy machine takes."""

from __future__ import annotations

from pathlib import Path

import pytest
from huggingface_hub import constants

from peft_core.planning import local_bases, recommend_base


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    home = tmp_path / "home" / "ada"
    home.mkdir(parents=True)
    monkeypatch.setenv("HOME", str(home))
    for name in ("OLLAMA_MODELS", "LLAMA_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(home / ".cache" / "huggingface" / "hub"))
    for module in (local_bases, recommend_base):
        monkeypatch.setattr(module, "MAX_SECONDS", 600.0)
    return home
