"""The published adapters on disk. A published adapter is a directory with a manifest, and its content never changes.

To publish an adapter, a complete and fsynced directory is renamed; then the project's `current` link is replaced. Both steps
are atomic, so a concurrent reader sees the old state or the new one.
"""

from __future__ import annotations

import os
import secrets
import shutil
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from peft_core.adapters.manifest import CONFIG, MANIFEST_NAME, WEIGHTS, Manifest, read_manifest
from peft_core.base_models.hub_cache import find_snapshot, parse_hub_ref
from peft_core.errors import AdapterInUse, AdapterNotFound, StorageError, unwritable
from peft_core.paths import DataPaths
from peft_core.schemas.evaluation import Verdict
from peft_core.schemas.results import AdapterSummary, DeletedAdapter
from peft_core.system import in_use
from peft_core.system.allowed_paths import require_allowed
from peft_core.system.files import fsync_directory, fsync_file
from peft_core.system.lock import FileLock
from peft_core.system.user_paths import user_path

LOCK_TIMEOUT_S = 10.0  # the lock on a project's adapters is normally held for milliseconds


class Registry:
    """The published adapters of one data directory."""

    def __init__(self, paths: DataPaths, allowed_roots: Sequence[Path] | None = None) -> None:
        self._paths = paths
        self._allowed_roots = allowed_roots  # for adapters that were not trained here; None: no restriction

    def publish(self, draft: Path, project_id: str, adapter_id: str) -> Path:
        """Move a complete adapter from `draft` into the project, and make it current if its manifest requests that.

        `draft` must be on the same file system, as a job's directory is. After a crash, a second call completes the
        publication.
        """
        target = self._paths.adapter(project_id, adapter_id)
        if not target.exists():
            for file in draft.iterdir():
                # kill-point: runner: some files of the adapter are read-only (pass 3)
                fsync_file(file)
                # kill-point: runner: one file of the adapter is flushed to disk
                file.chmod(0o444)
            fsync_directory(draft)
        target.parent.mkdir(parents=True, exist_ok=True)
        with self._project_lock(project_id):
            if not target.exists():
                draft.rename(target)
                fsync_directory(target.parent)
            manifest = read_manifest(target)
            if manifest is None or manifest.becomes_current:
                # kill-point: runner: the adapter is published but not current
                self.set_current(project_id, adapter_id)
                # kill-point: runner: the adapter is published and current
        return target

    def set_current(self, project_id: str, adapter_id: str) -> None:
        """Point the project's `current` link to an adapter, atomically."""
        link = self._paths.current(project_id)
        new_link = link.with_name(f".current.{secrets.token_hex(4)}")
        new_link.symlink_to(adapter_id)
        new_link.replace(link)

    def published(self, project_id: str, adapter_id: str) -> Path | None:
        """Return the directory of an adapter; None if it is not published."""
        path = self._paths.adapter(project_id, adapter_id)
        return path if (path / MANIFEST_NAME).is_file() else None

    def require(self, project_id: str, adapter_id: str) -> Path:
        """Return the directory of a published adapter of this project.

        Raises:
            AdapterNotFound: there is no such adapter; the message names those that exist.
        """
        existing = _names(self._paths.adapters(project_id))
        # A listed name is one path component, so it cannot be '..' or a path.
        if adapter_id in existing and adapter_id != "current":
            return self._paths.adapter(project_id, adapter_id)
        raise _not_found(project_id, adapter_id, existing)

    def delete(self, project_id: str, adapter_id: str) -> DeletedAdapter:
        """Delete an adapter. If it was current, the newest remaining one that neither harms nor lost old code becomes current.

        The directory is renamed first, which removes the adapter from the project atomically; then its files are deleted.

        Raises:
            AdapterNotFound: the project has no adapter with this id.
            AdapterInUse: a process has loaded it, or exports or evaluates it.
            StorageError: the directory is not writable, or another process keeps it locked.
        """
        path = self.require(project_id, adapter_id)
        renamed = path.with_name(f".deleted.{adapter_id}.{secrets.token_hex(4)}")
        try:
            with self._project_lock(project_id), in_use.unused(path) as is_unused:
                self.require(project_id, adapter_id)  # again: another process may have deleted it
                if not is_unused:
                    raise AdapterInUse(
                        f"Adapter {adapter_id} is used by another process, so it was not deleted: it is loaded in another "
                        "server or in the endpoint, or is being exported or evaluated.",
                        suggestions=["Call stop_serving or unload_adapter there, or wait", "Then delete it again"],
                    )
                if self._current(project_id) == adapter_id:
                    self._replace_current(project_id, adapter_id)
                freed = sum(map(size_of, path.iterdir()))
                path.rename(renamed)
                current = self._current(project_id)
        except FileNotFoundError:  # the user removed it meanwhile
            raise _not_found(project_id, adapter_id, _names(path.parent)) from None
        except OSError as error:
            raise unwritable(path.parent, error) from error
        shutil.rmtree(renamed, ignore_errors=True)
        return DeletedAdapter(
            adapter_id=adapter_id,
            project_id=project_id,
            freed_bytes=freed,
            current=current,
            next=f"The current adapter of {project_id!r} is now {current}."
            if current
            else f"{project_id!r} has no current adapter now.",
        )

    @contextmanager
    def _project_lock(self, project_id: str) -> Iterator[None]:
        """Hold the lock on a project's list of adapters and its current adapter.

        Raises:
            StorageError: another process did not release the lock in time.
        """
        with FileLock(self._paths.adapters(project_id) / ".lock") as lock:
            if not lock.acquire(LOCK_TIMEOUT_S):
                raise StorageError(
                    f"Another process has locked the adapters of {project_id!r} for more than {LOCK_TIMEOUT_S:g} s.",
                    code="adapters_busy",
                    suggestions=["Try again; if the error persists, look for a suspended peft-mcp process and end it"],
                )
            yield

    def _replace_current(self, project_id: str, adapter_id: str) -> None:
        """Make the newest other adapter current that neither harms nor lost old code; remove the link if there is none."""
        candidates = [
            adapter
            for adapter in self.adapters(project_id)
            if adapter.adapter_id != adapter_id and adapter.verdict is not Verdict.HARMS and not adapter.loses
        ]
        if candidates:
            self.set_current(project_id, candidates[0].adapter_id)
        else:
            self._paths.current(project_id).unlink()

    def _current(self, project_id: str) -> str | None:
        """Return the id of the project's current adapter; None if it has none."""
        try:
            return self._paths.current(project_id).readlink().name
        except OSError:
            return None

    def adapters(self, project_id: str | None = None) -> list[AdapterSummary]:
        """Return the published adapters, newest first."""
        summaries = [self._summary(path, manifest) for path, manifest in self._manifests(project_id)]
        return sorted(summaries, key=lambda adapter: adapter.created_at, reverse=True)

    def projects(self) -> list[str]:
        """Return the ids of the projects with published adapters, sorted."""
        return sorted({project for project, _ in self._directories(None)})

    def current_adapters(self, count: int) -> list[AdapterSummary]:
        """Return the projects' current adapters that were made current last, newest first. Reads at most `count` manifests."""
        links = []
        for project in _names(self._paths.projects):
            with suppress(OSError):
                links.append((self._paths.current(project).lstat().st_mtime_ns, project))
        newest = [project for _, project in sorted(links, reverse=True)[:count]]
        paths = [self._paths.adapter(project, name) for project in newest if (name := self._current(project))]
        return [self._summary(path, manifest) for path in paths if (manifest := read_manifest(path))]

    def current_path(self, project_id: str) -> Path | None:
        """Return the directory of a project's current adapter; None if it has none."""
        name = self._current(project_id)
        return self.published(project_id, name) if name is not None else None

    def resolve_adapter(self, adapter_path: str, *, field: str = "adapter_path") -> Path:
        """Return the directory of an adapter, given as a path or as a project id (its current adapter).

        `field`: the request's name for it, for errors.

        Raises:
            AdapterNotFound: it is neither; the message names the projects that have adapters.
            InvalidArgument: the path is outside the allowed roots.
        """
        # A name that is too long, an unknown home directory or a NUL byte: no adapter has such a path.
        with suppress(OSError, RuntimeError, ValueError):
            if os.sep not in adapter_path and self._paths.current(adapter_path).is_dir():
                return self._paths.current(adapter_path).resolve()
            path = user_path(adapter_path)
            if path.is_absolute():
                require_allowed(field, path.resolve(), self._allowed_roots, also=[self._paths.projects])
            if path.is_absolute() and path.is_dir():
                return path.resolve()
            if path.is_absolute() and path.is_file():
                raise _is_a_file(path)
            if not path.is_absolute() and (snapshot := self._cached(adapter_path)) is not None:
                return snapshot
        published = list(self._directories(None))
        if not_current := [path.name for project, path in published if project == adapter_path]:
            raise AdapterNotFound(
                f"Project {adapter_path!r} has no current adapter: {', '.join(not_current)} "
                f"{'was' if len(not_current) == 1 else 'were'} not made current (by default, an adapter that harms is not).",
                suggestions=["Give the directory of an adapter: list_adapters returns the paths"],
                details={"adapter_path": adapter_path, "adapters": not_current},
            )
        projects = self.projects()
        raise AdapterNotFound(
            f"No adapter at {adapter_path!r}: it must be the absolute path of an adapter's directory, a project id, or a "
            "hub id ORG/NAME that is in the local cache. "
            + (f"Projects with an adapter: {', '.join(projects)}." if projects else "No adapter has been trained yet."),
            suggestions=[
                *([f"Run `hf download {adapter_path}` to put it into the cache"] if _is_hub_id(adapter_path) else []),
                "Call list_adapters to see the existing adapters" if projects else "Call train_adapter first",
            ],
            details={"adapter_path": adapter_path, "known": projects},
        )

    def _cached(self, adapter_path: str) -> Path | None:
        """Return the snapshot of an adapter in the local Hugging Face cache, given by its hub id. Nothing is downloaded.

        Raises:
            InvalidArgument: the cache is outside the allowed roots.
        """
        if not _is_hub_id(adapter_path):
            return None
        ref = parse_hub_ref(adapter_path)
        snapshot = find_snapshot(ref) if ref is not None else None
        if snapshot is None:
            return None
        require_allowed("adapter_path", snapshot.path, self._allowed_roots)
        return snapshot.path.resolve()

    def _manifests(self, project_id: str | None) -> Iterator[tuple[Path, Manifest]]:
        for _, path in self._directories(project_id):
            if manifest := read_manifest(path):
                yield path, manifest

    def _directories(self, project_id: str | None) -> Iterator[tuple[str, Path]]:
        """Yield (project id, directory) for each directory of one project, or of all projects."""
        projects = [project_id] if project_id else _names(self._paths.projects)
        for project in projects:
            for name in _names(self._paths.adapters(project)):
                if name != "current":
                    yield project, self._paths.adapter(project, name)

    def _summary(self, path: Path, manifest: Manifest) -> AdapterSummary:
        project_id = path.parent.parent.name  # a copied adapter has the manifest of the original
        return AdapterSummary(
            adapter_id=path.name,
            project_id=project_id,
            current=self._current(project_id) == path.name,
            created_at=manifest.created_at,
            base_model=manifest.base.name,
            base_id=f"{manifest.base.fingerprint.architecture}-{manifest.base.fingerprint.sample}",
            base_perplexity=manifest.metrics.base_perplexity,
            adapter_perplexity=manifest.metrics.adapter_perplexity,
            verdict=manifest.evaluation.verdict if manifest.evaluation else None,
            loses=manifest.loses,
            adapter_bytes=size_of(path / WEIGHTS),
            adapter_path=str(path),
        )


def _is_hub_id(adapter_path: str) -> bool:
    return adapter_path.count("/") == 1 and parse_hub_ref(adapter_path) is not None


def _is_a_file(path: Path) -> AdapterNotFound:
    """Return the error for the path of a file, with the directory to give instead if it is part of an adapter."""
    from peft_core.adapters.directory import is_archive  # noqa: PLC0415 -- not at the server's start

    suggestions = [f"Give {path.parent}"] if (path.parent / CONFIG).is_file() else []
    if is_archive(path):
        suggestions = ["Unpack the archive, and give the directory with the adapter"]
    return AdapterNotFound(
        f"{path} is a file. An adapter is a directory that contains {CONFIG} and {WEIGHTS} (or mlx-lm's adapters.safetensors).",
        suggestions=suggestions,
        details={"adapter_path": str(path)},
    )


def _not_found(project_id: str, adapter_id: str, existing: list[str]) -> AdapterNotFound:
    adapters = ", ".join(name for name in existing if name != "current") or "none"
    return AdapterNotFound(
        f"Project {project_id!r} has no adapter {adapter_id!r}. Its adapters: {adapters}.",
        suggestions=["Call list_adapters to see the ids"],
        details={"project_id": project_id, "known": existing},
    )


def size_of(path: Path) -> int:
    """Return the size of a regular file in bytes; 0 for anything else, including links."""
    try:
        status = path.lstat()
    except OSError:
        return 0
    return status.st_size if stat.S_ISREG(status.st_mode) else 0


def _names(directory: Path) -> list[str]:
    """Return the sorted names in a directory, without hidden ones; empty if it cannot be read."""
    try:
        return sorted(name for name in os.listdir(directory) if not name.startswith("."))  # noqa: PTH208 -- names only
    except OSError:
        return []
