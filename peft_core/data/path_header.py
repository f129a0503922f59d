"""The path header: a comment with the file's path, with which every example of code begins, and so does a prompt."""

from __future__ import annotations

from pathlib import Path, PurePosixPath

from peft_core.data.languages import NO_COMMENT, Language, language_of_file, language_of_text
from peft_core.errors import InvalidArgument, sanitize


def path_comment(path: str, language: Language) -> str:
    """Return the path as a line of comment; an empty text if it is not known how the language writes comments."""
    if not path or language.comment == NO_COMMENT:
        return ""
    opens, closes = language.comment
    shown = sanitize(path, limit=None)
    for comment_end in {"-->", "*/", closes.strip()} - {""}:
        shown = shown.replace(comment_end, "\N{REPLACEMENT CHARACTER}")
    return f"{opens}{shown}{closes}\n"


def prompt_header(file_path: str, code: str = "") -> str:
    """Return the header of a prompt that continues a file.

    Args:
        file_path: relative to the repository, as in training; an absolute path is taken relative to its git repository.
        code: The prompt. As in training, it tells the language where several have the extension.

    Raises:
        InvalidArgument: an absolute path outside a git repository.
    """
    path = _relative_to_repository(file_path.strip())
    language = language_of_file(path.name)
    if language is None:
        return ""
    return path_comment(path.as_posix(), language_of_text(path.name, code, language) or language)


def _relative_to_repository(file_path: str) -> PurePosixPath:
    path = Path(file_path).expanduser()
    if not path.is_absolute():
        return PurePosixPath(*(part for part in path.parts if part not in (".", "..")))
    for parent in path.parents:
        if (parent / ".git").exists():
            return PurePosixPath(path.relative_to(parent))
    raise InvalidArgument(
        "file_path",
        file_path,
        "it is in no git repository, so its path in the project is not known",
        suggestions=["Give the path relative to the directory that the adapter was trained on, such as src/app.py"],
    )
