"""Whether llama.cpp can be used here: the package `xllamacpp`, which the extra `llamacpp` installs."""

from __future__ import annotations

from importlib.metadata import version
from importlib.util import find_spec


def is_installed() -> bool:
    return find_spec("xllamacpp") is not None


def runtime_name() -> str:
    return f"llama.cpp (xllamacpp {version('xllamacpp')})"
