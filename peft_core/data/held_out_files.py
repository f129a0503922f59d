"""The held-out files as a whole, with which an evaluation asks as an editor does: in the middle of a file.

An example is one function; an editor sends everything above the cursor, and often what is below. Only lines of held-out
examples are measured. The rest of the file is context: it may have been left out of the examples because it is a licence,
repeats something, or was trained on.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from pydantic import ValidationError

from peft_core.data.classification import NOTEBOOK
from peft_core.data.code_names import NameCollector
from peft_core.data.examples import FileResult, parts_of_file, printable_path
from peft_core.data.exclusions import ExclusionReason
from peft_core.data.secrets import redact_secrets
from peft_core.data.walk import File
from peft_core.schemas.dataset import CodeNames, Example, HeldOutFile
from peft_core.system.files import atomic_write

HELD_OUT_FILES_NAME = "held_out_files.jsonl"
CODE_NAMES_NAME = "names.json"
_MAX_CHARACTERS = 16_000_000  # of all files together; an evaluation reads a hundredth of it


def write_held_out_files(
    directory: Path, files: Iterable[File], examples: Sequence[Example], names: NameCollector
) -> None:
    """Write the files of the held-out examples, without secrets, and the names of the code base."""
    by_path: defaultdict[str, list[Example]] = defaultdict(list)
    for example in examples:
        by_path[example.path].append(example)
    written = "".join(f"{file.model_dump_json()}\n" for file in _held_out_files(files, by_path))
    atomic_write(directory / HELD_OUT_FILES_NAME, written)
    atomic_write(directory / CODE_NAMES_NAME, names.names().model_dump_json())


def read_held_out_files(directory: Path) -> list[HeldOutFile]:
    """Return the files; none if the dataset is one of records, or of an earlier version."""
    try:
        with (directory / HELD_OUT_FILES_NAME).open("rb") as stream:
            return [HeldOutFile.model_validate_json(line) for line in stream]
    except (OSError, ValidationError):
        return []


def read_code_names(directory: Path) -> CodeNames:
    """Return the names of the code base; none as for the files."""
    try:
        return CodeNames.model_validate_json((directory / CODE_NAMES_NAME).read_bytes())
    except (OSError, ValidationError):
        return CodeNames()


def _held_out_files(files: Iterable[File], examples: Mapping[str, Sequence[Example]]) -> Iterator[HeldOutFile]:
    free_characters = _MAX_CHARACTERS
    for file in files:
        path = printable_path(file.name)
        if path not in examples or file.language is NOTEBOOK:  # an editor sends the cells of a notebook one by one
            continue
        parts = parts_of_file(file, path, FileResult())
        if isinstance(parts, ExclusionReason):  # it has changed since it was cut into examples
            continue
        lines, _ = redact_secrets(parts[0].lines)
        rows = tuple(sorted(each for example in examples[path] if (each := _rows_of(example, lines)) is not None))
        text = "".join(lines)
        free_characters -= len(text)
        if free_characters < 0:
            return
        if rows:
            yield HeldOutFile(path=path, language=parts[0].language.name, text=text, rows=rows)


def _rows_of(example: Example, lines: Sequence[str]) -> tuple[int, int] | None:
    """Return the rows of an example in its file; None if it is not a number of whole rows of it."""
    start, end = example.start_line - 1, example.end_line
    return (start, end) if start >= 0 and "".join(lines[start:end]) == example.segments[-1].text else None
