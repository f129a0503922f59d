"""Find the code units of an adapter, and say how far the code has moved on."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, Collection
from pathlib import Path

from anyio.to_thread import run_sync

from peft_core.adapters.manifest import read_manifest
from peft_core.errors import InvalidArgument
from peft_core.paths import DataPaths, adapter_names
from peft_core.schemas.retrieval import UnitSource
from peft_core.schemas.staleness import Staleness

TOO_STALE_PERCENT = 50.0  # of the units changed: most of what would be found is not in the code any more


class RetrievalService:
    """`staleness_of(adapter_path)` returns how far the code has moved on; None: it was not trained on code."""

    def __init__(self, paths: DataPaths, staleness_of: Callable[[str], Awaitable[Staleness | None]]) -> None:
        self._paths = paths
        self._staleness_of = staleness_of

    async def source_of(self, adapter: Path) -> UnitSource:
        """Return where the code units of an adapter are.

        Raises:
            InvalidArgument: 'no_retrieval_index', 'other_retrieval_index', 'stale_retrieval_index'.
        """
        source = await run_sync(source_of, self._paths, adapter)
        staleness = await self._staleness_of(str(adapter))
        if staleness is None or staleness.in_brief == "up to date":
            return source
        if (staleness.units_changed_percent or 0) > TOO_STALE_PERCENT:
            raise _refused(
                f"most of the code that {_name(adapter)} was trained on has changed since: {staleness.text}",
                "stale_retrieval_index",
                f"Call refresh_project(project_id={adapter.parent.parent.name!r}), which trains on the code as it is now",
            )
        return source.model_copy(update={"note": " ".join(filter(None, [source.note, staleness.text]))})


def source_of(paths: DataPaths, adapter: Path) -> UnitSource:
    """Return where the code units of an adapter are, whatever has become of the code since.

    Raises:
        InvalidArgument: 'no_retrieval_index', 'other_retrieval_index'.
    """
    if not adapter.is_relative_to(paths.projects):
        raise _refused(
            f"{_name(adapter)} was not trained on this machine, so the code that it was trained on is not known",
            "no_retrieval_index",
            "Train an adapter on this code with train_adapter",
        )
    examples = _examples(paths, adapter)
    manifest = read_manifest(adapter)
    parent = None if manifest is None else manifest.run.continued_from
    earlier = earlier_examples(paths, adapter.parent, parent, seen={adapter.name})
    examples += [file for file in earlier if file.is_file()]
    missing = sum(not file.is_file() for file in earlier)
    noun = "training" if missing == 1 else "trainings"
    note = f"The code of {missing} earlier {noun} that it continues was deleted." if missing else ""
    return UnitSource(adapter_path=adapter, examples=tuple(examples), note=note)


def training_code(paths: DataPaths, adapter: Path) -> tuple[Path, ...]:
    """Return the files of the examples that an adapter was trained on; none if they are not on this machine."""
    try:
        return source_of(paths, adapter).examples
    except InvalidArgument:
        return ()


def earlier_examples(paths: DataPaths, adapters: Path, parent: str | None, *, seen: Collection[str] = ()) -> list[Path]:
    """Return the training examples of an adapter and of those that it continues; files may have been deleted.

    Args:
        paths: Of the data directory.
        adapters: The directory of the project's adapters.
        parent: The adapter; None: there is none.
        seen: Adapters that are not followed: a manifest may be forged.
    """
    line: list[str] = []
    while parent is not None and parent not in (*line, *seen):
        line.append(parent)
        manifest = read_manifest(adapters / parent)
        parent = None if manifest is None else manifest.run.continued_from
    return [paths.job(adapter_id).dataset / "train.jsonl" for adapter_id in line]


def _examples(paths: DataPaths, adapter: Path) -> list[Path]:
    dataset, manifest = paths.job(adapter.name).dataset, read_manifest(adapter)
    project = adapter.parent.parent.name
    again = f"Train again on the same code: train_adapter(project_id={project!r}, training_data=...)"
    try:
        prepared = json.loads((dataset / "manifest.json").read_bytes())["dataset"]["summary"]["sha256"]
    except (OSError, ValueError, KeyError, TypeError):
        prepared = None
    if prepared is None or not (dataset / "train.jsonl").is_file():
        raise _refused(
            f"the code that {_name(adapter)} was trained on is not kept any more: the files of job {adapter.name} were "
            "deleted, or it was trained elsewhere",
            "no_retrieval_index",
            again,
        )
    if manifest is None or manifest.data.summary.sha256 != prepared:
        raise _refused(
            f"the files of job {adapter.name} hold another version of the code than {_name(adapter)} was trained on",
            "other_retrieval_index",
            again,
        )
    return [dataset / "train.jsonl"]


def _name(adapter: Path) -> str:
    return adapter_names([adapter])[0]


def _refused(reason: str, code: str, suggestion: str) -> InvalidArgument:
    return InvalidArgument("retrieve", True, reason, code=code, suggestions=[suggestion, "Or omit retrieve"])
