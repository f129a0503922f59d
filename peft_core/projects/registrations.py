"""`project.json`: a project's source, the settings of its latest training, and when it is retrained.

The file is replaced atomically under a lock. It is read as hostile, because a data directory may come from elsewhere.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from peft_core.errors import HeaderError, StorageError, sanitize, unwritable
from peft_core.paths import DataPaths
from peft_core.schemas.project import Registration
from peft_core.system.files import atomic_write, read_small, refuse_json_bomb
from peft_core.system.lock import FileLock
from peft_core.system.packages import install_command

VERSION = 1
MAX_BYTES = 1 << 20
MAX_VALUES = 10_000
LOCK_TIMEOUT_S = 5.0  # the lock is held for milliseconds

log = logging.getLogger(__name__)  # structlog would slow the server's start down by 0.1 s


class Registrations:
    """The registrations of one data directory."""

    def __init__(self, paths: DataPaths) -> None:
        self._paths = paths

    def read(self, project_id: str) -> Registration | None:
        """Return a project's registration; None if it has none.

        Raises:
            StorageError: 'unreadable_project': the file is damaged, or a newer peft-mcp wrote it.
        """
        path = self._paths.registration(project_id)
        try:
            raw = read_small(path, MAX_BYTES)
            refuse_json_bomb(raw, path, MAX_VALUES)
        except HeaderError as error:
            if isinstance(error.__cause__, FileNotFoundError | NotADirectoryError):
                return None
            raise _unreadable(path, error.problem) from error
        return _parse(raw, path, project_id)

    def project_ids(self) -> list[str]:
        """Return the ids of the projects that have a registration, sorted; whether it can be read is not checked."""
        return sorted(path.parent.name for path in self._paths.projects.glob("*/project.json"))

    def all(self) -> list[Registration]:
        """Return the registrations that can be read, sorted by project; log the others."""
        found = []
        for project_id in self.project_ids():
            try:
                registration = self.read(project_id)
            except StorageError as error:
                log.warning("%s", error.message)
                continue
            if registration is not None:
                found.append(registration)
        return found

    def change(self, project_id: str, change: Callable[[Registration | None], Registration]) -> Registration:
        """Replace a project's registration by what `change` makes of it; another process cannot change it meanwhile.

        A damaged registration is None for `change`, which therefore replaces it.

        Raises:
            StorageError: The file cannot be written, another process holds the lock, or a newer peft-mcp wrote the file.
        """
        path = self._paths.registration(project_id)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(path.with_name(".project.lock")) as lock:
                if not lock.acquire(LOCK_TIMEOUT_S):
                    raise StorageError(
                        f"Another process has locked the registration of {project_id!r} for more than {LOCK_TIMEOUT_S:g} s.",
                        code="project_busy",
                        suggestions=["Try again"],
                    )
                registration = change(self._read_or_none(project_id))
                atomic_write(path, _to_json(registration))
        except OSError as error:
            raise unwritable(path.parent, error) from error
        return registration

    def _read_or_none(self, project_id: str) -> Registration | None:
        try:
            return self.read(project_id)
        except StorageError as error:
            if error.code == "newer_project":
                raise
            log.warning("%s It is replaced.", error.message)
            return None


def _to_json(registration: Registration) -> str:
    """Return the file's content. Of the settings only those that were given: the others stay at their default."""
    document = registration.model_dump(mode="json", exclude={"config"})
    document["config"] = registration.config.model_dump(mode="json", exclude_unset=True)
    return json.dumps(document, indent=2, ensure_ascii=False) + "\n"


def _parse(raw: bytes, path: Path, project_id: str) -> Registration:
    try:
        document: Any = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise _unreadable(path, "is not JSON") from error
    version = document.get("schema_version") if isinstance(document, dict) else None
    if isinstance(version, int) and version > VERSION:
        raise StorageError(
            f"{path} was written by a newer peft-mcp (version {version}; this one reads {VERSION}).",
            code="newer_project",
            suggestions=[f"Upgrade peft-mcp ({install_command('peft-mcp', '--upgrade')}) and restart the server"],
        )
    try:
        registration = Registration.model_validate(document)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
        where = sanitize(".".join(map(str, first["loc"])))
        raise _unreadable(path, f"{where or 'its content'}: {sanitize(first['msg'])}") from error
    if registration.project_id != project_id:
        raise _unreadable(path, f"it is that of project {registration.project_id!r}")
    if registration.source is not None and not Path(registration.source).is_absolute():
        raise _unreadable(path, "source must be an absolute path")
    return registration


def _unreadable(path: Path, problem: str) -> StorageError:
    return StorageError(
        f"The registration {path} cannot be used: {problem.rstrip('.')}.",
        code="unreadable_project",
        suggestions=["Call train_adapter with the project's id and its training_data, which writes it anew"],
    )
