"""Code chunks of Codebase Gardener, as objects and in its LanceDB tables, are records like any other."""

from __future__ import annotations

import shutil
from dataclasses import asdict, dataclass, field
from enum import Enum
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from pydantic import BaseModel

from peft_core.config import Settings
from peft_core.errors import DataError
from peft_core.gardener.chunks import plain_records
from peft_core.gardener.registry import ProjectRegistry
from peft_core.manager import PEFTManager
from peft_core.paths import DataPaths
from tests.unit.data.test_table import CHUNKS, write
from tests.unit.gardener.conftest import WEB


class ChunkType(Enum):
    FUNCTION = "function"


@dataclass
class CodeChunk:
    id: str
    content: str
    language: str
    chunk_type: ChunkType
    file_path: Path | None
    start_line: int
    end_line: int
    start_byte: int = 0
    end_byte: int = 0
    metadata: dict[str, Any] = field(default_factory=dict)
    dependencies: list[str] = field(default_factory=list)
    complexity_score: float = 1.0


class ChunkModel(BaseModel):
    content: str
    language: str
    chunk_type: ChunkType
    file_path: Path


def chunks() -> list[CodeChunk]:
    return [
        CodeChunk(
            row["id"],
            row["content"],
            row["language"],
            ChunkType.FUNCTION,
            Path(row["file_path"]),
            row["start_line"],
            row["end_line"],
            metadata={"path": Path("/code"), "seen": {1, 2}},
            dependencies=["os"],
        )
        for row in CHUNKS
    ]


async def test_chunk_objects_equal_the_same_records(tmp_path: Path) -> None:
    records = [{**row, "dependencies": ["os"], "metadata": {}} for row in CHUNKS]
    for row in records:
        del row["vector"]
    async with PEFTManager(Settings(data_dir=tmp_path / "data")) as manager:
        plain = await manager.inspect_training_data(records, {"max_steps": 3})
        objects = await manager.inspect_training_data(chunks(), {"max_steps": 3})
        dicts = await manager.inspect_training_data([asdict(chunk) for chunk in chunks()], {"max_steps": 3})
    assert objects.held_out_files == plain.held_out_files
    assert objects.samples == dicts.samples == plain.samples
    assert objects.records == len(CHUNKS)


def test_any_object_with_the_attributes_of_a_chunk_is_one() -> None:
    expected = {"content": "x = 1", "language": "python", "chunk_type": "function", "file_path": Path("a.py")}
    model = ChunkModel(content="x = 1", language="python", chunk_type=ChunkType.FUNCTION, file_path=Path("a.py"))
    other = SimpleNamespace(**{**expected, "embedding": [1.0]})
    assert plain_records([model, other]) == [expected, expected]


async def test_what_is_no_chunk_is_refused_with_its_number(tmp_path: Path) -> None:
    manager = PEFTManager(Settings(data_dir=tmp_path / "data"))
    blank = SimpleNamespace(content=" ", language="python")
    with pytest.raises(DataError, match="Record 81 cannot be used: 'content' is blank"):
        await manager.inspect_training_data([*chunks(), blank])
    with pytest.raises(DataError, match=r"Record 81 cannot be used: it is a .*Path"):
        await manager.inspect_training_data([*chunks(), Path("x")])  # type: ignore[list-item]


@pytest.fixture
def table(tmp_path: Path) -> Path:
    """A table of code chunks."""
    return Path(write(tmp_path / "table" / "code_chunks.lance", CHUNKS))


async def test_a_project_whose_code_is_gone_is_trained_on_its_table(
    paths: DataPaths, registry_file: Path, table: Path
) -> None:
    registry, store = ProjectRegistry(paths), paths.root / "projects" / WEB / "vector_store"
    assert registry.data_of(WEB, None) == "/code/web"
    shared = paths.root / "vector_stores" / f"project_{WEB.replace('-', '_')}.lance"
    shared.mkdir(parents=True)
    assert registry.data_of(WEB, None) == str(shared)
    store.mkdir(parents=True)
    shutil.move(table, store)
    assert registry.data_of(WEB, None) == str(store / "code_chunks.lance")
    async with PEFTManager(Settings(data_dir=paths.root)) as manager:
        report = await manager.inspect_training_data(registry.data_of(WEB, None), {"max_steps": 3})
    assert report.records == len(CHUNKS)


def test_the_path_of_a_vector_store_means_its_table(paths: DataPaths, registry_file: Path) -> None:
    registry, store = ProjectRegistry(paths), paths.root / "projects" / WEB / "vector_store"
    (store / "code_chunks.lance").mkdir(parents=True)
    assert registry.data_of(WEB, str(store)) == str(store / "code_chunks.lance")
    assert registry.data_of("other", str(store)) == str(store)
    (store / "more.lance").mkdir()
    assert registry.data_of(WEB, str(store)) == str(store)
    registry_file.write_text("{")
    assert registry.data_of(WEB, "/code/web") == "/code/web"
