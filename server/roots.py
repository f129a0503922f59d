"""Relative paths in arguments, resolved against the client's roots: the directories that it works in.

The server's own working directory says nothing about what a person means, so it is never used. A path that could mean two
things, or nothing, is refused: training on something else than meant would not be noticed.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from anyio.to_thread import run_sync
from mcp.server.mcpserver import Context
from mcp.types import ListRootsRequest, ListRootsResult

from peft_core.errors import InvalidArgument, sanitize
from peft_core.schemas.base_model import BUNDLED
from peft_core.schemas.training import DataSelection
from peft_core.system.allowed_paths import is_private, real
from peft_core.system.user_paths import ABSOLUTE, path_advice, user_path
from server.ask_client import ask

TIMEOUT_S = 10.0  # for an answer that needs no person
MAX_ROOTS = 100
MAX_NAMED = 4  # places in an error
NAMES = ("adapter_path", "adapter_a", "adapter_b", "base_model", "continue_from")  # a path or a name
_NAMES_IN_CONFIG = ("base_model", "continue_from")
PATHS = ("training_data", "evaluation_data", "output_path")
CREATED = ("output_path",)  # it need not exist
_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?(@[\w./-]+)?", re.ASCII)  # of a project or on a hub
_WEIGHTS = (".gguf", ".safetensors", ".bin")


async def absolute_paths(ctx: Context[Any, Any], arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Return a tool's arguments with absolute paths in place of relative ones. Absolute paths and names stay as they are.

    Raises:
        InvalidArgument: a relative path cannot be resolved.
        InputNeeded: the client has to list its roots first.
    """
    relative = list(_relative_paths(arguments))
    if not relative:
        return dict(arguments)
    roots = await _client_roots(ctx)
    resolved: dict[str, Any] = {
        field: await run_sync(partial(_resolve, field, text, roots)) for field, text in relative
    }
    config = arguments.get("config")
    if isinstance(config, DataSelection):
        changed = {name: resolved.pop(f"config.{name}") for name in _NAMES_IN_CONFIG if f"config.{name}" in resolved}
        sources = [
            resolved.pop(f"config.more_sources.{index}", given) for index, given in enumerate(config.more_sources)
        ]
        resolved["config"] = config.model_copy(update={**changed, "more_sources": sources})
    return {**arguments, **resolved}


def _relative_paths(arguments: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield (field, text) for each argument that is a relative path, or might be one."""
    config = arguments.get("config")
    candidates = {name: arguments.get(name) for name in (*PATHS, *NAMES)}
    if isinstance(config, DataSelection):
        candidates |= {f"config.{name}": getattr(config, name, None) for name in _NAMES_IN_CONFIG}
        candidates |= {f"config.more_sources.{index}": given for index, given in enumerate(config.more_sources)}
    for field, given in candidates.items():
        if isinstance(given, str) and _is_relative(given) and not _is_plain_name(field, given):
            yield field, given


def _is_relative(text: str) -> bool:
    if not text.strip() or "\0" in text or text.lstrip()[:1] in ("[", "{"):
        return False  # these have errors of their own
    try:
        return not user_path(text).is_absolute()
    except RuntimeError:  # the home directory is unknown
        return False


def _is_plain_name(field: str, text: str) -> bool:
    """Whether an argument that may be a name cannot be a path: a project id, or the name of a base model."""
    argument = field.rpartition(".")[2]
    if argument not in NAMES:
        return False
    if argument == "base_model" and (text == BUNDLED or text.startswith("ollama:")):
        return True
    if os.sep in text or text.startswith(".") or text.lower().endswith(_WEIGHTS):
        return False
    return argument != "base_model" or not os.path.lexists(text)  # a base may be taken from the working directory


def _resolve(field: str, text: str, roots: Sequence[Path]) -> str:
    """Return the absolute path that a relative one means, or the text itself if it is the name of something on a hub."""
    path = user_path(text)
    places = [root / path for root in roots]
    if len(places) > 1 and os.pardir in path.parts:
        raise _refusal(field, text, [], roots)
    there = places if field in CREATED else [place for place in places if _is_there(place)]
    different = list({real(place): str(place) for place in there}.values())
    if len(different) == 1:
        return different[0]
    may_be_name = field.rpartition(".")[2] in NAMES and _NAME.fullmatch(text) is not None and text[0] != "."
    if may_be_name and not different and not (field.endswith("base_model") and os.path.lexists(path)):
        return text
    if len(places) == 1 and path_advice(text) in (None, ABSOLUTE):
        return str(places[0])  # the tool says that nothing is there
    raise _refusal(field, text, different, roots)


def _is_there(place: Path) -> bool:
    """Whether something exists at a place. Private places always count, so that answers do not tell which files they have."""
    return is_private(place) or os.path.lexists(place)


def _refusal(field: str, text: str, different: Sequence[str], roots: Sequence[Path]) -> InvalidArgument:
    if different:
        return InvalidArgument(field, text, f"the path must be absolute, because it could mean {_listed(different)}")
    advice = path_advice(text)
    allowed = "the path must be absolute: this client does not say in which directories it works"
    if roots:
        name = "this root" if len(roots) == 1 else "one of these roots"
        allowed = f"the path must be absolute, or exist in {name} of the client: {_listed(list(map(str, roots)))}"
    return InvalidArgument(field, text, allowed, suggestions=[advice] if advice and advice != ABSOLUTE else [])


def _listed(places: Sequence[str]) -> str:
    more = f" and {len(places) - MAX_NAMED} more" if len(places) > MAX_NAMED else ""
    return f"{', '.join(sanitize(place, limit=60) for place in places[:MAX_NAMED])}{more}"


async def _client_roots(ctx: Context[Any, Any]) -> list[Path]:
    """Return the client's root directories, of which it need not list any."""
    capabilities = ctx.client_capabilities
    if capabilities is None or capabilities.roots is None:
        return []
    listed = await ask(ctx, "roots", ListRootsRequest(), ListRootsResult, timeout_s=TIMEOUT_S)
    roots = listed.roots[:MAX_ROOTS] if listed is not None else []
    paths = [user_path(str(root.uri)) for root in roots]
    return [path for path in paths if path.is_absolute()]
