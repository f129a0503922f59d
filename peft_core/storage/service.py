"""List what is kept on disk, and free what the user names.

Nothing that is in use is freed: every deletion holds the lock that its users take, or the database, while it renames. Any
number of servers may free at the same time.
"""

from __future__ import annotations

import difflib
import os
import shutil
import stat
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from peft_core.adapters.registry import Registry
from peft_core.config import Settings
from peft_core.errors import AdapterNotFound, InvalidArgument, JobStateError, PeftMcpError, StorageError, unwritable
from peft_core.jobs.store import Store
from peft_core.schemas.results import NextStep
from peft_core.schemas.storage import DiskItem, DiskUsage, FreedItem, KeptItem, size_in_words
from peft_core.storage.deletion import delete, set_aside
from peft_core.storage.describe import Surroundings
from peft_core.storage.items import Item, conversion_lock, find_items
from peft_core.system import in_use
from peft_core.system.cleanup import FREED
from peft_core.system.lock import FileLock

MAX_LISTED = 40
MAX_NAMED = 3  # items that a sentence names
MAX_EXPLAINED = 2  # items whose reasons it gives
LOST = "`lost` says what would be lost with each item."
MAX_SUGGESTED = 8
AGAIN_WHEN_NEEDED = ("converted_base", "leftovers")  # what is freed without a loss

RequireUnused = Callable[[Path], None]


class StorageService:
    """Blocking operations; the manager calls them in threads."""

    def __init__(self, settings: Settings, registry: Registry) -> None:
        self._paths = settings.paths
        self._registry = registry
        self._store = Store(self._paths.database, time.time)

    def usage(self, names: Sequence[str], require_unused: RequireUnused) -> DiskUsage:
        """Free the named items, and then list everything that is kept.

        `require_unused` raises `AdapterInUse` for the directory of an adapter that this process uses.

        Raises:
            InvalidArgument: A name is not one of those that are listed; nothing was freed.
            StorageError: None of the named items could be freed.
        """
        freed, kept = self._free(names, require_unused) if names else ([], [])
        surroundings = Surroundings(self._paths, self._registry, self._store, require_unused)
        found = sorted(find_items(self._paths), key=lambda item: item.bytes, reverse=True)
        shown = [item for item in found if item.bytes or item.kind in ("adapter", "job", "export", "converted_base")]
        items = [surroundings.describe(item) for item in shown[:MAX_LISTED]]
        total, free = sum(item.bytes for item in found), _free_bytes(self._paths.root)
        step = _next_step(items)
        return DiskUsage(
            summary=" ".join([*_outcome(freed, kept), _totals(self._paths.root, total, free, items)]),
            data_directory=str(self._paths.root),
            total_bytes=total,
            free_bytes=free,
            items=items,
            omitted_items=len(shown) - len(items) or None,
            freed=freed,
            kept=kept,
            next=step.sentence if step is not None else LOST if any(item.can_free for item in items) else "",
            next_step=step,
        )

    def _free(self, names: Sequence[str], require_unused: RequireUnused) -> tuple[list[FreedItem], list[KeptItem]]:
        surroundings = Surroundings(self._paths, self._registry, self._store, require_unused)
        found = {item.name: item for item in find_items(self._paths)}
        named = dict.fromkeys(name if name in found else name.strip(" \t\r\n\"'`") for name in names)
        if unknown := [name for name in named if name not in found]:
            raise _unknown(unknown, found.values())
        freed, kept = [], []
        for name in named:
            described = surroundings.describe(found[name])
            if not described.can_free:
                kept.append(KeptItem(name=name, reason=described.reason))
                continue
            try:
                freed.append(FreedItem(name=name, bytes=self._free_item(found[name])))
            except (PeftMcpError, OSError) as error:
                if isinstance(error, FileNotFoundError | AdapterNotFound) and not os.path.lexists(found[name].path):
                    freed.append(FreedItem(name=name, bytes=0))  # another process was faster
                    continue
                known = error if isinstance(error, PeftMcpError) else unwritable(self._paths.root, error)
                kept.append(KeptItem(name=name, reason=str(known)))
        if not freed:
            raise StorageError(
                f"Nothing was freed. {' '.join(_reasons(kept))}",
                code="in_use",
                details={"kept": [item.model_dump() for item in kept]},
            )
        self._delete_what_is_set_aside()
        return freed, kept

    # -- one item ------------------------------------------------------------------------------------------------------

    def _free_item(self, item: Item) -> int:
        """Free an item and return how many bytes that freed.

        Raises:
            PeftMcpError: It came into use a moment ago, or it could not be deleted completely.
            OSError: It does not exist any more, or its directory is not writable.
        """
        match item.kind:
            case "adapter":
                freed = self._registry.delete(*item.names).freed_bytes
            case "logs":
                freed = sum(_empty(path) for path in item.paths)
            case "leftovers":
                freed = sum(self._free_leftover(path) for path in item.paths)
            case "job":
                with self._job_ended(item.names[0]):
                    hidden = _set_aside_unused(item.path)
                freed = _delete_completely(hidden)
            case "export":
                with _locked(self._paths.exports_lock, "An export is running. Wait for its end."):
                    hidden = set_aside(item.path)
                freed = _delete_completely(hidden)
                with suppress(OSError):  # it has other exports
                    item.path.parent.rmdir()
            case _:
                freed = _delete_completely(_set_aside_unused(item.path))
        return freed

    @contextmanager
    def _job_ended(self, job_id: str) -> Iterator[None]:
        """Keep a job that has ended from being resumed.

        Raises:
            JobStateError: It is waiting or running.
            StorageError: The database cannot be read.
        """
        if not self._store.exists:
            yield
            return
        with self._store.while_ended(job_id) as ended:
            if not ended:
                raise JobStateError("It was resumed a moment ago. Wait for its end, or call cancel_training.")
            yield

    def _free_leftover(self, path: Path) -> int:
        """Delete what a killed process left, unless a living one works at the same place by now."""
        lock = None
        if path.name.startswith(".converting-"):
            lock = conversion_lock(self._paths)
        elif path.parent.parent.name == "exports":
            lock = self._paths.exports_lock
        with suppress(FileNotFoundError):  # another process has deleted it
            if lock is None:
                return delete(path)
            with _locked(lock, "Another process works there. Try again in a minute."):
                hidden = set_aside(path)
            return delete(hidden)
        return 0

    def _delete_what_is_set_aside(self) -> None:
        """Finish what a killed process had begun to free."""
        for item in find_items(self._paths):
            if item.kind == "leftovers":
                for path in item.paths:
                    if path.name.startswith(FREED):
                        delete(path)


def _set_aside_unused(path: Path) -> Path:
    """Set an item aside.

    Raises:
        StorageError: A process uses it.
        OSError: It does not exist any more, or its directory is not writable.
    """
    with in_use.unused(path) as is_unused:
        if not is_unused:
            raise StorageError("It has come into use a moment ago.", code="in_use")
        return set_aside(path)


@contextmanager
def _locked(lock: Path, reason: str) -> Iterator[None]:
    with FileLock(lock) as held:
        if not held.acquire(0.2):
            raise StorageError(reason, code="in_use")
        yield


def _delete_completely(hidden: Path) -> int:
    """Delete what was set aside.

    Raises:
        StorageError: Some of it remains; the next call tries again.
    """
    freed = delete(hidden)
    if os.path.lexists(hidden):
        raise StorageError(
            f"Only {size_in_words(freed)} of it could be deleted; the rest is in {hidden}.",
            suggestions=["Make it writable and delete it by hand"],
        )
    return freed


def _empty(path: Path) -> int:
    """Truncate a log, which its writer only appends to; return its size."""
    descriptor = os.open(path, os.O_WRONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            return 0
        os.ftruncate(descriptor, 0)
        return status.st_size
    finally:
        os.close(descriptor)


# -- words -----------------------------------------------------------------------------------------------------------


def _outcome(freed: Sequence[FreedItem], kept: Sequence[KeptItem]) -> list[str]:
    sentences = []
    if freed:
        size = size_in_words(sum(item.bytes for item in freed))
        sentences.append(f"Freed {size}: {_some([item.name for item in freed])}.")
    if kept:
        sentences.append(f"Not freed: {' '.join(_reasons(kept))}")
    return sentences


def _reasons(kept: Sequence[KeptItem]) -> list[str]:
    more = len(kept) - MAX_EXPLAINED
    reasons = [f"{item.name}: {item.reason}" for item in kept[:MAX_EXPLAINED]]
    return [*reasons, f"{more} more could not be freed either."] if more > 0 else reasons


def _totals(root: Path, total: int, free: int, items: Sequence[DiskItem]) -> str:
    largest = [f"{item.name} ({size_in_words(item.bytes)})" for item in items[:MAX_NAMED] if item.bytes]
    of_which = f" Largest: {', '.join(largest)}." if largest else ""
    return f"{root} holds {size_in_words(total)}; {size_in_words(free)} are free on its disk.{of_which}"


def _next_step(items: Sequence[DiskItem]) -> NextStep | None:
    """Suggest to free what is made again when it is needed."""
    names = [item.name for item in items if item.can_free and item.kind in AGAIN_WHEN_NEEDED and item.bytes]
    if not names:
        return None
    return NextStep(
        tool="disk_usage",
        arguments={"free": names[:MAX_SUGGESTED]},
        reason="Converted bases are made again when they are needed; nothing else is lost with them.",
    )


def _unknown(names: Sequence[str], existing: Iterable[Item]) -> InvalidArgument:
    by_size = sorted(existing, key=lambda item: item.bytes, reverse=True)
    known = [item.name for item in by_size if item.kind not in ("database", "other")]
    similar = difflib.get_close_matches(names[0], known, n=MAX_NAMED)
    exist = list(dict.fromkeys([*similar, *known]))
    what = f"there are {_some(exist)}" if exist else "there is nothing that can be freed"
    return InvalidArgument(
        "free",
        names[0] if len(names) == 1 else list(names),
        f"must be names as disk_usage lists them: {what}",
        suggestions=["Call disk_usage without arguments to list all"],
    )


def _some(names: Sequence[str]) -> str:
    more = len(names) - MAX_NAMED
    return ", ".join(names[:MAX_NAMED]) + (f" and {more} more" if more > 0 else "")


def _free_bytes(root: Path) -> int:
    existing = next(path for path in (root, *root.parents) if path.exists())
    return shutil.disk_usage(existing).free
