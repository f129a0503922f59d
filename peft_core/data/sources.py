"""The sources of a dataset: usually one, or several repositories and files of records that are trained on together.

Of several sources, each has a name, the end of its path, which is put before the names of its files: `app/src/main.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from peft_core.data.exclusions import Exclusions
from peft_core.data.selection import Selection
from peft_core.data.walk import File, walk
from peft_core.schemas.dataset import DataSource


@dataclass(slots=True)
class SourceFiles:
    """The files of all repositories among the sources."""

    files: list[File] = field(default_factory=list)  # sorted by name
    exclusions: Exclusions = field(default_factory=Exclusions)
    by_git: list[DataSource] = field(default_factory=list)  # the repositories whose files git listed


def unique_names(paths: Sequence[Path]) -> list[str]:
    """Return the shortest ends of the paths that differ; no names for a single path.

    >>> unique_names([Path('/new/app'), Path('/old/app'), Path('/new/web')])
    ['new/app', 'old/app', 'web']
    """
    if len(paths) == 1:
        return [""]
    all_parts = [[part for part in path.parts if part != path.anchor] for path in paths]
    names = []
    for parts in all_parts:
        lengths = (n for n in range(1, len(parts)) if [other[-n:] for other in all_parts].count(parts[-n:]) == 1)
        names.append("/".join(parts[-next(lengths, len(parts)) :]))
    return names


def walk_sources(repositories: Sequence[DataSource], selection: Selection) -> SourceFiles:
    """Return the files of all repositories. A file of two of them, one inside the other, belongs to the inner one.

    Raises:
        DataError: see `walk`.
    """
    found = SourceFiles()
    for source in repositories:
        tree = walk(source.path, selection)
        if tree.by_git:
            found.by_git.append(source)
        inner = tuple(
            f"{other.path.relative_to(source.path).as_posix()}/"
            for other in repositories
            if other.path != source.path and other.path.is_relative_to(source.path)
        )
        found.files += [
            replace(file, name=f"{source.prefix}{file.name}") if source.prefix else file
            for file in tree.files
            if not (inner and file.name.startswith(inner))
        ]
        for names in tree.exclusions.names.values():
            names[:] = [f"{source.prefix}{name}" for name in names]
        found.exclusions.update(tree.exclusions)
    if len(repositories) > 1:
        found.files.sort(key=lambda file: file.name)
    return found
