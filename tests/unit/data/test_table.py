"""A LanceDB table of code chunks gives the same records as inline ones, and is read in a child process."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from peft_core.config import Settings
from peft_core.data.summarise import summarise_source
from peft_core.data.table import export_records
from peft_core.errors import DataError, InvalidArgument
from peft_core.manager import PEFTManager

lance = pytest.importorskip("lance", reason="the extra lancedb is not installed")
pyarrow = pytest.importorskip("pyarrow", reason="the extra lancedb is not installed")

WORDS = "alpha beta gamma delta epsilon zeta eta theta iota kappa lambda mu nu xi omicron pi rho sigma tau".split()  # noqa: SIM905


def chunk(number: int) -> dict[str, Any]:
    name = f"{WORDS[number % 19]}_{WORDS[number // 19]}"
    return {
        "id": str(number),
        "content": f"def {name}({name}_start):\n    {name}_total = {name}_start * {number}\n    return {name}_total\n",
        "language": "python",
        "chunk_type": "function",
        "file_path": f"src/module_{number % 10}.py",
        "start_line": 5 * number + 1,
        "end_line": 5 * number + 3,
        "complexity_score": 1.5,
        "vector": [0.5] * 8,
    }


CHUNKS = [chunk(number) for number in range(80)]


def write(path: Path, rows: list[dict[str, Any]], schema: Any = None) -> str:
    lance.write_dataset(pyarrow.Table.from_pylist(rows, schema=schema), str(path))
    return str(path)


def summarise(data: Any) -> Any:
    return summarise_source(data)


def test_a_table_equals_its_rows_given_inline(tmp_path: Path):
    table = write(tmp_path / "chunks.lance", CHUNKS)
    summary, inline = summarise(table), summarise(CHUNKS)
    assert summary.path == Path(table)
    assert summary.model_copy(update={"path": None}) == inline
    assert export_records(Path(table), tmp_path / "records.jsonl") == 80
    written = [json.loads(line) for line in (tmp_path / "records.jsonl").read_text().splitlines()]
    used_columns = ("content", "language", "file_path", "chunk_type", "start_line", "end_line")
    assert written == [{key: row[key] for key in used_columns} for row in CHUNKS]


async def test_a_table_is_inspected_and_queued_like_records(tmp_path: Path):
    table = write(tmp_path / "chunks.lance", CHUNKS)
    async with PEFTManager(Settings(data_dir=tmp_path / "data")) as manager:
        from_table = await manager.inspect_training_data(table, {"max_steps": 3})
        inline = await manager.inspect_training_data(CHUNKS, {"max_steps": 3})
    assert from_table.training_data == table
    assert from_table.model_copy(update={"training_data": inline.training_data}) == inline


def test_summarising_a_table_imports_nothing_heavy(tmp_path: Path):
    table = write(tmp_path / "chunks.lance", CHUNKS)
    code = (
        "import sys; from peft_core.data.summarise import summarise_source; summarise_source(sys.argv[1]);"
        "sys.exit(str({'lance', 'pyarrow', 'numpy', 'torch'} & set(sys.modules)) if "
        "{'lance', 'pyarrow', 'numpy', 'torch'} & set(sys.modules) else 0)"
    )
    process = subprocess.run([sys.executable, "-c", code, table], capture_output=True, text=True, check=False)
    assert (process.returncode, process.stderr) == (0, "")


def test_optional_columns_may_be_missing_or_null(tmp_path: Path):
    bare = [{"content": row["content"], "language": "python"} for row in CHUNKS]
    assert summarise(write(tmp_path / "bare.lance", bare)).examples == 80
    nulls = [
        {**row, "file_path": None if n % 2 else row["file_path"], "start_line": None} for n, row in enumerate(CHUNKS)
    ]
    schema = pyarrow.Table.from_pylist(CHUNKS).schema
    assert summarise(write(tmp_path / "nulls.lance", nulls, schema)).examples == 80


def test_the_error_for_missing_columns_lists_the_existing_ones(tmp_path: Path):
    rows = [{"text": row["content"], "language": "python"} for row in CHUNKS]
    with pytest.raises(
        DataError, match=r"lacks the column 'content'; it has text, language\..*training-data"
    ) as caught:
        summarise(write(tmp_path / "other.lance", rows))
    assert caught.value.code == "missing_columns"


def test_a_broken_row_is_named_with_the_rule_it_breaks(tmp_path: Path):
    rows = [*CHUNKS[:16], {**CHUNKS[16], "content": "  "}]
    with pytest.raises(DataError, match=r"Row 17 of .*chunks\.lance cannot be used: 'content' is blank"):
        summarise(write(tmp_path / "chunks.lance", rows))


def test_an_empty_table_is_refused(tmp_path: Path):
    with pytest.raises(DataError, match="contains no rows") as caught:
        summarise(write(tmp_path / "empty.lance", [], pyarrow.Table.from_pylist(CHUNKS).schema))
    assert caught.value.code == "training_data_empty"


def test_a_directory_that_is_only_named_like_a_table_is_refused(tmp_path: Path):
    (tmp_path / "code.lance").mkdir()
    with pytest.raises(InvalidArgument, match="must be a LanceDB table"):
        summarise(str(tmp_path / "code.lance"))
    (tmp_path / "code.lance" / "_versions").mkdir()
    (tmp_path / "code.lance" / "_versions" / "1.manifest").write_bytes(b"no manifest at all")
    with pytest.raises(DataError) as caught:
        summarise(str(tmp_path / "code.lance"))
    assert caught.value.code == "not_a_table"


def test_a_table_that_refers_to_data_elsewhere_is_refused(tmp_path: Path):
    original = write(tmp_path / "chunks.lance", CHUNKS)
    lance.dataset(original).shallow_clone(str(tmp_path / "clone.lance"), 1)
    with pytest.raises(DataError, match="refers to data in another place") as caught:
        summarise(str(tmp_path / "clone.lance"))
    assert caught.value.code == "foreign_data"
    linked = Path(write(tmp_path / "linked.lance", CHUNKS))
    (linked / "data").rename(tmp_path / "elsewhere")
    (linked / "data").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(InvalidArgument, match="it contains a symbolic link, data"):
        summarise(str(linked))


def test_the_error_for_a_missing_extra_names_the_install_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    table = write(tmp_path / "chunks.lance", CHUNKS)
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "lance.py").write_text("raise ImportError\n")
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path / 'site'}:{Path(__file__).parents[3]}")
    with pytest.raises(DataError, match=r"pip install 'peft-mcp\[lancedb\]'") as caught:
        summarise(table)
    assert caught.value.code == "extra_missing"


async def test_sensitive_places_and_allowed_roots_apply_to_tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    private = write(tmp_path / "home" / ".aws" / "chunks.lance", CHUNKS)
    (tmp_path / "link.lance").symlink_to(private)
    unrestricted = Settings(data_dir=tmp_path / "data")
    for settings, data, code in (
        (unrestricted, private, "sensitive_place"),
        (unrestricted, str(tmp_path / "link.lance"), "sensitive_place"),
        (
            Settings(data_dir=tmp_path / "data", allowed_roots=[tmp_path / "work"]),
            write(tmp_path / "chunks.lance", CHUNKS),
            "outside_allowed_roots",
        ),
    ):
        async with PEFTManager(settings) as manager:
            with pytest.raises(InvalidArgument) as caught:
                await manager.train_adapter("web", data, {"max_steps": 1})
        assert caught.value.code == code
