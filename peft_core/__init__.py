"""The core of peft-mcp, usable from Python without MCP.

    manager = PEFTManager()
    status = await manager.train_adapter("my-project", "/path/to/repository")

No public module imports torch: training and inference run in child processes. The names below are imported on first use,
because the runner and the workers are also part of this package and must start quickly.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from peft_core.config import Settings
    from peft_core.errors import PeftMcpError
    from peft_core.jobs.handle import TrainingJob
    from peft_core.manager import PEFTManager
    from peft_core.ollama import OllamaClient
    from peft_core.schemas.results import TrainingStatus
    from peft_core.schemas.training import TrainingConfig

__all__ = ["OllamaClient", "PEFTManager", "PeftMcpError", "Settings", "TrainingConfig", "TrainingJob", "TrainingStatus"]

_MODULES = {
    "OllamaClient": "ollama",
    "PeftMcpError": "errors",
    "PEFTManager": "manager",
    "Settings": "config",
    "TrainingConfig": "schemas.training",
    "TrainingJob": "jobs.handle",
    "TrainingStatus": "schemas.results",
}


def __getattr__(name: str) -> object:
    if name in _MODULES:
        return getattr(import_module(f"peft_core.{_MODULES[name]}"), name)
    raise AttributeError(f"module 'peft_core' has no attribute {name!r}")
