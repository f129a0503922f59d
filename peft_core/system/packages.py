"""How to install packages for the interpreter that runs this process."""

from __future__ import annotations

import shlex
import sys
from importlib.util import find_spec

from peft_core.errors import ClusterError


def install_command(requirement: str, *options: str) -> str:
    """Return the shell command that installs a package where this process imports from.

    A plain `pip install` would install for another Python: pipx, uv and clients run the server in an environment of its own,
    which is not on the PATH. Environments made by uv have no pip.

    Args:
        requirement: A package with an optional version and extra, such as `peft-mcp[ollama]`.
        options: Options of `pip install`, which `uv pip install` has as well.
    """
    pip = [sys.executable, "-m", "pip", "install"]
    uv = ["uv", "pip", "install", "--python", sys.executable]
    return shlex.join([*(uv if find_spec("pip") is None else pip), *options, requirement])


def install_extra(extra: str) -> str:
    """Return the shell command that adds an optional dependency of this package, such as `llamacpp`."""
    return install_command(f"peft-mcp[{extra}]")


def require_ray() -> None:
    """Raise ClusterError if Ray is not installed, which the extra `cluster` brings."""
    if find_spec("ray") is None:
        raise ClusterError(
            "Training on a cluster needs Ray, which is not installed here.",
            code="cluster_extra_missing",
            suggestions=[f"Install it: {install_extra('cluster')}"],
        )
