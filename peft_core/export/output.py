"""Where an export is written: a directory that appears only when it is complete and compared."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from peft_core.errors import InvalidArgument, StorageError
from peft_core.export.request import MANIFEST_NAME
from peft_core.paths import DataPaths
from peft_core.system.allowed_paths import require_output_path
from peft_core.system.files import fsync_directory, fsync_file
from peft_core.system.user_paths import user_path

_STAGING, _REPLACED = "exporting", "replaced"


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
    """Check that nothing is in the way: only an empty directory, or an earlier export if `overwrite`.

    Raises:
        InvalidArgument: Something else is there.
    """
    if not os.path.lexists(directory):
        existing = next(parent for parent in directory.parents if os.path.lexists(parent))
        if not existing.is_dir():
            raise InvalidArgument("output_path", str(directory), f"{existing} is not a directory")
        return
    if directory.is_dir() and not directory.is_symlink():
        if not any(directory.iterdir()):
            return
        if overwrite and (directory / MANIFEST_NAME).is_file():
            return
        if (directory / MANIFEST_NAME).is_file():
            raise InvalidArgument(
                "output_path",
                str(directory),
                "an export is already there, and it is not overwritten unless overwrite=true",
                suggestions=["Use the one that is there", "Or set overwrite=true, or another output_path"],
                code="export_exists",
            )
    raise InvalidArgument(
        "output_path",
        str(directory),
        "something that is no export is already there; it is never overwritten",
        suggestions=["Give a new directory"],
        code="export_exists",
    )


def staging_directory(directory: Path, token: str) -> Path:
    """Return the hidden directory that an export is written to first."""
    return directory.with_name(f".{directory.name}.{_STAGING}-{token}")


@contextmanager
def staged(directory: Path, token: str, *, overwrite: bool) -> Iterator[Path]:
    """Yield a hidden directory beside `directory`, and rename it at the end. If the block raises, it is removed.

    One export at a time may run. What a killed one left behind is removed; an earlier export that it had moved aside returns.

    Raises:
        StorageError: The place is not writable.
        InvalidArgument: Something is in the way.
    """
    replaced = directory.with_name(f".{directory.name}.{_REPLACED}")
    staging = staging_directory(directory, token)
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        if replaced.is_dir() and not os.path.lexists(directory):
            replaced.rename(directory)
        for leftover in directory.parent.glob(f".{directory.name}.{_STAGING}-*"):
            shutil.rmtree(leftover, ignore_errors=True)
        shutil.rmtree(replaced, ignore_errors=True)
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
        shutil.rmtree(replaced, ignore_errors=True)


def _unwritable(directory: Path, error: OSError) -> StorageError:
    return StorageError(
        f"{directory} cannot be written: {error.strerror or error}.",
        code="output_unwritable",
        suggestions=["Set output_path to a directory in a writable place with free space"],
        details={"path": str(directory)},
    )
