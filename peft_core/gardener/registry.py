"""The project registry of Codebase Gardener, `{data_dir}/registry.json`.

{"version": "1.0", "active_project": ID, "projects": {ID: {"project_id", "name", "source_path", "training_status", ...}}}

Nothing is created where it is absent. A project that was added there can be trained here by its id, and its training shows
there. A file that cannot be used is an error for a call that needs it. It never fails a training, which only shows there.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft_core.errors import InvalidArgument, PeftMcpError, StorageError, sanitize
from peft_core.gardener import documents
from peft_core.paths import DataPaths
from peft_core.schemas.dataset import TrainingData
from peft_core.schemas.results import Status

MAX_NAMED = 5  # projects in an error
DATABASES = ("vector_stores", "vector_store")  # LanceDB databases with a table for each project
TABLE = ".lance"

log = logging.getLogger(__name__)  # structlog would slow the server's start down by 0.1 s


@dataclass(frozen=True)
class Project:
    """A project that was added in Codebase Gardener."""

    project_id: str
    name: str
    source_path: str
    vector_store_path: str | None


class ProjectRegistry:
    """The projects of Codebase Gardener in one data directory. Its methods block for milliseconds."""

    def __init__(self, paths: DataPaths) -> None:
        self._paths = paths

    def projects(self) -> list[Project]:
        """Return the projects in the order in which they were added; entries that are damaged are left out.

        Raises:
            StorageError: the registry cannot be used.
        """
        registry = documents.read(self._paths.gardener_registry) or {}
        return [_project(key, entry) for key, entry in _entries(registry).items()]

    def find(self, project_id: str) -> Project | None:
        """Return a project by its id; None if there is no such project.

        Raises:
            StorageError: the registry cannot be used.
            InvalidArgument: `project_id` is the name of a project; the error has its id.
        """
        projects = self.projects()
        for project in projects:
            if project.project_id == project_id:
                return project
        named = [project for project in projects if project.name.casefold() == project_id.casefold()]
        if named:
            ids = " or ".join(repr(project.project_id) for project in named[:MAX_NAMED])
            raise InvalidArgument(
                "project_id",
                project_id,
                f"it is the name of a project of Codebase Gardener, and must be its id: {ids}",
                suggestions=["Call again with the id"],
            )
        return None

    def data_of(self, project_id: str, given: TrainingData | None) -> TrainingData:
        """Return what a project is trained on: what was given, where the path of its vector store means the table in it.

        If nothing was given, its code is: its directory or, if that does not exist any more, its table of chunks.

        Raises:
            InvalidArgument: nothing was given, and the project is not there or has no absolute path; or the error has its id.
            StorageError: nothing was given, and the registry cannot be used.
        """
        if given is None:
            return self._code_of(project_id)
        if isinstance(given, str):
            with suppress(StorageError):
                for project in self.projects():
                    if project.project_id == project_id and project.vector_store_path == given:
                        return self._table(project) or given
        return given

    def _code_of(self, project_id: str) -> str:
        project = self.find(project_id)
        if project is None:
            needed = "the absolute path of a repository or a file is required, unless records are given"
            if os.path.lexists(self._paths.gardener_registry):
                needed += f"; Codebase Gardener has no project with the id {project_id!r}"
            raise InvalidArgument("training_data", None, needed)
        source = Path(project.source_path)
        if not _is_directory(source) and (table := self._table(project)) is not None:
            return table
        if not source.is_absolute():
            raise InvalidArgument(
                "training_data",
                None,
                f"the source_path of project {project_id!r} in Codebase Gardener is "
                f"{sanitize(repr(project.source_path))}; it must be an absolute path",
                suggestions=["Give training_data, the absolute path of its repository"],
            )
        return project.source_path

    def _table(self, project: Project) -> str | None:
        """Return the LanceDB table of a project: alone in its vector store, or in the database of all projects."""
        if project.vector_store_path is not None:
            store = Path(project.vector_store_path)
            tables = [store] if store.suffix == TABLE else []
            with suppress(OSError):
                tables = tables or sorted(store.glob(f"*{TABLE}"))
            if len(tables) == 1 and _is_directory(tables[0]):
                return str(tables[0])
        name = f"project_{project.project_id.replace('-', '_')}{TABLE}"
        shared = [self._paths.root / database / name for database in DATABASES]
        return next((str(table) for table in shared if _is_directory(table)), None)

    def show(self, project_id: str, status: Status) -> None:
        """Show the state of a project's training there, if the project is there. Problems are logged: nothing depends on it.

        `lora_adapter_path` follows the project's current adapter once a training has ended.
        """

        def change(registry: documents.Fields) -> None:
            if (entry := _entries(registry).get(project_id)) is not None:
                self._update(entry, project_id, status)

        self._change(self._paths.gardener_registry, change, f"The training of {project_id}")

    def activate(self, project_id: str) -> None:
        """Make a project the active one there, if the project is there. Problems are logged: nothing depends on it."""
        known = False

        def change(fields: documents.Fields) -> None:
            nonlocal known
            known = known or project_id in _entries(fields)
            if known and fields.get("active_project") != project_id:
                fields["active_project"] = project_id
                if "last_updated" in fields:
                    fields["last_updated"] = documents.now_like(fields["last_updated"])

        for path in (self._paths.gardener_registry, self._paths.gardener_active):
            self._change(path, change, f"That {project_id} is the active project")

    def _change(self, path: Path, change: Callable[[documents.Fields], None], what: str) -> None:
        """Change a file, if it exists. `what` is not shown there, if that fails."""
        try:
            with documents.changing(path, self._paths.gardener_lock) as fields:
                if fields is not None:
                    change(fields)
        except (PeftMcpError, OSError, UnicodeEncodeError) as error:
            log.warning("%s is not shown in Codebase Gardener: %s", what, error)

    def _update(self, entry: dict[str, Any], project_id: str, status: Status) -> None:
        """Change an entry's status and adapter, if they differ, and then the time of its last update."""
        changes: dict[str, Any] = {"training_status": self._word(project_id, status)}
        if status.is_final:
            changes["lora_adapter_path"] = self._adapter_path(entry, project_id)
        changed = {name: value for name, value in changes.items() if entry.get(name) != value}
        if changed:
            entry.update(changed)
            entry["last_updated"] = documents.now_like(entry.get("last_updated"))

    def _word(self, project_id: str, status: Status) -> str:
        """Return Codebase Gardener's word for a status. A cancelled training leaves what was there before."""
        if not status.is_final:
            return "training"
        if status in (Status.FAILED, Status.INTERRUPTED):
            return "failed"
        return "completed" if self._has_adapters(project_id) else "not_started"

    def _has_adapters(self, project_id: str) -> bool:
        try:
            names = [path.name for path in self._paths.adapters(project_id).iterdir()]
        except OSError:
            return False
        return any(name != "current" and not name.startswith(".") for name in names)

    def _adapter_path(self, entry: dict[str, Any], project_id: str) -> str | None:
        """Return the current adapter; without one, what the entry has, unless that is an adapter of ours that is gone."""
        current = self._paths.current(project_id)
        if current.is_dir():
            return str(current.resolve())
        given: str | None = entry.get("lora_adapter_path")
        path = Path(given) if isinstance(given, str) else None
        gone = path is not None and path.parent == self._paths.adapters(project_id) and not _is_directory(path)
        return None if gone else given


def _is_directory(path: Path) -> bool:
    return os.path.isdir(path)  # noqa: PTH112 -- False also for what is no possible path


def _entries(registry: documents.Fields) -> dict[str, dict[str, Any]]:
    """Return the entries of the projects by id, without those that are not objects."""
    projects = registry.get("projects")
    if not isinstance(projects, dict):
        return {}
    return {key: entry for key, entry in projects.items() if isinstance(entry, dict)}


def _project(project_id: str, entry: dict[str, Any]) -> Project:
    texts = {name: entry.get(name) for name in ("name", "source_path", "vector_store_path")}
    name, source, vectors = (value if isinstance(value, str) else None for value in texts.values())
    return Project(project_id, name or "", source or "", vectors)
