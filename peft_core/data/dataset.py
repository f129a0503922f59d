"""A dataset as it lies in a job's directory: the examples of both parts, what is trained on as hashes, and a manifest.

The manifest is written last; a dataset without one is not finished.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from peft_core.data.augment import ExampleFormat
from peft_core.data.examples import learned_text
from peft_core.data.leakage import FINGERPRINT_FILE_NAME, TrainingFingerprint
from peft_core.data.split import Split
from peft_core.errors import DataError
from peft_core.schemas.dataset import DatasetSummary, Example
from peft_core.schemas.frozen import FrozenModel
from peft_core.system.files import atomic_write

_MANIFEST_SCHEMA = 1
_FILES = ("train.jsonl", "held_out.jsonl", FINGERPRINT_FILE_NAME)


class PreparedDataset(FrozenModel):
    summary: DatasetSummary
    languages: dict[str, int]  # files by language
    repository_commit: str | None = None
    repository_dirty: bool | None = None


@dataclass(slots=True)
class WriteStats:
    """What went into the files."""

    sha256: str = ""  # of all lines, those to train on first
    tokens: Counter[str] = field(default_factory=Counter)  # by part
    told: Counter[ExampleFormat] = field(default_factory=Counter)  # to train on


def write_examples(
    spool: Path,
    directory: Path,
    parts: Split,
    retold: Callable[[Example], tuple[Example, ExampleFormat]],
) -> WriteStats:
    """The spooled examples into their files, those to train on as the mixture tells them."""
    place = dict.fromkeys(parts.train, "train") | dict.fromkeys(parts.held_out, "held_out")
    hashes = {name: hashlib.sha256() for name in ("train", "held_out")}
    unfinished = {name: directory / f"{name}.partial" for name in hashes}
    written = WriteStats()
    with (
        spool.open("rb") as lines,
        unfinished["train"].open("wb") as train,
        unfinished["held_out"].open("wb") as held_out,
    ):
        streams = {"train": train, "held_out": held_out}

        def to_train_on() -> Iterator[str]:
            for position, line in enumerate(lines):
                if (name := place.get(position)) is None:
                    continue
                example, told = Example.model_validate_json(line), ExampleFormat.PLAIN
                if name == "train":
                    yield learned_text(example)  # as it was, for a gap tears its lines apart
                    example, told = retold(example)
                    written.told[told] += 1
                row = line if told is ExampleFormat.PLAIN else example.model_dump_json().encode() + b"\n"
                written.tokens[name] += example.tokens
                streams[name].write(row)
                hashes[name].update(row)

        trained_on = TrainingFingerprint.of(to_train_on())
    (directory / FINGERPRINT_FILE_NAME).write_bytes(trained_on.to_bytes())
    for name, path in unfinished.items():
        path.replace(directory / f"{name}.jsonl")
    written.sha256 = hashlib.sha256(hashes["train"].digest() + hashes["held_out"].digest()).hexdigest()
    return written


def write_manifest(
    directory: Path,
    request: Mapping[str, Any],
    prepared: PreparedDataset,
    further: Mapping[str, Any],
) -> None:
    """`further`: what else people may want to know of it."""
    manifest = {
        "schema": _MANIFEST_SCHEMA,
        "request": request,
        "dataset": prepared.model_dump(mode="json"),
        **further,
    }
    atomic_write(directory / "manifest.json", json.dumps(manifest, indent=1, ensure_ascii=False))


def load_finished(directory: Path, request: Mapping[str, Any]) -> PreparedDataset | None:
    """What was prepared there for this very request, where it is all there."""
    try:
        manifest = json.loads((directory / "manifest.json").read_bytes())
        if manifest["schema"] != _MANIFEST_SCHEMA or manifest["request"] != request:
            return None
        if not all((directory / name).is_file() for name in _FILES):
            return None
        return PreparedDataset.model_validate(manifest["dataset"])
    except (OSError, ValueError, KeyError, TypeError, ValidationError):
        return None


# FOLDED FROM peft_core.data.dataset: Examples as they lie on disk: one `Example` in JSON a line.


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
