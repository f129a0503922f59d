"""Compare a base model's weights with its class, where no layout says which weights the class has.

Only transformers knows them then. It is asked in a child process, once for each model, before a job is queued: the job would
fail for the same reason, but minutes later. It takes seconds, and reads no weights.
"""

from __future__ import annotations

import functools
import logging
from pathlib import Path

from peft_core.base_models.checkpoint import FileStates, file_states, read_checkpoint
from peft_core.base_models.layouts import expected_shapes
from peft_core.errors import BaseCheckpointError, DataError
from peft_core.schemas.base_model import Base
from peft_core.schemas.frozen import FrozenModel
from peft_core.system.child_process import run_json_child

TIMEOUT_S = 120.0
_CHILD = "peft_core.modeling.check_base"

log = logging.getLogger(__name__)


class BaseCheckRequest(FrozenModel):
    directory: Path


class BaseCheckResult(FrozenModel):
    """The weights are those of the model's class; otherwise the child answers with an error."""


def require_loadable(base: Base) -> None:
    """Check that transformers can build the model, and that its files have exactly its weights.

    Raises:
        BaseCheckpointError: they have not; the message names the weights.
    """
    if expected_shapes(read_checkpoint(base.path).config) is None:
        _ask_transformers(base.path, base.name, file_states(base.path))


@functools.lru_cache(maxsize=64)
def _ask_transformers(path: Path, name: str, states: FileStates) -> None:  # noqa: ARG001 - part of the cache key
    try:
        run_json_child(
            _CHILD,
            BaseCheckRequest(directory=path),
            BaseCheckResult,
            timeout_s=TIMEOUT_S,
            action=f"Checking the weights of {name}",
            on_timeout=(),
        )
    except DataError as error:
        if error.code not in ("base_model", "base_model_unusable", "bad_weights_file"):
            log.warning("%s; the job will check them again", error.message)  # it took too long, or memory ran out
            return
        raise BaseCheckpointError(error.message, code=error.code, suggestions=error.suggestions) from error
