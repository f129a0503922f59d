"""Examples as they lie on disk: one `Example` in JSON a line."""

from __future__ import annotations

from pathlib import Path

from pydantic import ValidationError

from peft_core.errors import DataError
from peft_core.example import Example


def read_examples(path: Path) -> list[Example]:
    """Examples that `prepare` wrote.

    Raises:
        DataError: 'broken_dataset', the file is not what `prepare` writes.
    """
    examples = []
    with path.open("rb") as stream:
        for number, line in enumerate(stream, 1):
            try:
                examples.append(Example.model_validate_json(line))
            except ValidationError as error:
                raise DataError(
                    f"Line {number} of {path} is no example.",
                    code="broken_dataset",
                    suggestions=("Delete the job's dataset directory and start the job again.",),
                ) from error
    return examples
