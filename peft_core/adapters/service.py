"""List, describe, verify and delete the adapters on disk, and find the base model that an adapter was trained on.

Nothing in this package uses the inference process; see `peft_core.inference.service`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from peft_core.adapters.info import AdapterDocument, AdapterInfo, read_document, read_info
from peft_core.adapters.manifest import read_manifest
from peft_core.adapters.registry import Registry
from peft_core.config import Settings
from peft_core.errors import InvalidArgument
from peft_core.schemas.base_model import Base
from peft_core.schemas.results import (
    AdapterList,
    AdapterSummary,
    Compatibility,
    DeletedAdapter,
    MemoryState,
    NextStep,
)
from peft_core.schemas.staleness import Staleness


class AdapterService:
    """Blocking operations on adapter directories; the manager calls them in threads.

    `trained_on(adapter_id)` returns a reference to the base model of the job that trained an adapter, if it is known.
    """

    def __init__(self, settings: Settings, registry: Registry, trained_on: Callable[[str], str | None]) -> None:
        self._settings = settings
        self._registry = registry
        self._trained_on = trained_on

    def adapters(self, project_id: str | None) -> list[AdapterSummary]:
        """Return the published adapters, newest first."""
        return self._registry.adapters(project_id)

    def current_adapters(self, count: int) -> list[AdapterSummary]:
        """Return the newest current adapters of all projects, one for each project."""
        return self._registry.current_adapters(count)

    def resolve(self, adapter_path: str) -> Path:
        """Return the directory of an adapter, given as a path or as a project id (its current adapter).

        Raises:
            AdapterNotFound: there is no such directory and no such project.
            InvalidArgument: the path is outside the allowed roots.
        """
        return self._registry.resolve_adapter(adapter_path)

    def info(self, adapter_path: str) -> AdapterInfo:
        """Describe an adapter.

        Raises:
            AdapterNotFound, InvalidArgument, HeaderError: there is no such adapter, or its configuration is unreadable.
        """
        path = self.resolve(adapter_path)
        return read_info(path, trained_here=path.is_relative_to(self._settings.paths.projects))

    def document(self, project_id: str) -> AdapterDocument:
        """Return the manifest and model card of a project's current adapter.

        Raises:
            AdapterNotFound: the project has no current adapter.
        """
        return read_document(self.resolve(project_id))

    def verify(self, adapter_path: str, base_model: str | None, *, scan_weights: bool) -> Compatibility:
        """Check whether an adapter fits a base model. This takes milliseconds; `scan_weights` reads all weights as well.

        Raises:
            AdapterNotFound: there is no such adapter.
            InvalidArgument, BaseCheckpointError, HeaderError: the named base model cannot be found or read.
        """
        from peft_core.adapters.verify import verify  # noqa: PLC0415 -- not at the server's start

        directory = self.resolve(adapter_path)
        base = self._base(directory, base_model)
        if scan_weights and base is not None:
            from peft_core.base_models.fingerprint import content_hash  # noqa: PLC0415 -- not at the server's start

            fingerprint = base.fingerprint.model_copy(update={"content": content_hash(base.path)})
            base = base.model_copy(update={"fingerprint": fingerprint})
        return verify(directory, base, scan_weights=scan_weights)

    def adapter_and_base(self, adapter_path: str, base_model: str | None) -> tuple[Path, Base]:
        """Do the same as `adapters_and_base` for one adapter."""
        (directory,), base = self.adapters_and_base([adapter_path], base_model)
        return directory, base

    def adapters_and_base(self, adapter_paths: Sequence[str], base_model: str | None) -> tuple[list[Path], Base]:
        """Return the adapters' directories and a base model: the named one, else the first that one was trained on.

        Raises:
            AdapterNotFound: there is no such adapter.
            InvalidArgument: an adapter is invalid, or no base model was named and the adapters' own was not found.
            BaseCheckpointError, HeaderError: the named base model cannot be read.
        """
        directories = [self.resolve(path) for path in adapter_paths]
        for directory in directories:
            if (base := self._base(directory, base_model)) is not None:
                return directories, base
        for path, directory in zip(adapter_paths, directories, strict=True):
            self._require_valid(path, directory)
        raise InvalidArgument(
            "base_model",
            base_model,
            f"it must be given, because {'this' if len(directories) == 1 else 'neither'} adapter's manifest records "
            f"{'no' if len(directories) == 1 else 'a'} base model that is on this machine; a base model that only the "
            "configuration names is not used",
            suggestions=["Set base_model to a model directory, a .gguf file, a cached hub id or ollama:NAME"],
        )

    def would_download(self, base_model: str | None) -> str | None:
        """Return the hub id of the model that resolving this base model would download; None if it would not."""
        if not self._settings.allow_downloads:
            return None
        from peft_core.base_models.resolve import would_download  # noqa: PLC0415 -- not at the server's start

        return would_download(base_model, self._settings)

    def require_deletable(self, project_id: str, adapter_id: str, require_unused: Callable[[Path], None]) -> None:
        """Do the checks of `delete`, with its errors; nothing is deleted."""
        require_unused(self._registry.require(project_id, adapter_id))

    def delete(self, project_id: str, adapter_id: str, require_unused: Callable[[Path], None]) -> DeletedAdapter:
        """Delete an adapter that was trained here, unless `require_unused` raises for its directory.

        Raises:
            AdapterNotFound: the project has no adapter with this id; the message names those that it has.
            AdapterInUse: raised by `require_unused`.
        """
        self.require_deletable(project_id, adapter_id, require_unused)
        return self._registry.delete(project_id, adapter_id)

    def _base(self, directory: Path, base_model: str | None) -> Base | None:
        """Return the named base model, else the recorded one if it is on this machine."""
        from peft_core.base_models.resolve import resolve  # noqa: PLC0415 -- not at the server's start

        if base_model is not None:
            return resolve(base_model, self._settings)
        from peft_core.adapters.base_match import find_base  # noqa: PLC0415 -- not at the server's start
        from peft_core.base_models.resolve import candidates  # noqa: PLC0415 -- not at the server's start

        manifest = read_manifest(directory)
        if manifest is None:
            return None
        record = manifest.base
        trained_on = self._trained_on(directory.name)
        offline = self._settings.model_copy(update={"allow_downloads": False})

        def all_candidates() -> Iterable[Callable[[], Base]]:
            if trained_on is not None:
                yield lambda: resolve(trained_on, offline)
            yield from candidates(record.name, record.revision, self._settings)

        return find_base(record, all_candidates())

    def _require_valid(self, adapter_path: str, directory: Path) -> None:
        """Raise InvalidArgument if the check finds errors in the adapter without a base model."""
        from peft_core.adapters.verify import verify  # noqa: PLC0415 -- not at the server's start

        errors = [r for r in verify(directory, None).reasons if r.severity == "error" and r.code != "base_unknown"]
        if errors:
            raise InvalidArgument(
                "adapter_path",
                adapter_path,
                " ".join(reason.message for reason in errors[:3]),
                suggestions=[r.fix for r in errors[:1] if r.fix],
                code=errors[0].code,
            )


def list_of(
    adapters: Sequence[AdapterSummary], loaded: MemoryState, compared: Mapping[str, Staleness | None]
) -> AdapterList:
    """Return adapters with what is known besides: which are in memory, and by path how far their code has moved on."""
    active = {adapter.adapter_path: adapter.active for adapter in loaded.adapters}
    if adapters:
        reason = "get_adapter_info shows what was measured; load_adapter makes one usable."
        step = NextStep(tool="load_adapter", missing=("adapter_path",), reason=reason)
    else:
        missing = ("project_id", "training_data")
        step = NextStep(tool="train_adapter", missing=missing, reason="There is no adapter yet.")
    return AdapterList(
        adapters=[
            adapter.model_copy(
                update={
                    "resident": adapter.adapter_path in active,
                    "active": active.get(adapter.adapter_path, False),
                    "staleness": compared.get(adapter.adapter_path),
                }
            )
            for adapter in adapters
        ],
        loaded=loaded,
        not_compared=sum(adapter.current for adapter in adapters) - len(compared),
        next=step.sentence,
        next_step=step,
    )
