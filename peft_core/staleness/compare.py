"""Compare the files of a code base with the snapshot that a training took of it.

In: the snapshot, and the files that `walk_sources` finds now. Out: `Changes`. Bytes are compared first; only files that differ
are cut into units again, and of many such files a random sample that is always the same.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

from peft_core.data.examples import printable_path
from peft_core.data.snapshot import FileState, Snapshot, has_secret_name
from peft_core.data.split import order_key
from peft_core.data.units import file_digest, units_of_file
from peft_core.data.walk import File

_MAX_CUT_BYTES = 400_000  # of changed files that are cut, which takes a third of a second
_ORDER_SEED = 0


@dataclass(frozen=True)
class Changes:
    """What differs between a snapshot and the files now. A file that was only moved has not changed."""

    files: int  # then or now
    changed: int
    new: int
    deleted: int
    units_now: float
    units_unknown: float  # of those now, not in the snapshot
    units_then: float
    in_common: (
        float | None
    )  # units that both are known to have, as a share of the smaller one, 0 to 1; None: none known
    is_estimate: bool  # whether units are extrapolated from a sample of the files

    @property
    def any(self) -> bool:
        return bool(self.changed or self.new or self.deleted)

    @property
    def share(self) -> float | None:
        """The share of the units now that are not in the snapshot, 0 to 1; None if no units were recorded."""
        return self.units_unknown / self.units_now if self.units_now and self.units_then else None


@dataclass
class _Sorted:
    """The files now, by what has become of them."""

    same: list[FileState] = field(default_factory=list)
    changed: list[tuple[File, FileState]] = field(default_factory=list)
    new: list[File] = field(default_factory=list)
    deleted: int = 0


def compare(snapshot: Snapshot, files: Sequence[File]) -> Changes:
    """Return what has changed since the snapshot was taken."""
    found = _sort(snapshot, files)
    to_cut = [file for file, before in found.changed if before.units is not None] + found.new
    units, unknown, is_sample = _cut(to_cut, snapshot.units)
    # A short training cuts a random part of the files. The others are taken to have as many units.
    recorded = [file for file in snapshot.files if file.units is not None]
    units_per_file = sum(len(file.unit_digests) for file in recorded) / max(1, len(recorded))
    uncut_changed = units_per_file * sum(before.units is None for _, before in found.changed)
    # How much of them has changed is known from the files that were cut, if any of those has changed, and is otherwise taken to
    # be everything: one more file of the usual size, wholly changed, is added to the evidence.
    share = (unknown + units_per_file) / (units + units_per_file) if units_per_file else 1.0
    same = sum(units_per_file if file.units is None else len(file.unit_digests) for file in found.same)
    units_then = units_per_file * len(snapshot.files)
    smaller = min(same + units, units_then - uncut_changed)
    return Changes(
        files=len(found.same) + len(found.changed) + len(found.new) + found.deleted,
        changed=len(found.changed),
        new=len(found.new),
        deleted=found.deleted,
        units_now=same + units + uncut_changed,
        units_unknown=unknown + uncut_changed * share,
        units_then=units_then,
        in_common=min(1.0, (same + units - unknown) / smaller) if smaller > 0 else None,
        is_estimate=is_sample or len(recorded) < len(snapshot.files),
    )


def _sort(snapshot: Snapshot, files: Sequence[File]) -> _Sorted:
    found = _Sorted()
    gone = {file.path: file for file in snapshot.files}
    added: list[tuple[File, str]] = []
    for file in files:
        before = gone.get(printable_path(file.name))
        digest = file_digest(file)
        if digest is None:
            continue
        if before is None:
            added.append((file, digest))
            continue
        del gone[before.path]
        if before.digest == digest:
            found.same.append(before)
        else:
            found.changed.append((file, before))
    moved: defaultdict[str, list[FileState]] = defaultdict(list)
    for state in gone.values():
        moved[state.digest].append(state)
    for file, digest in added:
        if moved[digest]:
            found.same.append(moved[digest].pop())
        elif not has_secret_name(printable_path(file.name)):  # such a file is not recorded, see `snapshot.state_of`
            found.new.append(file)
    found.deleted = sum(map(len, moved.values()))
    return found


def _cut(files: Sequence[File], known: frozenset[str]) -> tuple[float, float, bool]:
    """Return the number of units in files, how many of them are not known, and whether both are extrapolated by size."""
    size = units = unknown = 0
    in_order = sorted(files, key=lambda file: order_key(file.name, _ORDER_SEED))
    cut = 0
    for file in in_order:
        if cut and size + file.size > _MAX_CUT_BYTES:
            break
        cut += 1
        size += file.size
        digests = [unit.digest for unit in units_of_file(file)]
        units += len(digests)
        unknown += sum(digest not in known for digest in digests)
    scale = sum(file.size for file in files) / size if size else 1.0
    return units * scale, unknown * scale, cut < len(files)
