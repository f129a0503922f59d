"""Which places on this machine may be read from: what holds credentials is never training data, whoever asks for it.

The request may come from an assistant that a text in some repository has talked into it. Looked at is where a path leads,
every link followed; nothing is said of what is there.
"""

from __future__ import annotations

import os
import pwd
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from peft_core.errors import InvalidArgument
from peft_core.paths import DataPaths
from peft_core.schemas.task import TrainingTask

_AT_HOME = (
    ".ssh", ".gnupg", ".aws", ".azure", ".kube", ".docker", ".config/gcloud", ".config/gh", ".config/op", ".config/hub",
    ".config/rclone", ".config/sops", ".password-store", ".vault-token", ".terraform.d", ".cargo/credentials.toml",
    ".local/share/keyrings", ".local/share/kwalletd", ".local/share/gnome-keyring", ".pki", ".cert", ".netrc", ".npmrc",
    ".pypirc", ".git-credentials", ".cache/huggingface/token", ".huggingface", ".ollama/id_ed25519",
    # assistants: keys, and what was said to them; work trees that they keep at home are projects
    ".claude.json", ".claude/.credentials.json", ".claude/projects", ".claude/history.jsonl", ".codex/auth.json",
    ".codex/sessions", ".gemini/oauth_creds.json", ".gemini/tmp", ".cursor/projects", ".cursor/chats",
    # browsers and mail: cookies, passwords, letters
    ".mozilla", ".config/google-chrome", ".config/chromium", ".config/BraveSoftware", ".config/microsoft-edge",
    ".config/vivaldi", ".config/opera", ".thunderbird", "snap/firefox", "snap/chromium", ".var/app",
    "Library/Keychains", "Library/Cookies", "Library/Mail", "Library/Messages", "Library/Safari",
    "Library/Application Support/Google", "Library/Application Support/Firefox", "Library/Application Support/BraveSoftware",
    "Library/Application Support/1Password", "Library/Group Containers",
)  # fmt: skip
_OF_THE_SYSTEM = (
    "/etc", "/proc", "/sys", "/dev", "/boot", "/run/user", "/run/secrets", "/run/credentials", "/var/lib", "/var/log",
    "/var/spool", "/var/mail", "/private/etc", "/private/var/db", "/private/var/log", "/Library/Keychains", "/System",
)  # fmt: skip
_HOMES, _ROOTS_HOME = (Path("/home"), Path("/Users")), Path("/root")
_MEMORY = "/dev/shm"  # noqa: S108 - a disk in memory, where people do work
# Wherever they lie: in another user's home, in a backup.
_NAMES = frozenset({".ssh", ".gnupg", ".aws", ".azure", ".kube", ".docker", ".password-store", ".mozilla", "keychains"})
_ALLOWED = "the directory of one project, a .jsonl file, or a LanceDB table"


def require_data_place(
    path: Path,
    *,
    data_dir: Path,
    allowed_roots: Sequence[Path] | None,
    field: str = "training_data",
) -> None:
    """That data to train or to measure on may be read from here.

    Raises:
        InvalidArgument: it leads to where credentials, private data or the system's files are, to the data directory, to a
            whole home directory, or out of the allowed roots. Whether anything is there is not looked at.
    """
    require_allowed(field, path, allowed_roots)
    place = real(path)
    reason = next(_reasons(place, real(data_dir)), None)
    if reason is not None:
        raise InvalidArgument(
            field,
            str(path),
            f"{reason}, which is never training data; allowed is {_ALLOWED}",
            code="sensitive_place",
            suggestions=("Give the directory of the project itself, or copy what is meant into one",),
        )


def require_allowed(field: str, path: Path, allowed_roots: Sequence[Path] | None, also: Sequence[Path] = ()) -> None:
    """That a path lies in one of the setting's directories, or in one of `also`. None: everywhere is allowed.

    Raises:
        InvalidArgument: it does not.
    """
    if allowed_roots is None:
        return
    place = real(path)
    if any(place.is_relative_to(real(root)) for root in (*allowed_roots, *also)):
        return
    roots = ", ".join(map(str, allowed_roots)) or "nowhere"
    raise InvalidArgument(
        field,
        str(path),
        f"the setting allowed_roots lets files be read from {roots} only",
        code="outside_allowed_roots",
        suggestions=("Give a path in one of these", "Or have CODEBASE_GARDENER_ALLOWED_ROOTS extended by the user"),
    )


def require_task_source(task: TrainingTask, source: Path) -> None:
    """Check once more, when the job runs, that its data may be read: a symbolic link may lead elsewhere by now.

    Raises:
        InvalidArgument: 'sensitive_place', 'outside_allowed_roots'.
    """
    field = task.request.purpose.field
    require_data_place(source, data_dir=task.data_dir or task.job_dir, allowed_roots=task.allowed_roots, field=field)


def require_task_adapter(task: TrainingTask, adapter: Path) -> None:
    """Check when the job runs that the adapter to evaluate may be read. Adapters published here always may.

    Raises:
        InvalidArgument: 'outside_allowed_roots'.
    """
    published = () if task.data_dir is None else (DataPaths(task.data_dir).projects,)
    require_allowed("adapter_path", adapter, task.allowed_roots, also=published)


def is_private(path: Path) -> bool:
    """Whether this is a place for credentials or private data, or lies in one."""
    place = real(path)
    return bool(_NAMES & {part.lower() for part in place.parts}) or _is_below(place, _private())


def real(path: Path) -> Path:
    """Where a path leads; of one that leads nowhere, as far as it does."""
    try:
        return Path(os.path.realpath(path))
    except (OSError, ValueError):  # a NUL in it, for one
        return path


def _reasons(place: Path, data_dir: Path) -> Iterator[str]:
    home = real(Path.home())
    if place in (home, *home.parents) or place in _homes_of_others():
        yield "this is a whole home directory, or holds one"
    if place.is_relative_to(data_dir):
        yield "this is the data directory of peft-mcp itself"
    if _would_be_read(data_dir, place):
        yield "this holds the data directory of peft-mcp itself"
    if is_private(place):
        yield "this is a place for credentials or private data"
    if any(_would_be_read(one, place) for one in _private()):
        yield "this holds places for credentials or private data"
    at_home = home != Path("/") and place.is_relative_to(home)  # of a daemon, below /var/lib
    if _is_below(place, map(Path, _OF_THE_SYSTEM)) and not at_home and not place.is_relative_to(_MEMORY):
        yield "this belongs to the operating system"
    if any(_would_be_read(Path(one), place) for one in _OF_THE_SYSTEM):
        yield "this holds directories of the operating system"


def _private() -> list[Path]:
    home = real(Path.home())
    return [home / name for name in _AT_HOME]


def _would_be_read(private: Path, place: Path) -> bool:
    """Whether who reads all of `place` comes to `private`: what is hidden below it is left out."""
    return any(
        form.is_relative_to(place) and not any(part.startswith(".") for part in form.relative_to(place).parts)
        for form in (private, real(private))
    )


def _homes_of_others() -> set[Path]:
    """Where homes usually are: service accounts have /var/www and the like, where projects are."""
    known = {Path(user.pw_dir) for user in pwd.getpwall()}
    return {_ROOTS_HOME} | {home for home in known if home.parent in _HOMES}


def _is_below(place: Path, roots: Iterable[Path]) -> bool:
    return any(place.is_relative_to(form) for root in roots for form in (root, real(root)))
