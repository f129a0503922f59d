"""Compare repositories on disk, and their history, with a snapshot."""

from __future__ import annotations

from collections.abc import Sequence

from peft_core.data import git
from peft_core.data.selection import Selection
from peft_core.data.snapshot import Snapshot
from peft_core.data.sources import walk_sources
from peft_core.schemas.dataset import DataSource
from peft_core.schemas.staleness import Staleness
from peft_core.staleness.compare import Changes, compare
from peft_core.staleness.words import describe


def changes_in(
    snapshot: Snapshot, repositories: Sequence[DataSource], *, include: Sequence[str] = (), exclude: Sequence[str] = ()
) -> Changes:
    """Return what has changed in repositories since a training, among the files that the training would read now.

    Raises:
        DataError: 'too_many_files', 'git_directory'.
    """
    selection = Selection(tuple(include), tuple(exclude))
    return compare(snapshot, walk_sources(repositories, selection).files)


def staleness_of(
    snapshot: Snapshot, repositories: Sequence[DataSource], *, include: Sequence[str] = (), exclude: Sequence[str] = ()
) -> Staleness:
    """Return how far repositories, which must exist, have moved on since a training.

    Args:
        snapshot: Of the training.
        repositories: As the training was given them; the paths may be others.
        include: The training's config.include.
        exclude: The training's config.exclude.

    Raises:
        DataError: see `changes_in`.
    """
    changes = changes_in(snapshot, repositories, include=include, exclude=exclude)
    commits = commits_behind(snapshot, repositories)
    where = ", ".join(str(source.path) for source in repositories)
    return describe(changes, commits, source=where, had_commit=any(state.commit for state in snapshot.sources))


def commits_behind(snapshot: Snapshot, repositories: Sequence[DataSource]) -> int | None:
    """Return how many commits were made in all repositories since; None if it is not known of one that had a commit."""
    commit_of = {state.name: state.commit for state in snapshot.sources if state.commit is not None}
    counts = [
        git.commits_since(source.path, commit_of[source.name]) for source in repositories if source.name in commit_of
    ]
    known = [count for count in counts if count is not None]
    return sum(known) if known and len(known) == len(counts) else None
