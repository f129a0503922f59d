"""Find the files of a repository that may hold code, and count what is excluded by name, size and type.

In: the root directory, and the selection of the request. Out: a `Tree`. Of most files only the name is looked at
(`classification.py`); small files may be placeholders, and files whose name does not tell are opened to see whether they are
code. The others are read later, see `read_text.py`.

If git knows the directory, git's list of files is used. Otherwise the directories are walked and `.gitignore` files are obeyed;
a directory that is not entered counts as one exclusion, because counting its files would mean entering it.
"""

from __future__ import annotations

import itertools
import os
import stat
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from peft_core.data import git
from peft_core.data.classification import (
    NOTEBOOK,
    SNIFFED_BYTES,
    classify,
    classify_directory,
    language_without_row,
    sniffed_language,
)
from peft_core.data.exclusions import MAX_FILE_BYTES, ExclusionReason, Exclusions
from peft_core.data.languages import Language, language_of_file
from peft_core.data.notebook import MAX_NOTEBOOK_BYTES
from peft_core.data.read_text import MAX_POINTER_BYTES, MIN_POINTER_BYTES, decode_head, placeholder, read_head
from peft_core.data.selection import Selection
from peft_core.errors import DataError

if TYPE_CHECKING:  # pathspec takes 100 ms to import, and only directories without git need it
    from pathspec import GitIgnoreSpec

    Rules = tuple[tuple[str, GitIgnoreSpec], ...]  # directory and its .gitignore, outermost first

MAX_ENTRIES = 500_000
_LIKELY_POINTER_BYTES = (
    300  # files of this size are opened here; a longer pointer, which is rare, is found when it is read
)


@dataclass(frozen=True, slots=True)
class File:
    path: str | Path  # a text where there are many: they cost less
    name: str  # relative to the root, separated by '/'; may contain any character that a file name can
    language: Language
    size: int
    is_named: bool = False  # by config.include: it is read although it may be generated


@dataclass(frozen=True, slots=True)
class Tree:
    files: list[File]  # sorted by name
    exclusions: Exclusions
    by_git: bool  # whether git listed the files

    @property
    def left_out(self) -> Counter[str]:
        return self.exclusions.reasons


def walk(root: Path, selection: Selection | None = None) -> Tree:
    """Return every file below root that may hold code.

    Raises:
        DataError: 'too_many_files', more than a code base has; 'git_directory'.
    """
    if git.is_git_directory(root):
        raise DataError(
            f"{root} is the inside of a git repository (a bare repository, or a .git directory), which holds no files to read.",
            code="git_directory",
            suggestions=("Give the directory with the files: run `git clone` or `git worktree add` to get one",),
        )
    walker = _Walker(root, selection or Selection())
    names = git.listed_files(root)
    files = walker.listed(names) if names is not None else walker.scanned()
    return Tree(files=sorted(files, key=lambda file: file.name), exclusions=walker.exclusions, by_git=names is not None)


class _Walker:
    def __init__(self, root: Path, selection: Selection) -> None:
        self.root = root
        self.selection = selection
        self.exclusions = Exclusions()

    # With git.

    def listed(self, names: list[str]) -> Iterator[File]:
        """Yield the files that git lists, without those that are not to be read."""
        if len(names) > MAX_ENTRIES:
            raise _too_many(self.root)
        unusual = git.unusual_entries(self.root)
        directories = _Directories(self.root)
        for name in names:
            directory, _, last = name.rpartition("/")
            is_inside, reason, part = directories.look_up(directory)
            if name == "./":  # the root is a submodule without files
                continue
            if not last:  # git lists a repository inside this one by its directory
                self.exclusions.add(ExclusionReason.NESTED_REPOSITORY, name, is_directory=True)
            elif not is_inside or name.startswith("/"):
                self.exclusions.add(ExclusionReason.SYMLINK, name)
            else:
                file = self._listed_file(name, last, unusual.get(name), reason, part)
                if file is not None:
                    yield file

    def _listed_file(
        self,
        name: str,
        last: str,
        unusual: ExclusionReason | None,
        directory_reason: ExclusionReason | None,
        directory: str,
    ) -> File | None:
        path = f"{self.root}/{name}"
        language, is_named = self._language(name, last, directory_reason, directory)
        is_no_file = unusual in (ExclusionReason.SUBMODULE, ExclusionReason.UNMERGED)
        reason = unusual if is_no_file else None
        if reason is None and isinstance(language, ExclusionReason):
            is_missing = unusual is ExclusionReason.NOT_CHECKED_OUT and not os.path.lexists(path)
            reason = ExclusionReason.NOT_CHECKED_OUT if is_missing else language
        if reason is None and not isinstance(language, ExclusionReason):
            status = _status_of(path, unusual)
            if not isinstance(status, ExclusionReason):
                return self._file(path, name, language, status, is_named=is_named)
            reason = status
        if reason is not None:
            is_directory = reason in (ExclusionReason.SUBMODULE, ExclusionReason.NESTED_REPOSITORY)
            self.exclusions.add(reason, name, is_directory=is_directory)
        return None

    # Without git.

    def scanned(self) -> Iterator[File]:
        """Yield the files below the root, without those that are ignored or not to be read."""
        entries_seen = 0
        # Without git, a repository at the root may still have submodules.
        has_git = (self.root / ".git").exists()
        stack: list[tuple[str, Rules]] = [("", ())]
        while stack:
            directory, rules = stack.pop()
            try:
                with os.scandir(self.root / directory) as listing:
                    entries = list(itertools.islice(listing, MAX_ENTRIES + 1 - entries_seen))
            except OSError:
                self.exclusions.add(ExclusionReason.UNREADABLE, directory, is_directory=True)
                continue
            entries_seen += len(entries)
            if entries_seen > MAX_ENTRIES:
                raise _too_many(self.root)
            names = {entry.name for entry in entries}
            if "pyvenv.cfg" in names:  # a virtual environment of any name
                self.exclusions.add(ExclusionReason.VENDORED, directory, is_directory=True)
                continue
            if directory and has_git and ".git" in names:
                self.exclusions.add(ExclusionReason.NESTED_REPOSITORY, directory, is_directory=True)
                continue
            if ".gitignore" in names:
                rules = (*rules, (directory, _ignore_rules(self.root / directory / ".gitignore")))
            for entry in entries:
                result = self._scanned_entry(entry, f"{directory}{entry.name}", rules)
                if isinstance(result, File):
                    yield result
                elif result is not None:
                    stack.append((result, rules))

    def _scanned_entry(self, entry: os.DirEntry[str], name: str, rules: Rules) -> File | str | None:
        """Return a file to read, the name of a directory to enter (with a '/'), or None after counting it."""
        if entry.is_symlink():
            self.exclusions.add(_link_reason(entry.path), name)
            return None
        if not entry.is_dir(follow_symlinks=False):
            return self._scanned_file(entry, name, rules)
        directory = f"{name}/"
        reason = classify_directory(entry.name, by_git=False)
        if reason is not None and self.selection.include and self.selection.enters(entry.name):
            reason = None
        if reason is None and _is_ignored(directory, rules):
            reason = ExclusionReason.IGNORED
        if reason is None:
            return directory
        self.exclusions.add(reason, directory, is_directory=True)
        return None

    def _scanned_file(self, entry: os.DirEntry[str], name: str, rules: Rules) -> File | None:
        directory_reason, directory = None, ""
        if self.selection.include:  # a directory that is left out by default may have been entered
            directory_reason, directory = _directory_reason(name.split("/")[:-1], by_git=False)
        language, is_named = self._language(name, entry.name, directory_reason, directory)
        reason = language if isinstance(language, ExclusionReason) else None
        if reason is None and _is_ignored(name, rules):
            reason = ExclusionReason.IGNORED
        if reason is None:
            try:
                status = entry.stat(follow_symlinks=False)
            except FileNotFoundError:
                reason = ExclusionReason.CHANGED
            except OSError:
                reason = ExclusionReason.UNREADABLE
        if reason is not None:
            self.exclusions.add(reason, name)
            return None
        assert not isinstance(language, ExclusionReason)  # noqa: S101 - it would be the reason
        return self._file(entry.path, name, language, status, is_named=is_named)

    # Both.

    def _language(
        self, name: str, last: str, directory_reason: ExclusionReason | None, directory: str
    ) -> tuple[Language | ExclusionReason | None, bool]:
        """Return the language of a file by its name (None if that does not tell) or why it is not read.

        The second value says whether an include pattern names the file, so that it is read although it may be generated.
        """
        if not self.selection:
            return directory_reason or classify(last), False
        if reason := self.selection.why_unwanted(name):
            return reason, False
        if directory_reason is not None and not self.selection.takes_in(name, directory_reason, directory):
            return directory_reason, False
        language = classify(last)
        if isinstance(language, ExclusionReason) and self.selection.takes_in(name, language):
            language = language_of_file(last) or language_without_row(last)
        return language, self.selection.takes_in(name, ExclusionReason.GENERATED)

    def _file(
        self, path: str, name: str, language: Language | None, status: os.stat_result, *, is_named: bool
    ) -> File | None:
        reason = _exclusion_by_status(path, status, MAX_NOTEBOOK_BYTES if language is NOTEBOOK else MAX_FILE_BYTES)
        if reason is None and MIN_POINTER_BYTES <= status.st_size <= _LIKELY_POINTER_BYTES:
            reason = placeholder(read_head(path, MAX_POINTER_BYTES))
        if reason is None and language is None:
            head = decode_head(read_head(path, SNIFFED_BYTES))
            if isinstance(head, ExclusionReason):
                reason = head
            else:
                language = sniffed_language(name, head)
        if reason is not None or language is None:
            self.exclusions.add(reason or ExclusionReason.NO_CODE, name)
            return None
        return File(path=path, name=name, language=language, size=status.st_size, is_named=is_named)


class _Directories:
    """Looks up whether directories in git's list lead below the root, and whether their names tell that they are left out.

    The repository controls git's list, which may name a file behind a link.
    """

    def __init__(self, root: Path) -> None:
        self._root = os.path.realpath(root)
        self._known: dict[str, tuple[bool, ExclusionReason | None, str]] = {"": (True, None, "")}

    def look_up(self, directory: str) -> tuple[bool, ExclusionReason | None, str]:
        """Return whether a directory is inside, why its files are left out, and the name in the path that says so."""
        if directory not in self._known:
            path = f"{self._root}/{directory}"
            reason, part = _directory_reason(directory.split("/"), by_git=True)
            self._known[directory] = (os.path.realpath(path) == path, reason, part)
        return self._known[directory]


def _directory_reason(parts: list[str], *, by_git: bool) -> tuple[ExclusionReason | None, str]:
    for part in parts:
        if reason := classify_directory(part, by_git=by_git):
            return reason, part
    return None, ""


def _status_of(path: str, unusual: ExclusionReason | None) -> os.stat_result | ExclusionReason:
    """Return the status of a file that git lists, or why it is no file to read."""
    try:
        status = os.lstat(path)
    except FileNotFoundError:  # tracked, and deleted in the work tree
        is_sparse = unusual is ExclusionReason.NOT_CHECKED_OUT
        return ExclusionReason.NOT_CHECKED_OUT if is_sparse else ExclusionReason.CHANGED
    except OSError:
        return ExclusionReason.UNREADABLE
    if unusual is ExclusionReason.SYMLINK and stat.S_ISREG(status.st_mode):
        return ExclusionReason.PLACEHOLDER
    return ExclusionReason.NESTED_REPOSITORY if stat.S_ISDIR(status.st_mode) else status


def _exclusion_by_status(path: str, status: os.stat_result, limit: int) -> ExclusionReason | None:
    if stat.S_ISLNK(status.st_mode):
        return _link_reason(path)
    if not stat.S_ISREG(status.st_mode):
        return ExclusionReason.SPECIAL
    if status.st_size == 0:
        return ExclusionReason.EMPTY
    return ExclusionReason.TOO_LARGE if status.st_size > limit else None


def _link_reason(path: str) -> ExclusionReason:
    """Return whether a symbolic link is an annexed file of git-annex, or any other link."""
    try:
        is_annexed = ".git/annex/objects/" in str(Path(path).readlink())
    except OSError:
        is_annexed = False
    return ExclusionReason.PLACEHOLDER if is_annexed else ExclusionReason.SYMLINK


def _ignore_rules(path: Path) -> GitIgnoreSpec:
    from pathspec import GitIgnoreSpec  # noqa: PLC0415 - slow to import, and only needed without git

    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        with os.fdopen(descriptor, "rb") as stream:
            lines = stream.read(MAX_FILE_BYTES).decode("utf-8-sig", "replace").splitlines()
        return GitIgnoreSpec.from_lines(lines)
    except (OSError, ValueError):  # git continues without a file that it cannot read, too
        return GitIgnoreSpec.from_lines([])


def _is_ignored(name: str, rules: Rules) -> bool:
    """Return whether a name is ignored: as in git, the deepest `.gitignore` with a matching rule decides."""
    for directory, spec in reversed(rules):
        decision = spec.check_file(name[len(directory) :]).include
        if decision is not None:
            return decision
    return False


def _too_many(root: Path) -> DataError:
    return DataError(
        f"{root} contains more than {MAX_ENTRIES} files; one code base must have fewer.",
        code="too_many_files",
        suggestions=("Give the directory of one project.",),
    )
