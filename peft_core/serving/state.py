"""What the endpoint keeps in the data directory: where it listens, and its token."""

from __future__ import annotations

import secrets

from pydantic import ValidationError

from peft_core.errors import PeftMcpError
from peft_core.paths import DataPaths
from peft_core.schemas.serving import EndpointState
from peft_core.system.files import atomic_write, read_small

MAX_STATE_BYTES = 64 << 10


def write_state(paths: DataPaths, state: EndpointState) -> None:
    atomic_write(paths.serving_state, state.model_dump_json(), mode=0o600)


def read_state(paths: DataPaths) -> EndpointState | None:
    """Return the state of the endpoint that ran last; None if it ended by itself, or never ran."""
    try:
        return EndpointState.model_validate_json(read_small(paths.serving_state, MAX_STATE_BYTES))
    except (PeftMcpError, ValidationError):
        return None


def token(paths: DataPaths) -> str:
    """Return the token that requests need. It is made once, because it is copied into editors' settings."""
    path = paths.serving_token
    known = read_small(path, 4096).decode(errors="replace").strip() if path.exists() else ""
    if not known:
        known = secrets.token_urlsafe(32)
        atomic_write(path, f"{known}\n", mode=0o600)
    return known
