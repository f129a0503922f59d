"""Whether a training continues from an adapter, its parent, and what it takes over from it.

`config.continue_from` names the parent. Without it, the parent is the project's current adapter, if nothing speaks against it;
what does is said in the answer, and the training starts from scratch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from peft_core.adapters.base_match import find_base, match_base
from peft_core.adapters.config_check import LoraSettings
from peft_core.adapters.directory import explain, is_adapter
from peft_core.adapters.files import AdapterFiles, read_adapter
from peft_core.adapters.layout import PEFT
from peft_core.adapters.manifest import Manifest, read_manifest
from peft_core.adapters.registry import Registry
from peft_core.adapters.verify import verify_files
from peft_core.base_models.resolve import candidates, resolve
from peft_core.config import Settings
from peft_core.data.catch_up import nothing_to_catch_up
from peft_core.data.examples import printable_path
from peft_core.data.leakage import read_fingerprint
from peft_core.data.selection import Selection
from peft_core.data.snapshot import Snapshot, read_snapshot
from peft_core.data.sources import walk_sources
from peft_core.errors import AdapterNotFound, InvalidArgument, sanitize
from peft_core.schemas.base_model import Base
from peft_core.schemas.dataset import DataSource, SourceKind, SourceSummary
from peft_core.schemas.results import BaseMatch
from peft_core.schemas.training import FROM_SCRATCH, ContinuedAdapter, TrainingConfig
from peft_core.staleness.compare import compare

FIELD = "config.continue_from"
MAX_CHANGED_SHARE = 0.5  # of the units: beyond it, a training from scratch takes hardly longer and is the better one
_SAME_WEIGHTS = (BaseMatch.EXACT, BaseMatch.SAMPLED)
_MAX_ALPHA = 4096  # of `TrainingConfig`
_BY_TIME = "What it held out stays held out, and of new files random ones join it, whatever config.held_out_by says. "
_START_OVER = f"To train from scratch, set {FIELD} = '{FROM_SCRATCH}'"


class Adapters(NamedTuple):
    """Where parents are found."""

    registry: Registry
    project_id: str | None  # None: a dry run, which belongs to no project
    trained_on: Callable[[str], str | None]  # a reference to the base model of the job that trained an adapter


class SourceChanges(NamedTuple):
    """How the files of repositories differ from what an adapter was trained on; without the files that it held out."""

    files: int
    changed_files: int  # of `files`; new ones included
    units: int
    changed_units: int
    records: int  # of other sources, which are compared when the job runs
    is_estimate: bool = False  # whether units are extrapolated from a sample of the files

    @property
    def share(self) -> float:
        """Share of the units that are new or have changed, 0 to 1."""
        return self.changed_units / self.units if self.units else 1.0

    @property
    def is_nothing(self) -> bool:
        return not self.changed_units and not self.records

    @property
    def in_words(self) -> str:
        if not self.files:
            return f"what is new of {self.records} records"
        files = f"{self.changed_files} of {self.files} files that it may learn from"
        return f"{files} are new or have changed, {self.percent} of the units"

    @property
    def percent(self) -> str:
        return "less than 1 %" if self.share < 0.01 else f"{'about ' * self.is_estimate}{100 * self.share:.0f} %"


class Continuation(NamedTuple):
    """What a training starts from."""

    config: TrainingConfig  # with what the parent determines
    parent: ContinuedAdapter | None = None
    changes: SourceChanges | None = None  # set with `parent`
    reason: str = ""  # a sentence for the answer


class _Unsuitable(Exception):
    """An adapter cannot, or should not, be continued; the text is the reason."""


@dataclass(frozen=True)
class _Parent:
    path: Path
    manifest: Manifest
    settings: LoraSettings
    snapshot: Snapshot
    weights_sha256: str

    @property
    def name(self) -> str:
        return f"adapter {_name(self.path)}"

    @property
    def never_shown(self) -> str:
        """A sentence on what the parent's training was too short for; empty if it has seen all."""
        run, prepared = self.manifest.run, self.manifest.data.summary.train_examples
        seen = prepared if run.examples_seen is None else run.examples_seen
        # Of a code base that is too large for its snapshot, no file has units.
        unread = sum(file.part == "unused" and file.units is None for file in self.snapshot.files)
        unread = unread if self.snapshot.units else 0
        if seen >= prepared and not unread:
            return ""
        files = (
            f" of the files that were read, and {unread} {'file was' if unread == 1 else 'files were'} not"
            if unread
            else ""
        )
        return (
            f"But the training of {self.name} was short: it has seen {seen} of the {prepared} examples that were "
            f"prepared{files}; what it has not seen does not count as changed. To train on all of it, set "
            "config.continue_from = 'none' and config.num_epochs = 1."
        )


def resolve_base(config: TrainingConfig, settings: Settings, adapters: Adapters | None) -> Base:
    """Return the base model to train on: the given one, else that of the adapter to continue from, else the default.

    Raises:
        InvalidArgument, AdapterNotFound, BaseCheckpointError, HeaderError: it cannot be found or read.
    """
    named = config.continue_from
    if config.base_model is not None or adapters is None or named in (None, FROM_SCRATCH):
        return resolve(config.base_model, settings)
    path = adapters.registry.resolve_adapter(named, field=FIELD)
    manifest = read_manifest(path)
    if manifest is None:
        return resolve(None, settings)
    record, trained_on = manifest.base, adapters.trained_on(path.name)
    offline = settings.model_copy(update={"allow_downloads": False})
    known = [] if trained_on is None else [lambda: resolve(trained_on, offline)]
    found = find_base(record, [*known, *candidates(record.name, record.revision, settings)])
    return found or resolve(None, settings)


def plan_continuation(
    config: TrainingConfig, base: Base, source: SourceSummary, adapters: Adapters | None
) -> Continuation:
    """Find the parent, check it against the base model and the settings, and compare the sources with what it was trained on.

    Raises:
        InvalidArgument, AdapterNotFound: the adapter that the request names cannot be continued.
        DataError: 'nothing_to_catch_up'.
    """
    named = config.continue_from
    if adapters is None or named == FROM_SCRATCH:
        return Continuation(config)
    if named is not None:
        path = adapters.registry.resolve_adapter(named, field=FIELD)
        try:
            parent = _read_parent(path, base)
        except _Unsuitable as why:
            raise InvalidArgument(FIELD, named, str(why), suggestions=[_START_OVER]) from None
        if (conflict := _conflict(config, parent)) is not None:
            raise conflict
        return _continue(config, source, parent)
    current = None if adapters.project_id is None else adapters.registry.current_path(adapters.project_id)
    if current is None:
        return Continuation(config)
    try:
        return _continue_current(config, base, source, current)
    except _Unsuitable as why:
        return Continuation(config, reason=f"Starts from scratch: {str(why).rstrip('.')}.")


def _continue_current(config: TrainingConfig, base: Base, source: SourceSummary, current: Path) -> Continuation:
    """Continue from a project's current adapter.

    Raises:
        _Unsuitable: a training from scratch is what the request means, or is better.
        DataError: 'nothing_to_catch_up'.
    """
    parent = _read_parent(current, base)
    if (conflict := _conflict(config, parent)) is not None:
        raise _Unsuitable(conflict.details["allowed"])
    if not parent.snapshot.files or source.kind is not SourceKind.REPOSITORY:
        raise _Unsuitable("only trainings on repositories continue from the current adapter by default")
    continuation = _continue(config, source, parent)
    changes = continuation.changes
    if changes is not None and changes.share > MAX_CHANGED_SHARE:
        raise _Unsuitable(f"{changes.percent} of the units are new or have changed since {parent.name} was trained")
    return continuation


def _read_parent(path: Path, base: Base) -> _Parent:
    """Return an adapter that can be continued on this base model.

    Raises:
        AdapterNotFound: the directory is not an adapter's.
        _Unsuitable: it cannot be continued, and why.
    """
    if not is_adapter(path):
        found = explain(path)
        raise AdapterNotFound(f"{FIELD} = {str(path)!r} cannot be used: {found.problem}", suggestions=[found.fix])
    problem = next(_problems(read_adapter(path), base), None)
    snapshot = read_snapshot(path)
    if problem is None and (snapshot is None or read_fingerprint(path) is None):
        problem = (
            "it has no readable record of its training data, as an adapter of an older version, so what it held out could not "
            "be kept out of training"
        )
    # The weights are read last: those of any other adapter may be gigabytes.
    files = read_adapter(path, weights="skip" if problem else "scan")
    problem = problem or next(_problems(files, base), None)
    if problem is None and files.manifest and files.settings and files.sha256 and snapshot:
        return _Parent(path, files.manifest, files.settings, snapshot, files.sha256)
    raise _Unsuitable(f"adapter {_name(path)} cannot be continued: {problem or 'its files have just changed'}")


def _problems(files: AdapterFiles, base: Base) -> Iterator[str]:
    """Yield why an adapter cannot be continued, the most telling reason first."""
    manifest, settings = files.manifest, files.settings
    if files.layout is not PEFT:
        yield "it has the format of mlx-lm; give the adapter that it was exported from"
    if manifest is None:
        yield "it has no manifest, so nothing says what it was trained on; give an adapter that train_adapter made"
        return
    if match_base(manifest.base, base)[0] not in _SAME_WEIGHTS:
        yield f"it was trained on {sanitize(manifest.base.name)}, and this training is on {base.name}"
    if manifest.harms:
        yield "its verdict is 'harms', so the training would begin worse than the base model"
    errors = [reason.message for reason in verify_files(files, base).reasons if reason.severity == "error"]
    if errors or settings is None:
        yield " ".join(errors[:2]) or "its files cannot be read"
    elif settings.rank_pattern or settings.alpha_pattern or settings.trained_biases != "none":
        yield "its modules have different ranks, alphas or biases, which those of a training here do not"
    elif settings.alpha > _MAX_ALPHA:
        yield f"its alpha is {settings.alpha:g}, and that of a training is at most {_MAX_ALPHA}"


def _name(path: Path) -> str:
    """Return an adapter's id for people: a directory may have any name."""
    return sanitize(path.name, limit=60)


def _conflict(config: TrainingConfig, parent: _Parent) -> InvalidArgument | None:
    """Return the error for the first setting that was given and that the parent has otherwise."""
    inherited = {
        "rank": parent.settings.rank,
        "alpha": parent.settings.alpha,
        "use_rslora": parent.settings.use_rslora,
        "target_modules": parent.manifest.run.config.target_modules,
    }
    for name, value in inherited.items():
        given = getattr(config, name)
        if name not in config.model_fields_set or given is None or _same(given, value):
            continue
        allowed = f"{parent.name}, which the training would continue from, has {name} = {value!r}"
        return InvalidArgument(f"config.{name}", given, allowed, suggestions=[f"Omit config.{name}", _START_OVER])
    return None


def _same(given: object, inherited: object) -> bool:
    return (
        set(given) == set(inherited) if isinstance(given, list) and isinstance(inherited, list) else given == inherited
    )


def _continue(config: TrainingConfig, source: SourceSummary, parent: _Parent) -> Continuation:
    before = parent.manifest.run.config
    update = {
        "rank": parent.settings.rank,
        "alpha": parent.settings.alpha,
        "use_rslora": parent.settings.use_rslora,
        "target_modules": before.target_modules,
    }
    update |= {name: getattr(before, name) for name in ("max_length", "mixture") if name not in config.model_fields_set}
    selection = Selection(tuple(config.include), tuple(config.exclude))
    changes = changes_in_sources(parent.snapshot, source, selection)
    if changes.is_nothing:
        raise nothing_to_catch_up(parent.name, parent.never_shown)
    by_time = _BY_TIME if config.held_out_by == "time" else ""
    reason = f"Continues from {parent.name}: {changes.in_words}. {by_time}{_START_OVER}."
    reason = f"{reason} {parent.never_shown}".rstrip()
    continued = ContinuedAdapter(
        adapter_path=parent.path, adapter_id=_name(parent.path), weights_sha256=parent.weights_sha256
    )
    return Continuation(config.model_copy(update=update), continued, changes, reason)


def changes_in_sources(snapshot: Snapshot, source: SourceSummary, selection: Selection) -> SourceChanges:
    """Compare repositories with what they were. `source`: with all its sources."""
    main = [] if source.path is None else [DataSource(path=source.path, kind=source.kind, name=source.name)]
    repositories = [each for each in (*main, *source.more_sources) if each.kind is SourceKind.REPOSITORY]
    held_out = {file.path for file in snapshot.files if file.part == "held_out"}
    found = walk_sources(repositories, selection).files if repositories else []
    files = [file for file in found if printable_path(file.name) not in held_out]
    changes = compare(snapshot, files)
    # A file that was not cut into units, in a short training or now, may have a change that nothing is known of.
    may_differ = changes.is_estimate and bool(changes.changed or changes.new)
    changed = math.ceil(changes.units_unknown) or int(may_differ)
    return SourceChanges(
        files=len(files),
        changed_files=changes.changed + changes.new,
        units=round(changes.units_now),
        changed_units=changed,
        records=source.examples or 0,
        is_estimate=changes.is_estimate,
    )
