"""Decide which paths may be read: locations of credentials and private data are never training data.

The request may come from an assistant that was manipulated by text in some repository (prompt injection). Every symbolic link
is followed before a path is judged, and errors do not reveal whether anything exists there.
"""

from __future__ import annotations

import os
import pwd
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from peft_core.errors import InvalidArgument

_HOME_PATHS = (
    ".ssh", ".gnupg", ".aws", ".azure", ".kube", ".docker", ".config/gcloud", ".config/gh", ".config/op", ".config/hub",
    ".config/rclone", ".config/sops", ".password-store", ".vault-token", ".terraform.d", ".cargo/credentials.toml",
    ".local/share/keyrings", ".local/share/kwalletd", ".local/share/gnome-keyring", ".pki", ".cert", ".netrc", ".npmrc",
    ".pypirc", ".git-credentials", ".cache/huggingface/token", ".huggingface", ".ollama/id_ed25519",
    # assistants: keys and conversations; not the worktrees that they create below the home directory
    ".claude.json", ".claude/.credentials.json", ".claude/projects", ".claude/history.jsonl", ".codex/auth.json",
    ".codex/sessions", ".gemini/oauth_creds.json", ".gemini/tmp", ".cursor/projects", ".cursor/chats",
    # browsers and mail: cookies, passwords, messages
    ".mozilla", ".config/google-chrome", ".config/chromium", ".config/BraveSoftware", ".config/microsoft-edge",
    ".config/vivaldi", ".config/opera", ".thunderbird", "snap/firefox", "snap/chromium", ".var/app",
    "Library/Keychains", "Library/Cookies", "Library/Mail", "Library/Messages", "Library/Safari",
    "Library/Application Support/Google", "Library/Application Support/Firefox", "Library/Application Support/BraveSoftware",
    "Library/Application Support/1Password", "Library/Group Containers",
)  # fmt: skip
_SYSTEM_PATHS = (
    "/etc", "/proc", "/sys", "/dev", "/boot", "/run/user", "/run/secrets", "/run/credentials", "/var/lib", "/var/log",
    "/var/spool", "/var/mail", "/private/etc", "/private/var/db", "/private/var/log", "/Library/Keychains", "/System",
)  # fmt: skip
_PROGRAM_PATHS = ("/usr", "/bin", "/sbin", "/lib", "/lib64", "/Applications")  # read, if asked for, but never written
_HOME_PARENTS, _ROOT_HOME = (Path("/home"), Path("/Users")), Path("/root")
_RAM_DISK = "/dev/shm"  # noqa: S108 -- projects may be there
# Anywhere, such as in another user's home directory or in a backup.
_NAMES = frozenset({".ssh", ".gnupg", ".aws", ".azure", ".kube", ".docker", ".password-store", ".mozilla", "keychains"})
_ALLOWED = "the directory of one project, a file of records, or a LanceDB table"


def require_data_path(
    path: Path, *, data_dir: Path, allowed_roots: Sequence[Path] | None, field: str = "training_data"
) -> None:
    """Check that training or evaluation data may be read from a path, which need not exist.

    Args:
        path: The path that the user gave.
        data_dir: The product's own data directory, which is refused except for LanceDB tables: Codebase Gardener's are there.
        allowed_roots: Directories that the setting allows; None: all.
        field: Name of the argument, for the error.

    Raises:
        InvalidArgument: The path leads to credentials, private data, files of the operating system, the data directory, an
            entire home directory (`sensitive_place`), or out of the allowed roots (`outside_allowed_roots`).
    """
    require_allowed(field, path, allowed_roots)
    target = real(path)
    reason = next(_refusal_reasons(target, real(data_dir)), None)
    if reason is not None:
        raise InvalidArgument(
            field,
            str(path),
            f"{reason}, which is never training data; must be {_ALLOWED}",
            code="sensitive_place",
            suggestions=("Give the project's own directory, or copy the data into a directory of its own",),
        )


def require_output_path(path: Path, *, data_dir: Path, exports: Path, allowed_roots: Sequence[Path] | None) -> None:
    """Check that a new directory may be written at a path.

    Args:
        path: The path that the user gave.
        data_dir: The product's own data directory, in which only `exports` may be written.
        exports: Where the projects are, each with its exports.
        allowed_roots: Directories that the setting allows; None: all.

    Raises:
        InvalidArgument: `sensitive_place`, `outside_allowed_roots`.
    """
    require_allowed("output_path", path, allowed_roots, also=[exports])
    target = real(path)
    inside = target.is_relative_to(real(data_dir))
    if inside and target.is_relative_to(real(exports)):
        parts = target.relative_to(real(exports)).parts
        inside = len(parts) < 3 or parts[1] != "exports"
    home = real(Path.home())
    system = _is_below(target, map(Path, (*_SYSTEM_PATHS, *_PROGRAM_PATHS))) and not target.is_relative_to(_RAM_DISK)
    reason = None
    if inside:
        reason = "this is in the data directory of peft-mcp itself"
    elif is_private(target):
        reason = "this is a location of credentials or private data"
    elif target in (home, *home.parents) or target in _other_homes():
        reason = "this is, or contains, an entire home directory"
    elif system and not (home != Path("/") and target.is_relative_to(home)):
        reason = "this belongs to the operating system"
    if reason is not None:
        raise InvalidArgument(
            "output_path",
            str(path),
            f"{reason}; must be a new directory elsewhere",
            code="sensitive_place",
            suggestions=("Omit output_path to write it into the project's exports",),
        )


def require_allowed(field: str, path: Path, allowed_roots: Sequence[Path] | None, also: Sequence[Path] = ()) -> None:
    """Check that a path is below one of `allowed_roots` or `also`. If `allowed_roots` is None, every path in UTF-8 is allowed.

    Raises:
        InvalidArgument: It is not (`outside_allowed_roots`), or it has no form in JSON (`not_utf8`).
    """
    if not _is_utf8(str(path)):
        raise InvalidArgument(
            field,
            str(path),
            "its name, or that of a directory above it, is not UTF-8, in which requests and answers are written",
            code="not_utf8",
            suggestions=("Rename it",),
        )
    if allowed_roots is None:
        return
    target = real(path)
    if any(target.is_relative_to(real(root)) for root in (*allowed_roots, *also)):
        return
    roots = ", ".join(map(str, allowed_roots)) or "no directory"
    raise InvalidArgument(
        field,
        str(path),
        f"must be below one of the directories of the setting allowed_roots: {roots}",
        code="outside_allowed_roots",
        suggestions=("Give a path below one of them", "Or ask the user to extend CODEBASE_GARDENER_ALLOWED_ROOTS"),
    )


def is_private(path: Path) -> bool:
    """Return whether a path is, or is inside, a location of credentials or private data."""
    target = real(path)
    return bool(_NAMES & {part.lower() for part in target.parts}) or _is_below(target, _private_paths())


def real(path: Path) -> Path:
    """Return where a path leads, with all symbolic links resolved as far as it exists."""
    try:
        return Path(os.path.realpath(path))
    except (OSError, ValueError):  # such as a NUL in the path
        return path


def _refusal_reasons(target: Path, data_dir: Path) -> Iterator[str]:
    home = real(Path.home())
    if target in (home, *home.parents) or target in _other_homes():
        yield "this is, or contains, an entire home directory"
    if target.is_relative_to(data_dir) and target.suffix.lower() != ".lance":
        yield "this is the data directory of peft-mcp itself"
    if _is_read_with(target, data_dir):
        yield "this contains the data directory of peft-mcp itself"
    if is_private(target):
        yield "this is a location of credentials or private data"
    if any(_is_read_with(target, path) for path in _private_paths()):
        yield "this contains locations of credentials or private data"
    at_home = home != Path("/") and target.is_relative_to(home)  # a service account's home may be below /var/lib
    if _is_below(target, map(Path, _SYSTEM_PATHS)) and not at_home and not target.is_relative_to(_RAM_DISK):
        yield "this belongs to the operating system"
    if any(_is_read_with(target, Path(path)) for path in _SYSTEM_PATHS):
        yield "this contains directories of the operating system"


def _private_paths() -> list[Path]:
    home = real(Path.home())
    return [home / name for name in _HOME_PATHS]


def _is_read_with(directory: Path, path: Path) -> bool:
    """Return whether reading all of `directory` includes `path`: hidden files and directories below it are skipped."""
    return any(
        form.is_relative_to(directory) and not any(part.startswith(".") for part in form.relative_to(directory).parts)
        for form in (path, real(path))
    )


def _other_homes() -> set[Path]:
    """Return other users' home directories. Those of service accounts, such as /var/www, may contain projects."""
    homes = {Path(user.pw_dir) for user in pwd.getpwall()}
    return {_ROOT_HOME} | {home for home in homes if home.parent in _HOME_PARENTS}


def _is_below(target: Path, roots: Iterable[Path]) -> bool:
    return any(target.is_relative_to(form) for root in roots for form in (root, real(root)))


def _is_utf8(name: str) -> bool:
    """Return whether a file name can be written as UTF-8; Python keeps the bytes of one that cannot as surrogates."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True
