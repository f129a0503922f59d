"""Codebase Gardener's side, as far as it shares files with us: its project registry.

It is written from how that program behaves: registry.json with its fields and forms of values, replaced as a whole and without
a lock; a directory for each project, deleted with the project.
"""

from __future__ import annotations

import json
import shutil
import uuid
from datetime import datetime
from pathlib import Path
from typing import Any


class ProjectRegistry:
    def __init__(self, data_dir: Path) -> None:
        self.file = data_dir / "registry.json"
        data_dir.mkdir(exist_ok=True)
        if not self.file.exists():
            self._save({"version": "1.0", "projects": {}, "active_project": None})

    def register_project(self, name: str, source_path: Path) -> str:
        registry = self._load()
        project_id, now = str(uuid.uuid4()), str(datetime.now())  # noqa: DTZ005 -- local time, as it writes it
        directory = self.file.parent / "projects" / project_id
        directory.mkdir(parents=True)
        registry["projects"][project_id] = {
            "project_id": project_id,
            "name": name,
            "source_path": str(source_path),
            "created_at": now,
            "last_updated": now,
            "training_status": "not_started",
            "language": "python",
            "file_count": len(list(source_path.glob("*.py"))),
            "lora_adapter_path": str(directory / "lora_adapter.bin"),
            "vector_store_path": str(directory / "vector_store"),
            "context_path": str(directory / "context.json"),
        }
        registry["active_project"] = registry.get("active_project") or project_id
        self._save(registry)
        return project_id

    def get_project(self, project_id: str) -> dict[str, Any]:
        project: dict[str, Any] = self._load()["projects"][project_id]
        return project

    @property
    def project_ids(self) -> list[str]:
        return list(self._load()["projects"])

    @property
    def active_project(self) -> str | None:
        active: str | None = self._load().get("active_project")
        return active

    def remove_project(self, project_id: str) -> None:
        registry = self._load()
        shutil.rmtree(self.file.parent / "projects" / project_id)
        del registry["projects"][project_id]
        if registry["active_project"] == project_id:
            registry["active_project"] = next(iter(registry["projects"]), None)
        self._save(registry)

    def _load(self) -> dict[str, Any]:
        registry: dict[str, Any] = json.loads(self.file.read_text(encoding="utf-8"))
        return registry

    def _save(self, registry: dict[str, Any]) -> None:
        temporary = self.file.with_suffix(".tmp")
        temporary.write_text(json.dumps(registry, indent=2, default=str, ensure_ascii=False), encoding="utf-8")
        temporary.replace(self.file)
