"""Paths as people and clients write them: file:// URIs, quotation marks, white space, and forms of other systems."""

from __future__ import annotations

import os
import re
from pathlib import Path
from urllib.parse import unquote, urlsplit

_QUOTES = "\"'`"
_HOME = re.compile(r"\$(HOME|\{HOME\})(?=/|$)")
_WINDOWS = re.compile(r"([A-Za-z]):[\\/]+(.*)", re.DOTALL)
_WSL = re.compile(r"\\\\wsl(?:\$|\.localhost)\\[^\\]+\\?(.*)", re.IGNORECASE | re.DOTALL)
_URL = re.compile(r"(?:[a-z][a-z0-9+.-]*://|[\w.-]+@[\w.-]+:)\S+", re.IGNORECASE)
_GIT_HOSTS = ("github.com", "gitlab.com", "bitbucket.org", "codeberg.org")
_VARIABLE = re.compile(r"\$\{?\w+\}?|%\w+%")
ABSOLUTE = "Give an absolute path"  # the advice about a text that may be a relative path
_DATA_SET = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}", re.ASCII)


def user_path(given: str) -> Path:
    """Return the path that a text names, with the user's home directory for `~` and `$HOME`.

    A text that is the name of something that exists is taken literally. Otherwise white space and quotation marks around it
    are removed, and a file:// URI is decoded.

    Raises:
        RuntimeError: the home directory that it names is unknown.
    """
    if os.path.lexists(given) and "\0" not in given:
        return Path(given)
    text = given.strip()
    while len(text) > 1 and text[0] == text[-1] and text[0] in _QUOTES:
        text = text[1:-1].strip()
    if text.lower().startswith("file:"):
        uri = urlsplit(text)
        if uri.netloc in ("", "localhost"):
            text = unquote(uri.path)
    return Path(_HOME.sub("~", text, count=1) if text.startswith("$") else text).expanduser()


def absolute_path(path: Path) -> Path:
    """Return the absolute form of a path, without `..`: what it only passes through may be gone when it is read again."""
    path = path.absolute()
    # Unlike `Path.resolve`, `realpath` accepts a loop of links; an error when the path is read then names it.
    return Path(os.path.realpath(path)) if os.pardir in path.parts else path


def path_advice(given: str) -> str | None:
    """Return what to do about a text that cannot be a path of this machine, or that names none; None if nothing is known."""
    text = given.strip().strip(_QUOTES)
    if (advice := _advice_on_windows(text)) is not None:
        return advice
    if _URL.fullmatch(text) is not None or text.lower().startswith(_GIT_HOSTS):
        is_repository = (
            text.endswith(".git") or "@" in text.partition(":")[0] or any(host in text for host in _GIT_HOSTS)
        )
        how = f"run `git clone {text}`, then give" if is_repository and "`" not in text else "download it, then give"
        return f"Nothing is fetched from an address: {how} the path of the copy"
    if _HOME.match(text) is None and (variable := _VARIABLE.match(text)) is not None:
        return f"Environment variables are not replaced: write the path instead of {variable[0]}"
    if text.startswith((os.sep, "~", ".", "$")):
        return None
    if _DATA_SET.fullmatch(text) is not None and not os.path.lexists(text.partition("/")[0]):
        return (
            f"If it is a data set on a hub: run `hf download --repo-type dataset {text}`, then give the path of its file. "
            "If it is a path: give an absolute one"
        )
    return ABSOLUTE


def _advice_on_windows(text: str) -> str | None:
    if text.lower().startswith("file:"):
        text = unquote(urlsplit(text).path).lstrip("/")
    if (windows := _WINDOWS.fullmatch(text)) is not None:
        rest = windows[2].replace("\\", "/")
        return f"It is a Windows path: in WSL this is /mnt/{windows[1].lower()}/{rest}"
    if (wsl := _WSL.fullmatch(text)) is not None:
        rest = wsl[1].replace("\\", "/")
        return f"It is the Windows name of a path inside WSL: give /{rest}"
    return None
