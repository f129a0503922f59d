"""Find the files of a repository that may hold code, and count what is excluded by name, size and type.

In: the root directory. Out: a `Tree`. Contents are not read here, see `read_text.py`.

If git knows the directory, git's list of files is used. Otherwise the directories are walked and `.gitignore` files are obeyed;
a directory that is not entered counts as one exclusion, because counting its files would mean entering it.
"""

# ruff: noqa: SIM905 - a string of words is easier to read than a column of quoted words

from __future__ import annotations

import itertools
import os
import re
import stat
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING

from peft_core.data import git
from peft_core.data.languages import Language, language_of_file
from peft_core.errors import DataError

if TYPE_CHECKING:  # pathspec takes 100 ms to import, and only directories without git need it
    from pathspec import GitIgnoreSpec

    Rules = tuple[tuple[str, GitIgnoreSpec], ...]  # directory and its .gitignore, outermost first

MAX_FILE_BYTES = 1_000_000
MAX_ENTRIES = 500_000


class ExclusionReason(StrEnum):
    """Why a file or an example was excluded. The values are shown, counted and stored, so they must not change."""

    BINARY = "binary"
    CHANGED = "changed"  # or deleted, while it was read
    DATA = "data"  # a table, not code
    DUPLICATE = "duplicate"
    EMPTY = "empty"
    GENERATED = "generated"
    HIDDEN = "hidden"
    IGNORED = "ignored"
    LICENCE = "licence"
    LOCK_FILE = "lock_file"
    MAYBE_TRAINED_ON = "maybe_trained_on"  # by the adapter that is evaluated; its fingerprint is a sample
    MINIFIED = "minified"
    NEAR_DUPLICATE = "near_duplicate"
    OVER_FILE_SHARE = "over_file_share"  # of a file so large that it would dominate the training set
    NO_CODE = "no_code"
    NOT_NEEDED = "not_needed"  # the run ends before it would read the file
    NOT_TEXT = "not_text"
    SECRET = "secret"  # noqa: S105 - the name of a reason
    SEEN_IN_TRAINING = "seen_in_training"  # held out, but half of its lines are in the training set
    SENSITIVE = "sensitive"
    SPECIAL = "special"
    SYMLINK = "symlink"
    TINY = "tiny"
    TOO_LARGE = "too_large"
    TOO_LONG = "too_long"
    TRAINED_ON = "trained_on"  # by the adapter that is evaluated
    UNREADABLE = "unreadable"
    VENDORED = "vendored"


@dataclass(frozen=True, slots=True)
class File:
    path: Path
    name: str  # relative to the root, separated by '/'; may contain any character that a file name can
    language: Language
    size: int


@dataclass(frozen=True, slots=True)
class Tree:
    files: list[File]  # sorted by name
    left_out: Counter[str]
    by_git: bool  # whether git listed the files


def walk(root: Path) -> Tree:
    """Return every file below root that may hold code.

    Raises:
        DataError: 'too_many_files', more than a code base has.
    """
    left_out: Counter[str] = Counter()
    names = git.listed_files(root)
    files = _listed(root, names, left_out) if names is not None else _scanned(root, left_out)
    return Tree(files=sorted(files, key=lambda file: file.name), left_out=left_out, by_git=names is not None)


def _listed(root: Path, names: list[str], left_out: Counter[str]) -> Iterator[File]:
    if len(names) > MAX_ENTRIES:
        raise _too_many(root)
    checker = _InsideChecker(root)
    for name in names:
        *directories, last = name.split("/")
        if not checker.is_inside(name):
            left_out[ExclusionReason.SYMLINK] += 1
            continue
        reason = next((reason for part in directories if (reason := classify_directory(part, by_git=True))), None)
        language = reason or classify(last)
        if isinstance(language, ExclusionReason):
            left_out[language] += 1
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
            left_out[ExclusionReason.VENDORED] += 1  # a submodule or a nested repository: someone else's code
            continue
        if reason := _exclusion_by_status(status):
            left_out[reason] += 1
            continue
        yield File(path=path, name=name, language=language, size=status.st_size)


class _InsideChecker:
    """Checks that a name leads below the root. The repository controls git's list, which may name a file behind a link."""

    def __init__(self, root: Path) -> None:
        self._root = os.path.realpath(root)
        self._is_real: dict[str, bool] = {"": True}

    def is_inside(self, name: str) -> bool:
        directory = name.rpartition("/")[0]
        if name.startswith("/"):
            return False
        if directory not in self._is_real:
            path = os.path.join(self._root, directory)  # noqa: PTH118 - called for every directory
            self._is_real[directory] = os.path.realpath(path) == path
        return self._is_real[directory]


def _scanned(root: Path, left_out: Counter[str]) -> Iterator[File]:
    entries_seen = 0
    stack: list[tuple[str, Rules]] = [("", ())]
    while stack:
        directory, rules = stack.pop()
        try:
            with os.scandir(root / directory) as listing:
                entries = list(itertools.islice(listing, MAX_ENTRIES + 1 - entries_seen))
        except OSError:
            left_out[ExclusionReason.UNREADABLE] += 1
            continue
        entries_seen += len(entries)
        if entries_seen > MAX_ENTRIES:
            raise _too_many(root)
        names = {entry.name for entry in entries}
        if "pyvenv.cfg" in names:  # a virtual environment of any name
            left_out[ExclusionReason.VENDORED] += 1
            continue
        if ".gitignore" in names:
            rules = (*rules, (directory, _ignore_rules(root / directory / ".gitignore")))
        for entry in entries:
            result = _scanned_entry(entry, f"{directory}{entry.name}", rules)
            if isinstance(result, File):
                yield result
            elif isinstance(result, ExclusionReason):
                left_out[result] += 1
            else:
                stack.append((result, rules))


def _scanned_entry(entry: os.DirEntry[str], name: str, rules: Rules) -> File | ExclusionReason | str:
    """Return a file to read, the name of a directory to enter (with a '/'), or the reason to do neither."""
    if entry.is_symlink():
        return ExclusionReason.SYMLINK
    if not entry.is_dir(follow_symlinks=False):
        return _scanned_file(entry, name, rules)
    directory = f"{name}/"
    reason = classify_directory(entry.name, by_git=False)
    return reason or (ExclusionReason.IGNORED if _is_ignored(directory, rules) else directory)


def _scanned_file(entry: os.DirEntry[str], name: str, rules: Rules) -> File | ExclusionReason:
    language = classify(entry.name)
    if isinstance(language, ExclusionReason):
        return language
    if _is_ignored(name, rules):
        return ExclusionReason.IGNORED
    try:
        status = entry.stat(follow_symlinks=False)
    except FileNotFoundError:
        return ExclusionReason.CHANGED
    except OSError:
        return ExclusionReason.UNREADABLE
    return _exclusion_by_status(status) or File(
        path=Path(entry.path), name=name, language=language, size=status.st_size
    )


def _exclusion_by_status(status: os.stat_result) -> ExclusionReason | None:
    if stat.S_ISLNK(status.st_mode):
        return ExclusionReason.SYMLINK
    if not stat.S_ISREG(status.st_mode):
        return ExclusionReason.SPECIAL
    if status.st_size == 0:
        return ExclusionReason.EMPTY
    return ExclusionReason.TOO_LARGE if status.st_size > MAX_FILE_BYTES else None


def _ignore_rules(path: Path) -> GitIgnoreSpec:
    from pathspec import GitIgnoreSpec  # noqa: PLC0415 - slow to import, and only needed without git

    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        with os.fdopen(descriptor, "rb") as stream:
            lines = stream.read(MAX_FILE_BYTES).decode("utf-8", "replace").splitlines()
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


# Classification by name.

VENDORED = frozenset(
    "node_modules bower_components jspm_packages vendor vendored _vendor third_party thirdparty third-party "
    "site-packages dist-packages __pycache__ pods deriveddata".split()
)
# Only without git: git ignores build output already, and a tracked `build/` holds code.
_BUILD_DIRECTORIES = frozenset("dist build target out obj bazel-out htmlcov venv virtualenv".split())
_LOCK_FILES = frozenset("package-lock.json npm-shrinkwrap.json pnpm-lock.yaml go.sum gradle.lockfile".split())
_GENERATED_NAME = re.compile(
    r"(_pb2(_grpc)?\.pyi?|\.pb\.(go|cc|h)|_pb\.(js|ts|d\.ts)|\.g\.(dart|cs)|\.freezed\.dart|\.designer\.cs"
    r"|[._-]generated\.\w+|_generated\.\w+|\.gen\.\w+|^moc_.*\.cpp|^ui_.*\.h)$",
    re.IGNORECASE,
)
_MINIFIED_NAME = re.compile(r"[.-]min\.(js|css|mjs)$|\.bundle\.js$", re.IGNORECASE)
_SENSITIVE_NAME = re.compile(
    r"^(\.env(\..*)?|.*\.env|\.?netrc|_netrc|\.npmrc|\.pypirc|\.pgpass|\.git-credentials|\.htpasswd|\.boto|\.s3cfg"
    r"|id_(rsa|dsa|ecdsa|ed25519)(_sk)?(\..*)?|.*\.(pem|key|p12|pfx|jks|keystore|kdbx|ppk|asc|gpg|ovpn)"
    r"|credentials(\..*)?|client_secrets?(\..*)?|secrets?\.\w+|authorized_keys|known_hosts|kubeconfig)$",
    re.IGNORECASE,
)
_SENSITIVE_DIRECTORIES = frozenset({".ssh", ".gnupg", ".aws", ".kube", ".docker", ".azure"})
_BINARY_EXTENSIONS = frozenset(
    "png jpg jpeg gif bmp ico webp tiff pdf zip gz tgz bz2 xz zst 7z rar jar war whl egg so dylib dll exe a o lib obj "
    "class pyc pyo pyd wasm woff woff2 ttf otf eot mp3 mp4 mov avi mkv wav ogg flac webm sqlite db bin dat npy npz pt "
    "pth onnx gguf safetensors parquet arrow pkl pickle h5 doc docx xls xlsx ppt pptx psd ai".split()
)


def classify(name: str) -> Language | ExclusionReason:
    """Return the language of a file, or the reason why it is excluded, by its name."""
    if _SENSITIVE_NAME.match(name):
        # `secrets.py` is code, `secrets.yaml` is not.
        language = language_of_file(name)
        if language is None or not name.lower().startswith(("secret", "credentials", "client_secret")):
            return ExclusionReason.SENSITIVE
    if name.lower() in _LOCK_FILES or name.lower().endswith(".lock"):
        return ExclusionReason.LOCK_FILE
    if _MINIFIED_NAME.search(name):
        return ExclusionReason.MINIFIED
    if _GENERATED_NAME.search(name):
        return ExclusionReason.GENERATED
    language = language_of_file(name)
    if language is not None:
        return language
    return ExclusionReason.BINARY if name.rpartition(".")[2].lower() in _BINARY_EXTENSIONS else ExclusionReason.NO_CODE


def classify_directory(name: str, *, by_git: bool) -> ExclusionReason | None:
    """Return the reason why a directory is not entered, by its name, or None."""
    lowered = name.lower()
    if lowered in _SENSITIVE_DIRECTORIES:
        return ExclusionReason.SENSITIVE
    if lowered in VENDORED or (not by_git and lowered in _BUILD_DIRECTORIES):
        return ExclusionReason.VENDORED
    return ExclusionReason.HIDDEN if name.startswith(".") else None
