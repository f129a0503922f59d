"""Read the code cells of a Jupyter notebook (`.ipynb`): the code of the kernel's language, and cells in other languages.

In: the text of the file, in nbformat 3 or 4 (https://nbformat.readthedocs.io/en/latest/format_description.html). Out: one
`SourcePart` per language, whose cells follow each other with a blank line between them. Outputs and Markdown cells are not
read. Commands to the kernel or to a shell (`%matplotlib inline`, `!pip install`) are left out and counted; a cell that begins
with `%%bash` and the like is in that language, and of `%%time` only the first line is left out.

The line numbers of a notebook count all lines of its code cells in order, as if the cells followed each other in one file.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from peft_core.data.exclusions import MAX_FILE_BYTES, ExclusionReason
from peft_core.data.languages import Language, is_known_label, language_named, language_of_file
from peft_core.data.read_text import decode, placeholder, read_bytes, why_not_written_by_hand
from peft_core.schemas.dataset import Example

MAX_NOTEBOOK_BYTES = 50_000_000  # most of a large notebook is pictures
_MAX_CELLS = 10_000
_MAX_CONTAINERS = 1_000_000  # lists and objects, which take up to 0.2 GB in memory; outputs may have more numbers
_DEFAULT = "python"
_PROSE_CELLS = frozenset({"md", "markdown", "latex"})
_UNKNOWN = "?"  # the language of a cell that is left out
# `%%NAME` at the start of a cell: its language, or "" if the rest of the cell is code of the kernel's language.
_CELL_MAGICS = {
    "bash": "shell", "sh": "shell", "javascript": "javascript", "js": "javascript", "html": "html", "sql": "sql",
    "bigquery": "sql", "sparksql": "sql", "r": "r", "ruby": "ruby", "perl": "perl", "python": "python", "python3": "python",
    "pypy": "python", "julia": "julia", "cython": "cython", "scala": "scala", "spark": "scala", "cmd": "batch",
    "powershell": "powershell", "pwsh": "powershell", "csharp": "csharp", "fsharp": "fsharp", "typescript": "typescript",
    "cu": "cpp", "cuda": "cpp", "cpp": "cpp", "c": "c", "rust": "rust", "svelte": "svelte",
    "time": "", "timeit": "", "capture": "", "prun": "", "memit": "", "mprun": "", "lprun": "", "debug": "", "snapshot": "",
    "heat": "", "wandb": "", "pyspark": "", "local": "", "px": "", "autopx": "",
}  # fmt: skip
_PLAIN_NAME = re.compile(r"[\w+#. -]{1,30}")
_MAGIC = re.compile(r"\s*(%%?|#!)([\w.-]+)[^\S\n]*(.*)")
_TIMING = re.compile(
    r"^(\s*(?:\w[\w\s,.]*=\s*)?)%(?:time|timeit|prun|memit)(?:\s+-\w+(?:\s+\d+)?)*\s+(?=\S)"
)  # a command before a statement, or before the value that a statement assigns
# `%s` at the start of a line is part of a text, and `!=` of a condition.
_PYTHON_COMMAND = re.compile(
    r"\s*(?:%{1,2}[A-Za-z_]\w|!(?!=)|\?{1,2}\w)|[\w.]+\?{1,2}\s*$|[\w\s,.]+=\s*(?:!(?!=)|%[A-Za-z_]\w)"
)
# In these languages `!` is an operator, and the remainder `%` may begin a line, which is then indented.
_OTHER_COMMAND = re.compile(r"(?:%{1,2}|#!|[?;\]])[A-Za-z_]\w")
_COMMANDS = {_DEFAULT: _PYTHON_COMMAND} | dict.fromkeys(("julia", "csharp", "fsharp", "scala"), _OTHER_COMMAND)


@dataclass(slots=True)
class SourcePart:
    """The code of one language in a file."""

    language: Language
    lines: list[str] = field(default_factory=list)  # with their ends
    numbers: list[int] = field(
        default_factory=list
    )  # 1-based, of each line of a notebook; a blank line between cells has
    # that of the line before. Empty: lines are numbered as they come.

    def line_number(self, row: int) -> int:
        """Return the number of a row (0-based) as the user counts it."""
        return self.numbers[row] if self.numbers else row + 1

    def with_line_numbers(self, example: Example) -> Example:
        """Return an example that was cut from the lines, with its lines numbered as the user counts them."""
        if not self.numbers:
            return example
        lines = {"start_line": self.numbers[example.start_line - 1], "end_line": self.numbers[example.end_line - 1]}
        return example.model_copy(update=lines)


@dataclass(slots=True)
class Notebook:
    parts: list[SourcePart]
    left_out: dict[str, int]  # cells and lines by `ExclusionReason`


def read_notebook(path: str | Path) -> Notebook | ExclusionReason:
    """Return the code of a notebook by language, or the reason why it is excluded."""
    content = read_bytes(path, MAX_NOTEBOOK_BYTES)
    if isinstance(content, ExclusionReason):
        return content
    text = placeholder(content) or decode(content)
    return text if isinstance(text, ExclusionReason) else parse_notebook(text)


def parse_notebook(text: str) -> Notebook | ExclusionReason:
    """Return the code of a notebook by language, or the reason why it is excluded."""
    if text.count("[") + text.count("{") > _MAX_CONTAINERS:
        return ExclusionReason.TOO_LARGE
    try:
        document = json.loads(text)
        kernel, cells = _kernel_language(document), list(_code_cells(document))
    except (ValueError, RecursionError, TypeError, KeyError, AttributeError):
        return ExclusionReason.BROKEN_NOTEBOOK
    if len(cells) > _MAX_CELLS or sum(len(source) for _, source in cells) > MAX_FILE_BYTES:
        return ExclusionReason.TOO_LARGE
    parts: dict[str, SourcePart] = {}
    left_out: dict[str, int] = {}
    number = 1
    for language_name, source in cells:
        lines = source.split("\n")
        code, language, commands = _without_commands(lines, language_name or kernel)
        reason = why_not_written_by_hand("\n".join(line for _, line in code), generated=True)
        if commands:
            left_out[ExclusionReason.NOTEBOOK_COMMAND] = left_out.get(ExclusionReason.NOTEBOOK_COMMAND, 0) + commands
        if reason is ExclusionReason.MINIFIED:
            left_out[reason] = left_out.get(reason, 0) + 1
        if reason is None:
            part = parts.setdefault(language, SourcePart(language_named(language)))
            if part.lines:
                part.lines.append("\n")
                part.numbers.append(part.numbers[-1])
            part.lines += [f"{line}\n" for _, line in code]
            part.numbers += [number + row for row, _ in code]
        number += len(lines)
    return Notebook(list(parts.values()), left_out) if parts else ExclusionReason.NO_CODE


def _kernel_language(document: Mapping[str, Any]) -> str:
    """Return the language of the cells that name none."""
    metadata = document.get("metadata")
    if not isinstance(metadata, dict):
        return _DEFAULT
    kernel, info = metadata.get("kernelspec"), metadata.get("language_info")
    kernel, info = kernel if isinstance(kernel, dict) else {}, info if isinstance(info, dict) else {}
    for name in (kernel.get("language"), info.get("name")):
        if isinstance(name, str) and name.strip():
            return _language_name(name)
    name = kernel.get("name")
    return _language_name(name) if isinstance(name, str) and is_known_label(name) else _DEFAULT


def _language_name(name: str) -> str:
    """Return the name of a language as the table has it."""
    return language_named(name).name if is_known_label(name) or _PLAIN_NAME.fullmatch(name) else _DEFAULT


def _code_cells(document: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield language (may be empty) and text of each code cell.

    Raises:
        TypeError, ValueError: this is not a notebook.
    """
    if "worksheets" in document:  # nbformat 3
        cells = [cell for sheet in document["worksheets"] for cell in sheet["cells"]]
    else:
        cells = document["cells"]
    if not isinstance(cells, list):
        raise TypeError("cells must be a list")
    for cell in cells:
        if cell.get("cell_type") != "code":
            continue
        source = cell.get("source", cell.get("input", ""))
        source = source if isinstance(source, str) else "".join(source)
        source = source.encode("utf-8", "replace").decode()  # JSON can express half a character
        yield _cell_language(cell), source.replace("\r\n", "\n").replace("\r", "\n").strip("\n")


def _cell_language(cell: Mapping[str, Any]) -> str:
    """Return the language that a cell names: in nbformat 3, or in a notebook of several languages."""
    metadata = cell.get("metadata")
    metadata = metadata if isinstance(metadata, dict) else {}
    polyglot = (
        cell.get("language"),
        _value(metadata, "vscode", "languageId"),
        _value(metadata, "polyglot_notebook", "kernelName"),
        _value(metadata, "dotnet_interactive", "language"),
    )
    name = next((name for name in polyglot if isinstance(name, str) and name.strip()), "")
    return _language_name(name) if name else ""


def _value(metadata: Mapping[str, Any], group: str, key: str) -> object:
    values = metadata.get(group)
    return values.get(key) if isinstance(values, dict) else None


def _without_commands(lines: list[str], language: str) -> tuple[list[tuple[int, str]], str, int]:
    """Return rows and lines of a cell's code, its language, and how many lines are commands."""
    first = next((row for row, line in enumerate(lines) if line.strip()), 0)
    magic = _MAGIC.match(lines[first])
    cell_language = None if magic is None else _language_of_cell(magic, language, is_alone=len(lines) == first + 1)
    if cell_language == _UNKNOWN:
        return [], language, sum(1 for line in lines if line.strip())
    rows, commands = list(enumerate(lines)), 0
    if cell_language is not None:
        rows, commands, language = rows[first + 1 :], 1, cell_language
    command = _COMMANDS.get(language)
    if command is None:
        return rows, language, commands
    kept: list[tuple[int, str]] = []
    continues = False
    for row, line in rows:
        timed = _TIMING.sub(r"\1", line)
        is_command = continues or command.match(timed) is not None
        commands += is_command or timed != line
        indent = timed[: len(timed) - len(timed.lstrip())]
        if not is_command:
            kept.append((row, timed))
        elif indent and not continues and language == _DEFAULT:
            kept.append((row, f"{indent}pass"))  # it may be the only statement of a block
        continues = is_command and timed.endswith("\\")
    return kept, language, commands


def _language_of_cell(magic: re.Match[str], language: str, *, is_alone: bool) -> str | None:
    """Return the language of a cell that begins with a command about all of it; None if the command is about its line only.

    A single `%` or `#!` is such a command if it names a language and stands alone in its line (Databricks, .NET Interactive).
    """
    mark, name, arguments = magic[1], magic[2].lower(), magic[3].strip()
    if mark == "#!" and language not in ("csharp", "fsharp"):
        return None
    if name == "script" and arguments:
        name = arguments.split()[0].rpartition("/")[2].lower()
    if name in ("writefile", "file") and arguments:
        written = language_of_file(arguments.split()[-1])
        return written.name if written else _UNKNOWN
    found = _CELL_MAGICS.get(name, _UNKNOWN)
    if mark != "%%" and (arguments or is_alone or not (found.strip(_UNKNOWN) or name in _PROSE_CELLS)):
        return None
    return found or language
