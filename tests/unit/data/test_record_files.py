"""Files of records: each type gives the same records, and a file that cannot be read is refused with place and reason."""

from __future__ import annotations

import csv
import gzip
import io
import json
import subprocess
import sys
import tempfile
import tracemalloc
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from peft_core.data.dataset import read_examples
from peft_core.data.prepare import prepare
from peft_core.data.records import Notes, files, read_copy, read_file, write_records
from peft_core.data.summarise import summarise_source
from peft_core.data.table import export_records
from peft_core.data.token_counter import EstimatedTokenCounter
from peft_core.errors import DataError, InvalidArgument, PeftMcpError
from peft_core.schemas.dataset import DatasetSpec, SourceKind

RECORDS = [{"prompt": f"double {n}", "completion": f"{2 * n}, é\n…\u2028"} for n in range(20)]
EXPECTED = [((record["prompt"], False), (record["completion"], True)) for record in RECORDS]


def lines(records: Sequence[Any] = RECORDS, **how: Any) -> str:
    return "\n".join(json.dumps(record, ensure_ascii=False, **how) for record in records)


def table(delimiter: str = ",", records: Sequence[dict[str, Any]] = RECORDS) -> str:
    stream = io.StringIO()
    writer = csv.DictWriter(stream, ["", *records[0]], delimiter=delimiter)
    writer.writeheader()
    writer.writerows({"": number, **record} for number, record in enumerate(records))
    return stream.getvalue()


def write(directory: Path, name: str, content: str | bytes) -> Path:
    path = directory / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("data.jsonl", lines()),
        ("DATA.NDJSON", lines()),
        ("data.json", lines()),
        ("data.json", json.dumps(RECORDS)),
        ("data.json", json.dumps(RECORDS, indent=2)),
        ("data.json", "\ufeff" + json.dumps(RECORDS, indent=2)),
        ("data.jsonl", json.dumps(RECORDS)),
        ("data.jsonl", "[\n" + lines().replace("}\n{", "},\n{") + "\n]"),
        ("data.json", lines(indent=2)),
        ("data.jsonl", lines(indent=2)),
        ("data.json", json.dumps({"data": RECORDS})),
        ("data.json", json.dumps({"version": "1.0", "data": RECORDS, "count": 20}, indent=1)),
        (
            "data.json",
            json.dumps({"errors": [], "columns": ["prompt", "completion"], "data": RECORDS, "meta": {"a": [1]}}),
        ),
        ("data.jsonl.gz", gzip.compress(lines().encode())),
        ("data.json.gz", gzip.compress(json.dumps(RECORDS).encode())),
        ("data.jsonl", gzip.compress(lines().encode())),
        ("data.jsonl", lines().encode("utf-16")),
        ("data.jsonl", b"\xfe\xff" + lines().encode("utf-16-be")),
        ("data.json", json.dumps(RECORDS, ensure_ascii=False).encode("utf-16")),
        ("data.csv", table()),
        ("data.csv.gz", gzip.compress(table().encode())),
        ("data.csv", "\ufeff" + table(";")),
        ("data.csv", table().encode("utf-16")),
        ("data.tsv", table("\t")),
    ],
)
def test_every_type_of_file_gives_the_same_records(tmp_path: Path, name: str, content: str | bytes):
    path = write(tmp_path, name, content)
    assert [record.texts for record in read_file(path)] == EXPECTED
    assert summarise_source(str(path)).kind is SourceKind.JSONL


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("data.json", json.dumps({"train": RECORDS, "test": RECORDS}), "it holds several lists, train and test"),
        ("data.json", json.dumps(RECORDS, indent=1).replace('"double 7"', "double 7"), "Expecting value, in line 31"),
        ("data.json", json.dumps(RECORDS, indent=1)[:-3], "Expecting ',' delimiter, in line 81"),
        ("data.json", json.dumps(RECORDS, indent=1) + "x", "expected the end of the file, found 'x', in line 82"),
        ("data.jsonl", lines([{"chosen": [RECORDS[0]], "rejected": [RECORDS[1]]}] * 2), "Line 1 of .* preference pair"),
        ("data.jsonl", lines([RECORDS, RECORDS]), "Line 1 of .*: it is a list; it must be a JSON object"),
        ("data.json", "[\n" + "[" * 100_000, "nested too deeply"),
        ("data.json", '[\n{"text": "a", "text": "b"}]', "'text' is given twice"),
        ("data.jsonl", '{"text": "a", "text": "b"}', "Line 1 of .* 'text' is given twice"),
        ("data.jsonl.gz", lines(), "not a gzip file"),
        ("data.jsonl.gz", gzip.compress(lines().encode())[:-9], "not a complete gzip file"),
        ("data.jsonl", b"\xff\xfe" + b"{\0\x00\xd8}", "UTF-16"),
        ("data.csv", table().encode("latin-1", "replace"), "line 2 is not UTF-8"),
        ("data.csv", table() + "1,2\n", "Line 42 of .*: it has 2 cells, but the header has 3"),
        ("data.csv", table() + '"a"b,2,3\n', "line 42 begins a row that is not valid CSV"),
        ("data.csv", table() + '1,"never closed', "line 42 begins a row that is not valid CSV"),
        ("data.csv", "prompt,prompt\na,b\n", "the column 'prompt' twice"),
        ("data.csv", "question,reply\na,b\n", r"its keys \(question, reply\) match none"),
        ("data.csv", table() + "20,,x\n21,a,\n", "Line 43 of .*'completion' is blank"),
    ],
)
def test_a_broken_file_is_refused_with_the_place(tmp_path: Path, name: str, content: str | bytes, expected: str):
    with pytest.raises(DataError, match=expected) as caught:
        list(read_file(write(tmp_path, name, content)))
    assert caught.value.code in {"unreadable_file", "broken_record"}
    assert str(caught.value).count(name) >= 1


@pytest.mark.parametrize("wrapped", [False, True])
def test_a_mistake_in_a_large_json_file_is_named_where_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wrapped: bool
):
    monkeypatch.setattr(files, "MAX_RECORD_BYTES", 1000)
    monkeypatch.setattr(files, "_CHUNK", 64)
    broken = json.dumps(RECORDS, indent=1).replace('"prompt": "double 3"', '"prompt" "double 3"')
    content = f'{{"rows": {broken}}}' if wrapped else broken
    with pytest.raises(DataError, match="Expecting ':' delimiter, in line 15"):
        list(read_file(write(tmp_path, "data.json", content)))


@pytest.mark.parametrize("name", ["data.txt", "data.xlsx", "data.jsonl.zst", "data.zip", "data", "json"])
def test_another_type_of_file_is_refused_with_those_that_are_read(tmp_path: Path, name: str):
    with pytest.raises(
        InvalidArgument, match=r"\.jsonl, \.ndjson, \.json, \.csv, \.tsv, each also with \.gz; \.parquet"
    ):
        summarise_source(str(write(tmp_path, name, lines())))


def test_messages_in_a_csv_file_are_json_text(tmp_path: Path):
    chats = [[{"role": "user", "content": f"q {n}"}, {"role": "assistant", "content": f"a {n}"}] for n in range(9)]
    path = write(tmp_path, "data.csv", table(records=[{"messages": json.dumps(chat)} for chat in chats]))
    records = [record.conversation for record in read_file(path)]
    assert [list(conversation.messages) for conversation in records if conversation] == chats
    path = write(tmp_path, "repr.csv", table(records=[{"messages": str(chat)} for chat in chats]))
    with pytest.raises(DataError, match="'messages' is text that is not valid JSON"):
        list(read_file(path))


def test_chunks_in_a_csv_file_keep_their_lines_and_empty_cells_are_absent(tmp_path: Path):
    rows = [{"content": f"x = {n}", "language": "python", "start_line": n or "", "label": ""} for n in range(3)]
    notes = Notes()
    records = list(read_file(write(tmp_path, "data.csv", table(records=rows)), notes=notes))
    assert [record.start_line for record in records] == [0, 1, 2]
    assert notes.unused == {"Unnamed: 0": 3, "label": 3}


def test_broken_lines_and_rows_can_be_skipped(tmp_path: Path):
    jsonl = write(tmp_path, "data.jsonl", lines() + '\n{"prompt": "a"\n{"text": "a", "text": "b"}\n')
    summary = summarise_source(str(jsonl), skip_unusable_records=True)
    assert (summary.examples, summary.left_out) == (20, {"not_json": 1, "bad_value": 1})
    assert summary.skipped[0].first == ("line 21",)
    rows = write(tmp_path, "data.csv", table() + "1,2\n")
    assert summarise_source(str(rows), skip_unusable_records=True).left_out == {"bad_value": 1}


@pytest.mark.parametrize("encoding", ["utf-8", "utf-16"])
def test_what_follows_a_line_that_is_too_long_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, encoding: str):
    monkeypatch.setattr(files, "MAX_RECORD_BYTES", 100)
    content = '{"text": "a"}\n{"text": "' + "b" * 1000 + '"}\n{"text": "c"}\n'
    notes = Notes()
    path = write(tmp_path, "data.jsonl", content.encode(encoding))
    assert [record.name for record in read_file(path, skip=True, notes=notes)] == ["line 1", "line 3"]
    assert notes.counts() == {"not_json": 1}


# -- limits ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("zeros.jsonl.gz", gzip.compress(b"\0" * 3_000_000)),
        ("line.jsonl", b'{"text": "' + b"a" * 3_000_000 + b'"}'),
        ("array.json", b'[\n{"text": "' + b"a" * 3_000_000 + b'"}]'),
        ("row.csv", b'text\n"' + b"a\n" * 1_500_000 + b'"'),
        ("cells.csv", b"text\n" + b"," * 3_000_000),
        ("header.csv", b"a" * 3_000_000),
        ("lists.json", b'{"a": 1, "data": [' + b"[" * 3_000_000),
        ("bomb.csv.gz", gzip.compress(b"text\n" + b"a" * 3_000_000)),
    ],
)
def test_a_hostile_file_takes_bounded_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, content: bytes
):
    monkeypatch.setattr(files, "MAX_RECORD_BYTES", 100_000)
    path = write(tmp_path, name, content)
    del content
    tracemalloc.start()
    try:
        with pytest.raises(DataError):
            list(read_file(path))
        assert tracemalloc.get_traced_memory()[1] < 2_000_000
    finally:
        tracemalloc.stop()


def test_a_compressed_file_is_unpacked_up_to_a_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(files, "MAX_FILE_BYTES", 100_000)
    path = write(tmp_path, "data.jsonl.gz", gzip.compress(b'{"text": "a"}\n' * 10_000))
    with pytest.raises(DataError, match="too large") as caught:
        list(read_file(path))
    assert caught.value.code == "too_large"


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".tsv", ".json.gz"])
@given(content=st.binary(max_size=60) | st.text(alphabet='[]{}",:\n aé', max_size=60).map(str.encode))
def test_any_bytes_give_records_or_an_error_for_users(suffix: str, content: bytes):
    with tempfile.TemporaryDirectory() as directory:  # hypothesis does not reset tmp_path between examples
        path = write(Path(directory), f"data{suffix}", gzip.compress(content) if suffix.endswith("gz") else content)
        try:
            records = list(read_file(path, skip=True))
        except PeftMcpError as error:
            code = error.code
            assert code in {"unreadable_file", "broken_record"}
        else:
            assert all(record.content.strip() for record in records)


VALUES = st.recursive(
    st.integers() | st.text(), lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=5
)


@given(
    st.lists(st.fixed_dictionaries({"text": st.text(min_size=1).filter(str.strip), "meta": VALUES}), min_size=1),
    st.integers(1, 200),
)
def test_json_in_any_layout_is_read_like_json_lines(records: list[dict[str, Any]], chunk: int):
    with tempfile.TemporaryDirectory() as directory, pytest.MonkeyPatch.context() as patch:
        patch.setattr(files, "_CHUNK", chunk)
        paths = [
            write(Path(directory), "a.json", json.dumps(records)),
            write(Path(directory), "b.json", json.dumps(records, indent=1)),
            write(Path(directory), "c.json", "\n".join(json.dumps(record, indent=2) for record in records)),
            write(Path(directory), "d.json", json.dumps({"n": 12, "rows": records}, indent=1)),
        ]
        for path in paths:
            assert [record.texts[0][0] for record in read_file(path)] == [record["text"] for record in records]


# -- from the file to the data set ---------------------------------------------------------------------------------------


def test_a_job_prepares_the_same_data_set_from_each_type_of_file(tmp_path: Path):
    kept = {}
    records = [{"instruction": f"Double {n}.", "output": f"Twice {n} is {2 * n}.", "id": n} for n in range(40)]
    bad = {"instruction": "a", "output": "b", "mood": "sad"}
    for name, content in (
        ("a.jsonl", lines([*records, bad])),
        ("b.json", json.dumps([*records, bad], indent=1)),
        ("c.csv", table(records=[{**record, "mood": ""} for record in records] + [{**bad, "id": 1}])),
    ):
        path = write(tmp_path, name, content)
        spec = DatasetSpec(
            source=path, source_kind=SourceKind.JSONL, max_length=128, held_out_fraction=0.2, seed=0,
            skip_unusable_records=True,
        )  # fmt: skip
        prepared = prepare(
            spec, directory=tmp_path / f"{name}.d", token_counter=EstimatedTokenCounter(), report=lambda _detail: None
        )
        assert prepared.summary.left_out == {"unknown_key": 1}
        examples = [
            *read_examples(tmp_path / f"{name}.d/train.jsonl"),
            *read_examples(tmp_path / f"{name}.d/held_out.jsonl"),
        ]
        kept[name] = {tuple((segment.text, segment.learn) for segment in example.segments) for example in examples}
    assert kept["a.jsonl"] == kept["b.json"] == kept["c.csv"]
    assert all("Double" in segments[0][0] and segments[-1][1] for segments in kept["a.jsonl"])
    assert len(kept["a.jsonl"]) == 40


def test_written_records_are_read_again_as_they_were(tmp_path: Path):
    call = {"function": {"name": "add", "arguments": {"a": 1}}}
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "tool_calls": [call], "weight": 1}]
    given_records = [
        {"messages": turns, "tools": [{"name": "add"}], "id": object()},
        {"messages": turns, "mood": "sad"},
        {"messages": {1, 2}},
        {"messages": turns},
    ]
    write_records(given_records, tmp_path / "records.jsonl", skip=True)
    notes = Notes()
    records = list(read_copy(tmp_path / "records.jsonl", skip=True, notes=notes))
    assert [record.name for record in records] == ["record 1", "record 4"]
    assert records[0].conversation is not None
    assert records[0].conversation.messages[1]["tool_calls"][0]["function"]["name"] == "add"
    assert records[0].conversation.tools
    assert notes.counts() == {"unknown_key": 1, "unknown_format": 1}
    with pytest.raises(DataError, match="Record 3 cannot be used: it cannot be written as JSON"):
        write_records(given_records, tmp_path / "records.jsonl")


# -- Parquet -----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_parquet_file_equals_its_rows_given_inline(tmp_path: Path):
    pyarrow = pytest.importorskip("pyarrow", reason="the extra lancedb is not installed")
    parquet = pytest.importorskip("pyarrow.parquet", reason="the extra lancedb is not installed")
    rows = [
        {
            "id": n,
            "embedding": [0.5, 0.5],
            "messages": [
                {"role": "user", "content": f"double {n}"},
                {
                    "role": "assistant",
                    "content": f"{2 * n}",
                    "tool_calls": [{"name": "f", "arguments": f'{{"n": {n}}}'}],
                },
            ],
        }
        for n in range(20)
    ]
    path = tmp_path / "data.parquet"
    parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    summary, inline = summarise_source(str(path)), summarise_source(rows)
    assert summary.model_copy(update={"path": None}) == inline
    assert summary.unused_keys == {"id": 20, "embedding": 20}
    assert export_records(path, tmp_path / "records.jsonl") == 20
    copied, given_rows = read_copy(tmp_path / "records.jsonl"), tmp_path / "inline.jsonl"
    write_records(rows, given_rows)
    assert [record.conversation for record in copied] == [record.conversation for record in read_copy(given_rows)]
    parquet.write_table(pyarrow.Table.from_pylist([{"text": "a", "label": n} for n in range(20)]), path)
    with pytest.raises(DataError, match=r"Row 1 of .*data\.parquet cannot be used: the key 'label' is not used"):
        summarise_source(str(path))
    path.write_bytes(b"PAR1 is not enough")
    with pytest.raises(DataError, match="cannot be read as a Parquet file") as caught:
        summarise_source(str(path))
    assert caught.value.code == "not_a_table"


def test_reading_files_imports_nothing_heavy(tmp_path: Path):
    path = write(tmp_path, "data.csv", table())
    heavy = ["pyarrow", "numpy", "pandas", "torch", "transformers", "tree_sitter"]
    code = (
        "import sys; from peft_core.data.summarise import summarise_source; summarise_source(sys.argv[1]); "
        f"print([name for name in {heavy} if name in sys.modules])"
    )
    process = subprocess.run([sys.executable, "-c", code, path], check=True, capture_output=True, text=True)
    assert process.stdout.strip() == "[]"
