"""The rules of the codebase: which package may import which, where torch may be imported, and how long code may get."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[2]
MODULES = sorted([*(ROOT / "server").rglob("*.py"), *(ROOT / "peft_core").rglob("*.py")])
NAMES = {".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for path in MODULES}

# A package's own `worker` directory counts as a package of its own: it runs in a child process.
FOUNDATION = {"errors", "paths", "config", "schemas", "system"}
MAY_IMPORT = {
    "errors": set[str](),
    "paths": set[str](),
    "schemas": {"errors", "paths"},
    "config": {"paths"},
    "system": {"errors", "paths", "schemas"},
    "base_models": FOUNDATION,
    "data": FOUNDATION,
    "devices": FOUNDATION,
    "data.worker": FOUNDATION | {"data"},
    "adapters": FOUNDATION | {"base_models"},
    "staleness": FOUNDATION | {"data"},
    "evaluation": FOUNDATION | {"adapters"},
    "planning": FOUNDATION | {"adapters", "base_models", "data", "retrieval", "staleness"},
    "modeling": FOUNDATION | {"adapters", "base_models", "planning"},
    "evaluation.worker": FOUNDATION
    | {
        "adapters",
        "base_models",
        "data",
        "devices",
        "evaluation",
        "modeling",
        "planning",
        "retrieval",
        "retrieval.worker",
    },
    "training": FOUNDATION
    | {"adapters", "base_models", "data", "devices", "evaluation", "evaluation.worker", "modeling", "planning"},
    "worker": FOUNDATION | {"evaluation.worker", "training", "modeling"},
    "cluster": FOUNDATION | {"base_models", "data"},
    "ollama": FOUNDATION,
    "vllm": FOUNDATION,
    "llamacpp": FOUNDATION,
    "llamacpp.worker": FOUNDATION | {"adapters", "base_models", "llamacpp", "modeling", "ollama"},
    "retrieval": FOUNDATION | {"adapters", "data"},
    "retrieval.worker": FOUNDATION | {"retrieval"},
    "inference": FOUNDATION | {"adapters", "base_models", "data", "planning", "retrieval"},
    "inference.worker": FOUNDATION
    | {"adapters", "base_models", "data", "devices", "inference", "llamacpp", "llamacpp.worker", "modeling"}
    | {"retrieval", "retrieval.worker"},
    "export": FOUNDATION | {"adapters", "base_models", "llamacpp", "ollama", "vllm"},
    "export.worker": FOUNDATION
    | {"adapters", "base_models", "data", "evaluation", "export", "llamacpp", "llamacpp.worker"}
    | {"modeling", "ollama", "planning", "vllm"},
    "gardener": FOUNDATION,
    "jobs": FOUNDATION | {"adapters", "evaluation", "gardener", "planning", "retrieval"},
    "projects": FOUNDATION | {"adapters", "data", "jobs", "staleness"},
    "serving": FOUNDATION | {"adapters"},
    "storage": FOUNDATION | {"adapters", "base_models", "jobs"},
    "manager": FOUNDATION
    | {
        "adapters",
        "export",
        "gardener",
        "inference",
        "jobs",
        "projects",
        "retrieval",
        "serving",
        "staleness",
        "storage",
    },
    "endpoint": FOUNDATION | {"manager", "serving"},
    "server": FOUNDATION | {"adapters", "devices", "endpoint", "llamacpp", "manager", "ollama", "projects", "serving"},
}
HEAVY = {"torch", "transformers", "peft", "accelerate", "numpy", "gguf", "safetensors", "lance", "pyarrow"}
SQL_MODULES = ["peft_core/jobs/store.py"]
MAX_FILE_LINES = 600
MAX_FUNCTION_LINES = 60


def package_of(module: str) -> str:
    """`peft_core.jobs.store` -> `jobs`; `peft_core.evaluation.worker.run` -> `evaluation.worker`."""
    if module == "peft_core.training.__main__":
        return "worker"  # another name for the worker's entry point
    parts = module.split(".")
    if parts[0] == "server":
        return "server"
    if len(parts) == 1:
        return "peft_core"
    return ".".join(parts[1:3]) if parts[2:3] == ["worker"] else parts[1]


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


@cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


def imports_of(path: Path) -> Iterator[str]:
    """Every module that a file imports: also `from package import module`, and `import_module("package.module")`."""
    for node in ast.walk(tree_of(path)):
        match node:
            case ast.Import(names=names):
                yield from (alias.name for alias in names)
            case ast.ImportFrom(module=str(module), names=names):
                for alias in names:
                    submodule = f"{module}.{alias.name}"
                    yield submodule if submodule in NAMES else module
            case ast.Call(func=ast.Name(id="import_module"), args=[ast.Constant(value=str(module)), *_]):
                yield module


def label(path: Path) -> str:
    return str(path.relative_to(ROOT))


def test_packages_import_only_what_lies_below_them() -> None:
    for path in MODULES:
        package = package_of(module_of(path))
        if package == "peft_core":
            continue  # peft_core/__init__.py: the public names
        allowed = MAY_IMPORT[package] | {package}
        for module in imports_of(path):
            if module.startswith("peft_core."):
                assert package_of(module) in allowed, f"{label(path)} imports {module}"
            assert package == "server" or module.split(".")[0] not in {"server", "mcp"}, (
                f"{label(path)} imports {module}"
            )


def test_torch_is_imported_in_modeling_training_and_worker_directories_only() -> None:
    for path in MODULES:
        directories = path.relative_to(ROOT).parts[1:-1]
        if directories[:1] not in (("modeling",), ("training",)) and "worker" not in directories:
            assert not HEAVY & {module.split(".")[0] for module in imports_of(path)}, label(path)


def test_only_the_store_imports_sqlite() -> None:
    assert [label(path) for path in MODULES if "sqlite3" in set(imports_of(path))] == SQL_MODULES


def test_no_file_is_longer_than_600_lines() -> None:
    lengths = {label(path): len(path.read_text().splitlines()) for path in MODULES}
    assert {name: length for name, length in lengths.items() if length > MAX_FILE_LINES} == {}


def test_no_function_is_longer_than_60_lines() -> None:
    lengths = {
        f"{label(path)}:{node.lineno} {node.name}": node.end_lineno - node.lineno + 1
        for path in MODULES
        for node in ast.walk(tree_of(path))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.end_lineno is not None
    }
    assert {name: length for name, length in lengths.items() if length > MAX_FUNCTION_LINES} == {}


def test_nothing_prints_to_standard_output() -> None:
    for path in MODULES:
        for node in ast.walk(tree_of(path)):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print":
                assert any(keyword.arg == "file" for keyword in node.keywords), f"{label(path)}:{node.lineno}"


def test_what_is_special_about_mps_is_in_one_file() -> None:
    """The name stays elsewhere where devices are named: `device.choose`, tables by device, and plans without torch."""
    for path in MODULES:
        if label(path) == "peft_core/modeling/mps.py" or path.is_relative_to(ROOT / "peft_core" / "planning"):
            continue
        text = path.read_text()
        assert "torch.mps" not in text, label(path)
        assert "backends.mps" not in text, label(path)
        assert not re.search(r'[!=]= "mps"', text) or label(path) == "peft_core/modeling/device.py", label(path)
