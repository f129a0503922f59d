"""The files that a request wants of a repository: config.include and config.exclude.

The patterns are those of `.gitignore`. Without `include`, every file is wanted. An include pattern that *names* what is left
out by default takes it in: `vendor/ours/` names the directory `vendor`, `ui_*.h` names generated files, and `*.yaml` names an
extension that counts as configuration. `src/**` and `*` name nothing.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

from peft_core.data.exclusions import ExclusionReason

if TYPE_CHECKING:  # pathspec takes 100 ms to import, and few requests need it
    from collections.abc import Sequence

    from pathspec import GitIgnoreSpec

UNMATCHED_PATTERN = "pattern_matches_no_file"  # the code of the error about one
_WILDCARDS = "*?[]!"
_TAKEN_IN = {
    ExclusionReason.VENDORED,
    ExclusionReason.GENERATED,
    ExclusionReason.HIDDEN,
    ExclusionReason.MINIFIED,
    ExclusionReason.NO_CODE,
}


@dataclass(slots=True)
class Selection:
    """Decides about names, which are relative to the root, and remembers which patterns matched."""

    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    matched: set[str] = field(default_factory=set)
    _specs: dict[str, GitIgnoreSpec] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self:
            return
        from pathspec import GitIgnoreSpec  # noqa: PLC0415 - slow to import, rarely needed

        self._specs = {pattern: GitIgnoreSpec.from_lines([pattern]) for pattern in (*self.include, *self.exclude)}

    def __bool__(self) -> bool:
        return bool(self.include or self.exclude)

    @property
    def unmatched(self) -> tuple[str, ...]:
        """The patterns that matched no name so far."""
        return tuple(pattern for pattern in (*self.include, *self.exclude) if pattern not in self.matched)

    def why_unwanted(self, name: str) -> ExclusionReason | None:
        """Return why a file is not wanted, or None."""
        excluded = self._matching(self.exclude, name)
        if self.include and not self._matching(self.include, name):
            return ExclusionReason.NOT_INCLUDED
        return ExclusionReason.EXCLUDED if excluded else None

    def enters(self, directory: str) -> bool:
        """Return whether a directory that is left out by default may hold files that an include pattern names."""
        return any(_names_directory(pattern, directory) for pattern in self.include)

    def takes_in(self, name: str, reason: ExclusionReason, directory: str = "") -> bool:
        """Return whether a file is wanted although it is left out by default, because of itself or of a directory above it."""
        if reason not in _TAKEN_IN:
            return False
        patterns = self._matching(self.include, name)
        if directory:
            return any(_names_directory(pattern, directory) for pattern in patterns)
        return any(_names_file(pattern, extension_suffices=reason is ExclusionReason.NO_CODE) for pattern in patterns)

    def _matching(self, patterns: Sequence[str], name: str) -> list[str]:
        found = [pattern for pattern in patterns if self._specs[pattern].match_file(name)]
        self.matched.update(found)
        return found


def _names_directory(pattern: str, directory: str) -> bool:
    return any(
        part.strip(_WILDCARDS) and fnmatchcase(directory.lower(), part.lower()) for part in pattern.split("/") if part
    )


def _names_file(pattern: str, *, extension_suffices: bool) -> bool:
    if pattern.endswith("/"):
        return False
    stem, _, extension = pattern.rpartition("/")[2].rpartition(".")
    return bool(stem.strip(_WILDCARDS) or (extension_suffices and extension.strip(_WILDCARDS)))
