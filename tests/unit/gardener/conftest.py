from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from peft_core.paths import DataPaths

WEB, API = "6f1c2b52-7d0e-4b7a-9d0a-3f6f1b0e2c11", "0a54d3c6-98f3-4c55-8a0e-d2b9d0b3a7f4"


def entry(project_id: str, name: str, data_dir: Path) -> dict[str, Any]:
    """Return a project as Codebase Gardener adds it, with a field that is not known here."""
    directory = data_dir / "projects" / project_id
    return {
        "project_id": project_id,
        "name": name,
        "source_path": f"/code/{name}",
        "created_at": "2026-02-03 10:00:00.123456",
        "last_updated": "2026-02-03 10:00:00.123456",
        "training_status": "not_started",
        "language": "python",
        "file_count": 0,
        "lora_adapter_path": str(directory / "lora_adapter.bin"),
        "vector_store_path": str(directory / "vector_store"),
        "context_path": str(directory / "context.json"),
        "notes": {"of": ["another", "tool", 1.0]},
    }


@pytest.fixture
def paths(tmp_path: Path) -> DataPaths:
    return DataPaths(tmp_path)


@pytest.fixture
def registry_file(paths: DataPaths) -> Path:
    """A registry with the projects `web` and `api`."""
    content = {
        "version": "1.0",
        "projects": {WEB: entry(WEB, "web", paths.root), API: entry(API, "api", paths.root)},
        "active_project": WEB,
        "theme": "größer",
    }
    paths.gardener_registry.write_text(json.dumps(content, indent=2, ensure_ascii=False), encoding="utf-8")
    return paths.gardener_registry


def adapter(paths: DataPaths, project_id: str, adapter_id: str) -> Path:
    """Create the directory of a published adapter, and make it current."""
    directory = paths.adapter(project_id, adapter_id)
    directory.mkdir(parents=True)
    paths.current(project_id).unlink(missing_ok=True)
    paths.current(project_id).symlink_to(adapter_id)
    return directory
