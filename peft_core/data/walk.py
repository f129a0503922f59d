"""Files of a repository that may hold code, and the count of what was left out by name, size and type.

Where git knows the directory, git's list is the list. Elsewhere the directories are walked, `.gitignore` files obeyed,
and a directory that is not entered counts as one thing left out, for counting its files would mean entering it.
"""

# ruff: noqa: SIM905 - a row of words reads better than a column of quoted ones

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
from peft_core.data.languages import Language
from peft_core.errors import DataError

if TYPE_CHECKING:  # pathspec takes 100 ms to import, and only directories without git need it
    from pathspec import GitIgnoreSpec

    Rules = tuple[tuple[str, GitIgnoreSpec], ...]  # directory and its .gitignore, outermost first


import re
from enum import StrEnum

from peft_core.data.languages import language_of_file

MAX_FILE_BYTES = 1_000_000
MAX_ENTRIES = 500_000


@dataclass(frozen=True, slots=True)
class File:
    path: Path
    name: str  # relative to the root, '/' between parts; may hold any character a file name can
    language: Language
    size: int


@dataclass(frozen=True, slots=True)
class Tree:
    files: list[File]  # by name
    left_out: Counter[str]
    by_git: bool


def walk(root: Path) -> Tree:
    """Every file below root that may hold code.

    Raises:
        DataError: there are more entries than a code base has.
    """
    left_out: Counter[str] = Counter()
    names = git.listed_files(root)
    found = _listed(root, names, left_out) if names is not None else _scanned(root, left_out)
    files = sorted(found, key=lambda file: file.name)
    return Tree(files=files, left_out=left_out, by_git=names is not None)


def _listed(root: Path, names: list[str], left_out: Counter[str]) -> Iterator[File]:
    if len(names) > MAX_ENTRIES:
        raise _too_many(root)
    inside = _Inside(root)
    for name in names:
        *directories, last = name.split("/")
        if not inside.holds(name):
            left_out[ExclusionReason.SYMLINK] += 1
            continue
        reason = next((reason for part in directories if (reason := classify_directory(part, by_git=True))), None)
        verdict = reason or classify(last)
        if isinstance(verdict, ExclusionReason):
            left_out[verdict] += 1
            continue
        path = root / name
        try:
            status = path.lstat()
        except FileNotFoundError:
            left_out[ExclusionReason.CHANGED] += 1  # tracked, and deleted in the work tree
            continue
        except OSError:
            left_out[ExclusionReason.UNREADABLE] += 1
            continue
        if stat.S_ISDIR(status.st_mode):
            left_out[ExclusionReason.VENDORED] += 1  # a submodule or a repository inside: someone else's code
            continue
        if rejection_reason := _trouble(status):
            left_out[rejection_reason] += 1
            continue
        yield File(path=path, name=name, language=verdict, size=status.st_size)


class _Inside:
    """Whether names lead to below a root. Git's list is the repository's word: it may name what lies behind a link."""

    def __init__(self, root: Path) -> None:
        self._root = os.path.realpath(root)
        self._known: dict[str, bool] = {"": True}

    def holds(self, name: str) -> bool:
        directory = name.rpartition("/")[0]
        if name.startswith("/"):
            return False
        if directory not in self._known:
            path = os.path.join(self._root, directory)  # noqa: PTH118 - as many as there are directories
            self._known[directory] = os.path.realpath(path) == path
        return self._known[directory]


def _scanned(root: Path, left_out: Counter[str]) -> Iterator[File]:
    seen = 0
    waiting: list[tuple[str, Rules]] = [("", ())]
    while waiting:
        directory, rules = waiting.pop()
        try:
            with os.scandir(root / directory) as listing:
                entries = list(itertools.islice(listing, MAX_ENTRIES + 1 - seen))
        except OSError:
            left_out[ExclusionReason.UNREADABLE] += 1
            continue
        seen += len(entries)
        if seen > MAX_ENTRIES:
            raise _too_many(root)
        names = {entry.name for entry in entries}
        if "pyvenv.cfg" in names:  # a virtual environment under whatever name
            left_out[ExclusionReason.VENDORED] += 1
            continue
        if ".gitignore" in names:
            rules = (*rules, (directory, _ignore_rules(root / directory / ".gitignore")))
        for entry in entries:
            found = _scanned_entry(entry, f"{directory}{entry.name}", rules)
            if isinstance(found, File):
                yield found
            elif isinstance(found, ExclusionReason):
                left_out[found] += 1
            else:
                waiting.append((found, rules))


def _scanned_entry(entry: os.DirEntry[str], name: str, rules: Rules) -> File | ExclusionReason | str:
    """A file to read, a directory to enter (its name with a '/'), or the reason to do neither."""
    if entry.is_symlink():
        return ExclusionReason.SYMLINK
    if not entry.is_dir(follow_symlinks=False):
        return _scanned_file(entry, name, rules)
    directory = f"{name}/"
    reason = classify_directory(entry.name, by_git=False)
    return reason or (ExclusionReason.IGNORED if _is_ignored(directory, rules) else directory)


def _scanned_file(entry: os.DirEntry[str], name: str, rules: Rules) -> File | ExclusionReason:
    verdict = classify(entry.name)
    if isinstance(verdict, ExclusionReason):
        return verdict
    if _is_ignored(name, rules):
        return ExclusionReason.IGNORED
    try:
        status = entry.stat(follow_symlinks=False)
    except FileNotFoundError:
        return ExclusionReason.CHANGED
    except OSError:
        return ExclusionReason.UNREADABLE
    return _trouble(status) or File(path=Path(entry.path), name=name, language=verdict, size=status.st_size)


def _trouble(status: os.stat_result) -> ExclusionReason | None:
    if stat.S_ISLNK(status.st_mode):
        return ExclusionReason.SYMLINK
    if not stat.S_ISREG(status.st_mode):
        return ExclusionReason.SPECIAL
    if status.st_size == 0:
        return ExclusionReason.EMPTY
    return ExclusionReason.TOO_LARGE if status.st_size > MAX_FILE_BYTES else None


def _ignore_rules(path: Path) -> GitIgnoreSpec:
    from pathspec import GitIgnoreSpec  # noqa: PLC0415 -- not at the server's start

    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        with os.fdopen(descriptor, "rb") as stream:
            lines = stream.read(MAX_FILE_BYTES).decode("utf-8", "replace").splitlines()
        return GitIgnoreSpec.from_lines(lines)
    except (OSError, ValueError):  # git, too, goes on without a file it cannot read
        return GitIgnoreSpec.from_lines([])


def _is_ignored(name: str, rules: Rules) -> bool:
    """The deepest `.gitignore` that says anything about the name decides, as in git."""
    for directory, spec in reversed(rules):
        decision = spec.check_file(name[len(directory) :]).include
        if decision is not None:
            return decision
    return False


def _too_many(root: Path) -> DataError:
    return DataError(
        f"{root} holds more than {MAX_ENTRIES} files, which is not one code base.",
        code="too_many_files",
        suggestions=("Give the directory of one project.",),
    )


# FOLDED FROM peft_core.data.walk: What the name of a file or directory says: code, or a reason to leave it out.


class ExclusionReason(StrEnum):
    """Why something was left out; stable names, they are shown and counted."""

    BINARY = "binary"
    CHANGED = "changed"  # or gone, while it was read
    DATA = "data"  # a table, not code
    DUPLICATE = "duplicate"
    EMPTY = "empty"
    GENERATED = "generated"
    HIDDEN = "hidden"
    IGNORED = "ignored"
    LICENCE = "licence"
    LOCK_FILE = "lock_file"
    MAYBE_TRAINED_ON = "maybe_trained_on"  # by the adapter that is measured; what is known of that is a sample
    MINIFIED = "minified"
    NEAR_DUPLICATE = "near_duplicate"
    OVER_FILE_SHARE = "over_file_share"  # of a file so large that it would drown the others
    NO_CODE = "no_code"
    NOT_NEEDED = "not_needed"  # the run ends before it would come to them
    NOT_TEXT = "not_text"
    SECRET = "secret"  # noqa: S105 - the name of a reason
    SEEN_IN_TRAINING = "seen_in_training"  # held out, and half of its lines are trained on elsewhere
    SENSITIVE = "sensitive"
    SPECIAL = "special"
    SYMLINK = "symlink"
    TINY = "tiny"
    TOO_LARGE = "too_large"
    TOO_LONG = "too_long"
    TRAINED_ON = "trained_on"  # by the adapter that is measured
    UNREADABLE = "unreadable"
    VENDORED = "vendored"


VENDORED = frozenset(
    "node_modules bower_components jspm_packages vendor vendored _vendor third_party thirdparty third-party "
    "site-packages dist-packages __pycache__ pods deriveddata".split(),
)
# Where git keeps the list, what a build writes is ignored already, and a tracked `build/` holds code.
_BUILT = frozenset("dist build target out obj bazel-out htmlcov venv virtualenv".split())
_LOCK_FILES = frozenset("package-lock.json npm-shrinkwrap.json pnpm-lock.yaml go.sum gradle.lockfile".split())
_GENERATED = re.compile(
    r"(_pb2(_grpc)?\.pyi?|\.pb\.(go|cc|h)|_pb\.(js|ts|d\.ts)|\.g\.(dart|cs)|\.freezed\.dart|\.designer\.cs"
    r"|[._-]generated\.\w+|_generated\.\w+|\.gen\.\w+|^moc_.*\.cpp|^ui_.*\.h)$",
    re.IGNORECASE,
)
_MINIFIED = re.compile(r"[.-]min\.(js|css|mjs)$|\.bundle\.js$", re.IGNORECASE)
_SENSITIVE = re.compile(
    r"^(\.env(\..*)?|.*\.env|\.?netrc|_netrc|\.npmrc|\.pypirc|\.pgpass|\.git-credentials|\.htpasswd|\.boto|\.s3cfg"
    r"|id_(rsa|dsa|ecdsa|ed25519)(_sk)?(\..*)?|.*\.(pem|key|p12|pfx|jks|keystore|kdbx|ppk|asc|gpg|ovpn)"
    r"|credentials(\..*)?|client_secrets?(\..*)?|secrets?\.\w+|authorized_keys|known_hosts|kubeconfig)$",
    re.IGNORECASE,
)
_SENSITIVE_DIRECTORIES = frozenset({".ssh", ".gnupg", ".aws", ".kube", ".docker", ".azure"})
_BINARY = frozenset(
    "png jpg jpeg gif bmp ico webp tiff pdf zip gz tgz bz2 xz zst 7z rar jar war whl egg so dylib dll exe a o lib obj "
    "class pyc pyo pyd wasm woff woff2 ttf otf eot mp3 mp4 mov avi mkv wav ogg flac webm sqlite db bin dat npy npz pt "
    "pth onnx gguf safetensors parquet arrow pkl pickle h5 doc docx xls xlsx ppt pptx psd ai".split(),
)


def classify(name: str) -> Language | ExclusionReason:
    """Decide by a file's name alone."""
    if _SENSITIVE.match(name):
        # `secrets.py` is the name of code, `secrets.yaml` is not.
        language = language_of_file(name)
        if language is None or not name.lower().startswith(("secret", "credentials", "client_secret")):
            return ExclusionReason.SENSITIVE
    if name.lower() in _LOCK_FILES or name.lower().endswith(".lock"):
        return ExclusionReason.LOCK_FILE
    if _MINIFIED.search(name):
        return ExclusionReason.MINIFIED
    if _GENERATED.search(name):
        return ExclusionReason.GENERATED
    language = language_of_file(name)
    if language is not None:
        return language
    return ExclusionReason.BINARY if name.rpartition(".")[2].lower() in _BINARY else ExclusionReason.NO_CODE


def classify_directory(name: str, *, by_git: bool) -> ExclusionReason | None:
    lowered = name.lower()
    if lowered in _SENSITIVE_DIRECTORIES:
        return ExclusionReason.SENSITIVE
    if lowered in VENDORED or (not by_git and lowered in _BUILT):
        return ExclusionReason.VENDORED
    return ExclusionReason.HIDDEN if name.startswith(".") else None
