"""Where an export is written: a directory that appears only when it is complete and compared."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from pydantic import ValidationError

from peft_core.errors import HeaderError, InvalidArgument, StorageError, sanitize
from peft_core.export.request import MANIFEST_NAME
from peft_core.paths import DataPaths
from peft_core.schemas.export import ExportedFile
from peft_core.schemas.frozen import FrozenModel
from peft_core.system.allowed_paths import require_output_path
from peft_core.system.files import fsync_directory, fsync_file, read_small
from peft_core.system.user_paths import user_path

_STAGING, _REPLACED = "exporting", "replaced"
_MAX_MANIFEST_BYTES = 4 << 20
_NAMED_FILES = 3  # in an error


class _Manifest(FrozenModel):
    """What `export.json` says in every version, and nothing else is likely to say."""

    to: str
    format: str
    adapter_id: str
    files: tuple[ExportedFile, ...]  # without itself


def default_output(paths: DataPaths, adapter: Path, to: str, format_name: str) -> Path:
    """Return the directory for an export without output_path, below the adapter's project."""
    directory = f"{to}-{format_name}" if to in ("merged", "gguf-lora") else to
    if adapter.is_relative_to(paths.projects):
        return paths.exports(adapter.parent.parent.name) / adapter.name / directory
    where = hashlib.sha256(str(adapter).encode()).hexdigest()[:8]  # adapters from elsewhere may share a name
    return paths.exports("other") / f"{adapter.name}-{where}" / directory


def require_output(output_path: str, paths: DataPaths, allowed_roots: Sequence[Path] | None) -> Path:
    """Return the directory that the user asked for.

    Raises:
        InvalidArgument: It is not an absolute path, or nothing may be written there.
    """
    try:
        path = user_path(output_path)
    except RuntimeError:  # the home directory is unknown
        path = Path(output_path)
    if "\0" in output_path or not path.is_absolute() or not path.name:
        raise InvalidArgument("output_path", output_path, "must be the absolute path of a directory, which is created")
    path = Path(os.path.normpath(path))
    if path.suffix.lower() in (".gguf", ".safetensors", ".json"):
        raise InvalidArgument(
            "output_path",
            output_path,
            "must be a directory, which is created: an export has several files",
            suggestions=[f"Give {path.with_suffix('')}"],
        )
    require_output_path(path, data_dir=paths.root, exports=paths.projects, allowed_roots=allowed_roots)
    return path


def require_free(directory: Path, *, overwrite: bool) -> None:
    """Check that nothing is in the way: only an empty directory, or, if `overwrite`, an earlier export and nothing else in it.

    Raises:
        InvalidArgument: Something else is there, or where an earlier export is moved to.
    """
    replaced = _replaced(directory)
    if os.path.lexists(replaced) and not _holds_only_export(replaced):
        raise _in_the_way(
            directory,
            f"{replaced}, where an earlier export is kept while it is replaced, holds something else, which is left alone",
            f"Move {replaced.name} to another place",
            "Or give another output_path",
        )
    if not os.path.lexists(directory):
        existing = next(parent for parent in directory.parents if os.path.lexists(parent))
        if not existing.is_dir():
            raise InvalidArgument("output_path", str(directory), f"{existing} is not a directory")
        return
    if _is_directory(directory) and not any(directory.iterdir()):
        return
    others = _not_exported(directory)
    if others is None:
        raise _in_the_way(
            directory,
            "something that is no export is already there; it is never overwritten",
            "Give a new directory",
        )
    if others:
        raise _in_the_way(
            directory,
            f"an export is already there, with {_in_words(others)} beside it that the export does not list and that would be "
            "lost; it is never overwritten",
            "Use the export that is there",
            "Or move what is yours to another place, or give another output_path",
        )
    if not overwrite:
        raise _in_the_way(
            directory,
            "an export is already there, and it is not overwritten unless overwrite=true",
            "Use the one that is there",
            "Or set overwrite=true, or another output_path",
        )


def _in_the_way(directory: Path, problem: str, *suggestions: str) -> InvalidArgument:
    return InvalidArgument("output_path", str(directory), problem, suggestions=suggestions, code="export_exists")


def _in_words(names: Sequence[str]) -> str:
    named = ", ".join(sanitize(name, limit=60) for name in names[:_NAMED_FILES])
    return named if len(names) <= _NAMED_FILES else f"{named} and {len(names) - _NAMED_FILES} more"


def _is_directory(path: Path) -> bool:
    return path.is_dir() and not path.is_symlink()


def _not_exported(directory: Path) -> list[str] | None:
    """Return the sorted names in a directory that do not belong to the export there; None if no export is there."""
    exported = _exported(directory)
    if exported is None:
        return None
    return sorted(
        entry.name
        for entry in directory.iterdir()
        if entry.name not in exported or entry.is_symlink() or not entry.is_file()
    )


def _exported(directory: Path) -> frozenset[str] | None:
    """Return the names of the files of an export; None if the directory has no manifest of one."""
    if not _is_directory(directory):
        return None
    try:
        raw = read_small(directory / MANIFEST_NAME, _MAX_MANIFEST_BYTES)
        manifest = _Manifest.model_validate_json(raw, extra="ignore")
    except (HeaderError, ValidationError):
        return None
    return frozenset({MANIFEST_NAME, *(file.path for file in manifest.files)})


def _holds_only_export(directory: Path) -> bool:
    """Return whether a directory is an export without anything else, or empty."""
    return _not_exported(directory) == [] or (_is_directory(directory) and not any(directory.iterdir()))


def _remove_export(directory: Path) -> None:
    """Delete an export, and the directory unless something else is in it. The manifest is the last file to go."""
    exported = _exported(directory) or frozenset()
    with suppress(OSError):
        for file in directory.iterdir():
            if file.name in exported and file.name != MANIFEST_NAME:
                file.unlink()
        if exported:
            (directory / MANIFEST_NAME).unlink()
        directory.rmdir()


def staging_directory(directory: Path, token: str) -> Path:
    """Return the hidden directory that an export is written to first."""
    return directory.with_name(f".{directory.name}.{_STAGING}-{token}")


def _left_by_killed(directory: Path) -> list[Path]:
    """Return the hidden directories that killed exports were writing. They have no manifest yet: the token is the sign."""
    name = re.compile(re.escape(staging_directory(directory, "").name) + "[0-9a-f]{8}")
    return [path for path in directory.parent.iterdir() if name.fullmatch(path.name)]


def _replaced(directory: Path) -> Path:
    """Return where an earlier export is while the new one takes its place."""
    return directory.with_name(f".{directory.name}.{_REPLACED}")


@contextmanager
def staged(directory: Path, token: str, *, overwrite: bool) -> Iterator[Path]:
    """Yield a hidden directory beside `directory`, and rename it at the end. If the block raises, it is removed.

    One export at a time may run. What a killed one left behind is removed; an earlier export that it had moved aside returns.

    Raises:
        StorageError: The place is not writable.
        InvalidArgument: Something is in the way.
    """
    replaced = _replaced(directory)
    staging = staging_directory(directory, token)
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        if _holds_only_export(replaced) and not os.path.lexists(directory):
            replaced.rename(directory)
        for leftover in _left_by_killed(directory):
            shutil.rmtree(leftover, ignore_errors=True)
        if _holds_only_export(replaced):
            _remove_export(replaced)
        require_free(directory, overwrite=overwrite)
        # kill-point: export worker: nothing is written
        staging.mkdir()
    except OSError as error:
        raise _unwritable(directory, error) from error
    try:
        yield staging
        # kill-point: export worker: the files are written and compared
        for file in staging.iterdir():
            fsync_file(file)
        fsync_directory(staging)
        require_free(directory, overwrite=overwrite)
        _publish(staging, directory, replaced)
    except OSError as error:
        raise _unwritable(directory, error) from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _publish(staging: Path, directory: Path, replaced: Path) -> None:
    """Rename the complete export to its place. An earlier one is moved aside first: two renames, then it is deleted."""
    earlier = directory.is_dir() and any(directory.iterdir())
    if earlier:
        directory.rename(replaced)
        # kill-point: export worker: the earlier export is moved aside
    staging.rename(directory)  # replaces an empty directory
    fsync_directory(directory.parent)
    # kill-point: export worker: the export is in its place, the earlier one still there
    if earlier:
        _remove_export(replaced)


def _unwritable(directory: Path, error: OSError) -> StorageError:
    return StorageError(
        f"{directory} cannot be written: {error.strerror or error}.",
        code="output_unwritable",
        suggestions=["Set output_path to a directory in a writable place with free space"],
        details={"path": str(directory)},
    )
