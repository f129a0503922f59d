"""What an evaluation gets besides the held-out examples: their whole files, and the names of the code base."""

from __future__ import annotations

from pathlib import Path

from peft_core.data.chunking import split_lines
from peft_core.data.code_names import NameCollector
from peft_core.data.dataset import read_examples
from peft_core.data.held_out_files import read_code_names, read_held_out_files
from peft_core.data.leakage import TrainingFingerprint
from peft_core.data.prepare import prepare
from peft_core.data.token_counter import EstimatedTokenCounter
from peft_core.schemas.dataset import CodeNames, DatasetPurpose
from tests.factories import make_dataset_spec

SECRET = "ghp_" + "a1B2c3D4e5F6g7H8i9J0k1L2m3N4o5P6q7R8"


def function(file: int, number: int) -> str:
    body = "".join(f"    step_{file}_{number}_{n} = load_part({n}) + {file * number}\n" for n in range(12))
    return f"def build_{file}_{number}(parts):\n{body}    return step_{file}_{number}_0\n"


def repository(root: Path, files: int = 6) -> Path:
    root.mkdir()
    for file in range(files):
        functions = "\n\n".join(function(file, number) for number in range(4))
        (root / f"module_{file}.py").write_text(f'TOKEN = "{SECRET}"\nLIMIT_OF_PARTS = {file}\n\n\n{functions}')
    return root


def test_held_out_files_are_written_whole_without_secrets_and_with_the_rows_of_their_examples(tmp_path: Path) -> None:
    spec = make_dataset_spec(repository(tmp_path / "r"), held_out_fraction=0.4, max_length=512)
    prepare(spec, directory=tmp_path / "out", token_counter=EstimatedTokenCounter(), report=lambda _: None)
    held_out = read_examples(tmp_path / "out" / "held_out.jsonl")
    files = {file.path: file for file in read_held_out_files(tmp_path / "out")}
    assert set(files) == {example.path for example in held_out} != set()
    for example in held_out:
        lines = split_lines(files[example.path].text)
        assert (example.start_line - 1, example.end_line) in files[example.path].rows
        assert "".join(lines[example.start_line - 1 : example.end_line]) == example.segments[-1].text
    for file in files.values():
        assert SECRET not in file.text
        assert "LIMIT_OF_PARTS" in file.text
    names = read_code_names(tmp_path / "out")
    assert {"LIMIT_OF_PARTS", "build_0_0", "build_5_3"} <= names.defined
    assert "load_part" in names.used - names.defined
    assert not any("ghp_" in name for name in names.used)


def test_what_an_adapter_was_trained_on_is_context_and_not_measured(tmp_path: Path) -> None:
    root = repository(tmp_path / "r", files=2)
    known = TrainingFingerprint.of([function(0, 1)])
    spec = make_dataset_spec(root, held_out_fraction=1.0, max_length=512, purpose=DatasetPurpose.EVALUATION)
    prepare(
        spec, directory=tmp_path / "out", token_counter=EstimatedTokenCounter(), report=lambda _: None, known=[known]
    )
    (file,) = [file for file in read_held_out_files(tmp_path / "out") if file.path == "module_0.py"]
    row = file.text.splitlines().index("def build_0_1(parts):")
    assert all(not start <= row < stop for start, stop in file.rows)
    assert any(start <= row + 16 < stop for start, stop in file.rows), "its neighbour is measured"


def test_records_have_no_files(tmp_path: Path) -> None:
    assert read_held_out_files(tmp_path) == []
    assert read_code_names(tmp_path) == CodeNames()


def test_definitions_are_found_in_languages_of_every_style() -> None:
    collector = NameCollector()
    for text in (
        "async def fetch_all(self):\n    self.open_files = 1\n\nclass HttpPool(Base):\n    max_size: int = 3\n",
        "export default class TokenStore {\n  async loadToken(key: string) {\n  }\n}\n",
        "func (s *Server) HandleJob(w Writer) error {\n}\ntype JobQueue struct {\n}\n",
        "pub(crate) fn parse_header<T>(input: &str) -> T {\n}\npub struct FrameHeader {\n    pub frame_size: u32,\n}\n",
        "public static List<Foo> findOrders(int id) {\n}\n",
        "static int frame_open(struct frame *f)\n{\n}\nint frame_close(struct frame *f) {\n",
    ):
        collector.add(text)
    defined = collector.names().defined
    assert {"fetch_all", "open_files", "HttpPool", "max_size", "TokenStore", "loadToken", "HandleJob"} <= defined
    assert {"JobQueue", "parse_header", "FrameHeader", "frame_size", "findOrders", "frame_close"} <= defined
    assert defined.isdisjoint({"self", "int", "return", "fetch", "error"})
