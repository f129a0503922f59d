"""Which kinds of models the installed transformers can build, read from its source: importing it takes seconds."""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any

from peft_core.base_models.checkpoint_info import unusable
from peft_core.base_models.families import FULLY_SUPPORTED
from peft_core.system.packages import install_command

_TABLE = re.compile(r"^MODEL_FOR_CAUSAL_LM_MAPPING_NAMES = OrderedDict\(\n(.*?)^\)", re.DOTALL | re.MULTILINE)
_ROW = re.compile(r'\(\s*"([\w.-]+)",\s*"\w+",?\s*\)')
_USE_ANOTHER = (
    f"Use a base model of one of the families {FULLY_SUPPORTED}, or another one that transformers supports itself"
)


@functools.cache
def causal_model_types() -> frozenset[str] | None:
    """Return the `model_type` of every causal language model in the installed transformers; None if they cannot be found."""
    spec = PathFinder.find_spec("transformers")
    for directory in (spec.submodule_search_locations or ()) if spec is not None else ():
        try:
            source = Path(directory, "models", "auto", "modeling_auto.py").read_text(encoding="utf-8")
        except OSError:
            continue
        table = _TABLE.search(source)
        if table is not None:
            return frozenset(_ROW.findall(table[1])) or None
    return None


def require_supported(path: Path, config: Mapping[str, Any]) -> None:
    """Check that transformers can build the model without the code in its repository.

    Raises:
        BaseCheckpointError: It cannot.
    """
    model_type, known = config["model_type"], causal_model_types()
    if known is None or model_type in known:
        return
    if config.get("auto_map"):
        raise unusable(
            path,
            f"its model code is part of its repository (auto_map in config.json, model_type {model_type!r}), and such code is "
            "never run here",
            _USE_ANOTHER,
        )
    raise unusable(
        path,
        f"its model_type {model_type!r} is not a causal language model that the installed transformers knows",
        f"If the model is new, update transformers: {install_command('transformers', '--upgrade')}",
        _USE_ANOTHER,
    )
