"""Names of adapters for other programs."""

from __future__ import annotations

import hashlib

_HASH_DIGITS = 8


def file_name(text: str) -> str:
    """Return text as a part of a file's name: ASCII letters, digits, `-`, `.` and `_`, at most 60 characters."""
    kept = "".join(c if c.isascii() and (c.isalnum() or c in "-._") else "-" for c in text)
    return kept.strip("-.")[:60]


def model_name(base_name: str, project_id: str) -> str:
    """Return the name under which a project's adapter is served.

    It begins with the base model's name: editors choose the form of a fill-in-the-middle prompt by it. An id that a name cannot
    hold as it is gets a hash, so that no two projects on one base model have the same name.
    """
    part = file_name(project_id)
    name = f"{base_model_name(base_name)}-{part}"
    return name if part == project_id else with_hash(name, project_id)


def base_model_name(base_name: str) -> str:
    """Return the name under which the base model alone is served."""
    return (file_name(base_name.rpartition("/")[2]) or "base").lower()


def with_hash(name: str, identity: str) -> str:
    """Return a name that differs from those of other identities. It is always the same for this one."""
    digest = hashlib.sha256(identity.encode("utf-8", "surrogateescape")).hexdigest()
    return f"{name.rstrip('-.')}-{digest[:_HASH_DIGITS]}"
