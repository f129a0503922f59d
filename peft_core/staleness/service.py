"""Say how far the code has moved on since an adapter was trained here."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import anyio
from anyio.to_thread import run_sync

from peft_core.config import Settings
from peft_core.errors import DataError, InvalidArgument
from peft_core.schemas.dataset import DatasetSpec, DataSource, SourceKind
from peft_core.schemas.results import AdapterSummary
from peft_core.schemas.staleness import Staleness
from peft_core.system.allowed_paths import require_data_path

COMPARE_WAIT_S = 2.5  # how long a call waits for comparisons: the first takes 0.4 CPU-seconds, the others 0.01 to 0.5


class StalenessService:
    """Compares adapters with their code.

    `dataset_of(adapter_id)` returns what the job that trained an adapter was given, or None if that cannot be read any more.
    """

    def __init__(self, settings: Settings, dataset_of: Callable[[str], DatasetSpec | None]) -> None:
        self._settings = settings
        self._dataset_of = dataset_of
        # A comparison that is not waited for any more continues until git has answered; threads that wait must not pile up.
        self._one_at_a_time = threading.Lock()

    def of(self, adapter: Path) -> Staleness | None:
        """Return how far the code of an adapter has moved on; None if it was not trained here, or not on code."""
        if not adapter.is_relative_to(self._settings.paths.projects):
            return None
        spec = self._dataset_of(adapter.name)
        if spec is None:
            return unknown("the job that trained the adapter, which names it, was deleted or cannot be read.")
        repositories = [source for source in spec.sources if source.kind is SourceKind.REPOSITORY]
        if not repositories:
            return None
        problem = self._why_not_read(repositories)
        return unknown(problem) if problem else _staleness(adapter, repositories, spec)

    async def within(self, seconds: float, adapter_path: str | None) -> Staleness | None:
        """Do as `of` in a thread, and wait for so many seconds; 0: nothing is compared. None without an adapter."""
        if adapter_path is None or seconds <= 0:
            return None
        with anyio.move_on_after(seconds):
            return await run_sync(self._of_in_turn, Path(adapter_path), seconds, abandon_on_cancel=True)
        return unknown(f"comparing it takes more than {seconds:g} s.")

    async def of_current(self, adapters: Sequence[AdapterSummary], seconds: float) -> dict[str, Staleness | None]:
        """Return the staleness of the current adapters among these, by path: of as many as so many seconds allow."""
        found: dict[str, Staleness | None] = {}

        def compare() -> None:
            deadline = time.monotonic() + seconds
            for adapter in adapters:
                remaining_s = deadline - time.monotonic()
                if remaining_s <= 0:
                    return
                if adapter.current:
                    found[adapter.adapter_path] = self._of_in_turn(Path(adapter.adapter_path), remaining_s)

        with anyio.move_on_after(seconds):
            await run_sync(compare, abandon_on_cancel=True)
        return dict(found)

    def _of_in_turn(self, adapter: Path, seconds: float) -> Staleness | None:
        """Do as `of`, after the comparison that another thread is making; wait for it for so many seconds at most."""
        if not self._one_at_a_time.acquire(timeout=seconds):
            return unknown("another comparison takes its time.")
        try:
            return self.of(adapter)
        finally:
            self._one_at_a_time.release()

    def _why_not_read(self, repositories: Sequence[DataSource]) -> str | None:
        for source in repositories:
            try:
                require_data_path(
                    source.path, data_dir=self._settings.data_dir, allowed_roots=self._settings.allowed_roots
                )
            except InvalidArgument:
                return f"{source.path} may not be read with the present settings."
            if not source.path.is_dir():
                return f"{source.path}, which it was trained on, does not exist any more."
        return None


def _staleness(adapter: Path, repositories: Sequence[DataSource], spec: DatasetSpec) -> Staleness:
    # These imports would slow the server's start.
    from peft_core.data.snapshot import SNAPSHOT_FILE_NAME, read_snapshot  # noqa: PLC0415
    from peft_core.staleness.repository import staleness_of  # noqa: PLC0415

    snapshot = read_snapshot(adapter)
    if snapshot is None or not snapshot.files:
        return unknown(f"the adapter's directory has no readable {SNAPSHOT_FILE_NAME}, the record of what it was.")
    try:
        return staleness_of(snapshot, repositories, include=spec.include, exclude=spec.exclude)
    except DataError as error:
        return unknown(error.message)


def unknown(reason: str) -> Staleness:
    """Return that nothing can be said, with the reason: the end of a sentence."""
    return Staleness(text=f"It is not known how far the code has moved on: {reason}")
