"""Why files and examples are excluded, how many of which kind, and what to do about it."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from enum import StrEnum

MAX_FILE_BYTES = 1_000_000
_MAX_EXTENSIONS = 20  # named per reason
_MAX_SHOWN_NAMES = 5
_EXTENSION = re.compile(r"\.[\w+#~-]{1,20}")
# Directories that count as vendored, but hold what a tool installed or built.
_NEVER_BY_HAND = re.compile(
    r"(^|/)(node_modules|bower_components|jspm_packages|(site|dist)-packages|__pycache__|deriveddata|dist|build|target|out|obj"
    r"|bazel-out|htmlcov|\.?v?env\d*|virtualenv)/",
    re.IGNORECASE,
)
OTHER = "other"
NO_EXTENSION = "without extension"
DIRECTORY = "directory"


class ExclusionReason(StrEnum):
    """Why a file or an example was excluded. The values are shown, counted and stored, so they must not change."""

    BINARY = "binary"
    BROKEN_NOTEBOOK = "broken_notebook"  # not JSON, or not in the format of notebooks
    CHANGED = "changed"  # or deleted, while it was read
    DATA = "data"  # a table, not code
    DUPLICATE = "duplicate"
    EMPTY = "empty"
    EXCLUDED = "excluded"  # by config.exclude
    GENERATED = "generated"
    HELD_OUT_BEFORE = "held_out_before"  # by the adapter that the run continues from, so it is never trained on
    HIDDEN = "hidden"
    IGNORED = "ignored"
    LFS_POINTER = "lfs_pointer"  # stands for a file that Git LFS has not fetched
    LICENCE = "licence"
    LOCK_FILE = "lock_file"
    MAYBE_TRAINED_ON = "maybe_trained_on"  # by an adapter that is evaluated; its fingerprint is a sample
    MINIFIED = "minified"
    NEAR_DUPLICATE = "near_duplicate"
    NESTED_REPOSITORY = "nested_repository"  # an untracked directory with a repository of its own
    NOTEBOOK_COMMAND = "notebook_command"  # a line or cell of a notebook: a command to its kernel or to a shell
    NOT_CHECKED_OUT = "not_checked_out"  # tracked, but outside of a sparse checkout
    NOT_INCLUDED = "not_included"  # by config.include
    OVER_FILE_SHARE = "over_file_share"  # of a file so large that it would dominate the training set
    NO_CODE = "no_code"
    NOT_NEEDED = "not_needed"  # the run ends before it would read the file, or use the example
    NOT_TEXT = "not_text"
    PLACEHOLDER = "placeholder"  # stands for a file elsewhere: git-annex, or a symbolic link that was written as a file
    SECRET = "secret"  # noqa: S105 - the name of a reason
    SEEN_IN_TRAINING = "seen_in_training"  # held out, but half of its lines are in the training set
    SENSITIVE = "sensitive"
    SPECIAL = "special"
    # Study items, see `data/study/items.py`.
    STUDY_BROKEN_CODE = "study_item_does_not_parse"
    STUDY_NAMES_NOTHING = "study_item_names_nothing"  # that the repository defines
    STUDY_UNKNOWN_API = "study_item_of_unknown_api"
    STUDY_UNKNOWN_NAME = "study_item_invents_names"
    SUBMODULE = "submodule"
    SYMLINK = "symlink"
    TINY = "tiny"
    TOO_LARGE = "too_large"
    TOO_LONG = "too_long"
    UNCHANGED = "unchanged"  # known to the adapter that the run continues from, and not in the sample that is repeated
    TURNS_TOO_LONG = "later_turns_too_long"  # answers of a conversation whose first ones fit
    CHAT_TEMPLATE = "chat_template"  # a conversation that the base model's template does not write
    TRAINED_ON = "trained_on"  # by the adapter that is evaluated, or by both that are compared
    TRAINED_ON_BY_A = "trained_on_by_adapter_a"  # and not by the one that it is compared with
    TRAINED_ON_BY_B = "trained_on_by_adapter_b"
    UNMERGED = "unmerged"  # has a merge conflict
    UNREADABLE = "unreadable"
    VENDORED = "vendored"


# Reasons that the user may want to remedy, most important first: what is left out, and what to do. `{names}` are examples.
_ADVICE = {
    ExclusionReason.LFS_POINTER: ("file", "not fetched from Git LFS ({names}): run `git lfs pull`"),
    ExclusionReason.SUBMODULE: (
        "submodule",
        "not read ({names}): give it in config.more_sources, after `git submodule update --init` if it is empty",
    ),
    ExclusionReason.NESTED_REPOSITORY: (
        "inner repository",
        "not read ({names}): give the directory in config.more_sources, or as training_data",
    ),
    ExclusionReason.NOT_CHECKED_OUT: (
        "file",
        "outside of the sparse checkout ({names}): run `git sparse-checkout disable`",
    ),
    ExclusionReason.UNMERGED: ("file", "in a merge conflict ({names}): resolve it, and run `git add`"),
    ExclusionReason.PLACEHOLDER: (
        "file",
        "a placeholder of a file elsewhere ({names}): run `git annex get`, or use a file system with symbolic links",
    ),
    ExclusionReason.BROKEN_NOTEBOOK: ("notebook", "broken ({names}): open it in Jupyter and save it again"),
    ExclusionReason.VENDORED: (
        "vendored file or directory",
        "not read ({names}): name the directory in config.include if it is your own code",
    ),
    ExclusionReason.GENERATED: (
        "generated file",
        "not read ({names}): name it in config.include if it was written by hand",
    ),
}


@dataclass(slots=True)
class Exclusions:
    """Counts what was excluded: by reason, files also by extension, and a few names per reason as examples."""

    reasons: Counter[str] = field(default_factory=Counter)
    extensions: dict[str, Counter[str]] = field(default_factory=lambda: defaultdict(Counter))
    remediable: Counter[str] = field(default_factory=Counter)  # those that `advice` is about
    names: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))

    def add(self, reason: ExclusionReason, name: str, *, is_directory: bool = False) -> None:
        """Count a file or a directory. `name` is relative to the root and may contain any character."""
        self.reasons[reason] += 1
        self.extensions[reason][DIRECTORY if is_directory else extension_of(name)] += 1
        if reason not in _ADVICE or (reason is ExclusionReason.VENDORED and _NEVER_BY_HAND.search(name)):
            return
        self.remediable[reason] += 1
        if len(self.names[reason]) < _MAX_SHOWN_NAMES:
            self.names[reason].append(name)

    def update(self, other: Exclusions) -> None:
        self.reasons.update(other.reasons)
        self.remediable.update(other.remediable)
        for reason, counts in other.extensions.items():
            self.extensions[reason].update(counts)
        for reason, names in other.names.items():
            self.names[reason] += names[: _MAX_SHOWN_NAMES - len(self.names[reason])]

    @property
    def by_extension(self) -> dict[str, dict[str, int]]:
        """How many files were excluded per reason and extension, the most frequent first."""
        return {str(reason): _most_common(counts) for reason, counts in sorted(self.extensions.items()) if counts}

    @property
    def advice(self) -> tuple[str, ...]:
        """What the user may do about it, most important first."""
        sentences = []
        for reason, (noun, text) in _ADVICE.items():
            if count := self.remediable[reason]:
                names = ", ".join(map(_printable, self.names[reason]))
                subject = f"1 {noun} is" if count == 1 else f"{count} {_plural(noun)} are"
                sentences.append(f"{subject} {text.format(names=names)}")
        return tuple(sentences)


def _plural(noun: str) -> str:
    return {
        "inner repository": "inner repositories",
        "vendored file or directory": "vendored files or directories",
    }.get(noun, f"{noun}s")


def extension_of(name: str) -> str:
    """Return the extension as it is counted: in lower case with its dot, or the whole name of a file such as `.gitignore`."""
    last = name.rpartition("/")[2]
    dot = last.rfind(".")
    if dot < 0:
        return NO_EXTENSION
    extension = last[dot:].lower()
    return extension if _EXTENSION.fullmatch(extension) else OTHER


def _most_common(counts: Counter[str]) -> dict[str, int]:
    ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    most = dict(ordered[:_MAX_EXTENSIONS])
    if rest := sum(count for _, count in ordered[_MAX_EXTENSIONS:]):
        most[OTHER] = most.get(OTHER, 0) + rest
    return most


def _printable(name: str) -> str:
    return "".join(character if character.isprintable() else "\N{REPLACEMENT CHARACTER}" for character in name)[-60:]
