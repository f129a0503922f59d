"""The house's rules: who may import whom, and who may import what is heavy."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
MODULES = sorted([*(ROOT / "server").rglob("*.py"), *(ROOT / "peft_core").rglob("*.py")])

GROUND = {
    "spec",
    "example",
    "task",
    "generation",
    "measurements",
    "results",
    "events",
    "errors",
    "paths",
    "config",
    "lock",
    "logs",
    "places",
}  # what everything may stand on
MAY_IMPORT = {
    "validation": GROUND,
    "estimate": GROUND,
    "recipe": GROUND,
    "bases": GROUND,
    "data": GROUND,
    "adapters": GROUND | {"bases", "proof"},
    "compute": GROUND | {"bases"},
    "proof": GROUND,
    "training": GROUND | {"bases", "data", "adapters", "compute", "estimate", "proof", "recipe"},
    "evaluation": GROUND | {"bases", "data", "adapters", "compute", "proof", "training", "inference"},
    "inference": GROUND | {"bases", "adapters", "compute", "estimate", "machine"},
    "jobs": GROUND | {"bases", "data", "adapters", "estimate", "machine", "proof", "recipe"},
    "manager": GROUND | {"jobs", "adapters", "inference", "validation"},
    "server": GROUND | {"manager", "validation", "jobs", "adapters"},
}
HEAVY = {"torch", "transformers", "peft", "accelerate", "numpy", "gguf", "safetensors", "lance", "pyarrow"}
MAY_BE_HEAVY = {
    "training",
    "evaluation",
    "compute",
    "inference/host",
    "bases/convert.py",
    "data/table_rows.py",
}  # child processes only
SQL_SPEAKERS = ["jobs/schema.py", "jobs/store.py"]


def room_of(path: Path) -> str:
    relative = path.relative_to(ROOT)
    if relative.parts[0] == "server":
        return "server"
    return relative.parts[1].removesuffix(".py")


def imports_of(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module


def identify(path: Path) -> str:
    return str(path.relative_to(ROOT))


def test_dependencies_point_downwards() -> None:
    for path in MODULES:
        room = room_of(path)
        if room == "__init__":
            continue  # the public names
        allowed = MAY_IMPORT.get(room, GROUND) | {room}
        for module in imports_of(path):
            if module.startswith("peft_core."):
                assert module.split(".")[1] in allowed, f"{identify(path)} imports {module}"
            assert room == "server" or module.split(".")[0] not in {"server", "mcp"}, (
                f"{identify(path)} imports {module}"
            )


def test_only_child_processes_import_what_is_heavy() -> None:
    for path in MODULES:
        inside = str(path.relative_to(ROOT / "peft_core")) if room_of(path) != "server" else ""
        if not any(inside == home or inside.startswith(f"{home}/") for home in MAY_BE_HEAVY):
            assert not HEAVY & {module.split(".")[0] for module in imports_of(path)}, identify(path)


def test_two_modules_speak_sql() -> None:
    speakers = [identify(path) for path in MODULES if "sqlite3" in set(imports_of(path))]
    assert speakers == [f"peft_core/{speaker}" for speaker in SQL_SPEAKERS]


def test_no_module_is_longer_than_a_reader_bears() -> None:
    lengths = {identify(path): len(path.read_text().splitlines()) for path in MODULES}
    assert {name: length for name, length in lengths.items() if length > 350} == {}


def test_standard_output_is_a_wire() -> None:
    for path in MODULES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print":
                assert any(keyword.arg == "file" for keyword in node.keywords), f"{identify(path)}:{node.lineno}"
