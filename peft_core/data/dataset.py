"""Write and read a prepared dataset.

Files in the dataset directory of a job: train.jsonl and held_out.jsonl (one `Example` in JSON per line), trained_on.bin (the
fingerprint of the training set, see `leakage.py`), held_out_files.jsonl and names.json (see `held_out_files.py`), for a
training snapshot.json.gz (see `snapshot.py`), and manifest.json. The manifest is written last: a dataset without one is
incomplete.
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
from peft_core.schemas.dataset import DatasetSummary, Example, RepositoryState
from peft_core.schemas.frozen import FrozenModel
from peft_core.system.files import atomic_write

_MANIFEST_SCHEMA = 1
_FILES = ("train.jsonl", "held_out.jsonl", FINGERPRINT_FILE_NAME)


class PreparedDataset(FrozenModel):
    summary: DatasetSummary
    languages: dict[str, int]  # files by language
    repository_commit: str | None = None
    repository_dirty: bool | None = None
    repositories: tuple[RepositoryState, ...] = ()  # if there are several sources


@dataclass(slots=True)
class WriteStats:
    """What was written."""

    sha256: str = ""  # of the digests of train.jsonl and held_out.jsonl
    tokens: Counter[str] = field(default_factory=Counter)  # by part: "train", "held_out"
    formats: Counter[ExampleFormat] = field(default_factory=Counter)  # of the training examples


def write_examples(
    spool: Path,
    directory: Path,
    parts: Split,
    reformat: Callable[[Example], tuple[Example, ExampleFormat]],
    *,
    before: TrainingFingerprint | None = None,
) -> WriteStats:
    """Write the spooled examples into the files of their part; those to train on are reformatted first.

    `before`: what the adapter that the training continues from was trained on. The fingerprint covers it, too.
    """
    part_of = dict.fromkeys(parts.train, "train") | dict.fromkeys(parts.held_out, "held_out")
    hashes = {part: hashlib.sha256() for part in ("train", "held_out")}
    partial_files = {part: directory / f"{part}.partial" for part in hashes}
    stats = WriteStats()
    with (
        spool.open("rb") as lines,
        partial_files["train"].open("wb") as train,
        partial_files["held_out"].open("wb") as held_out,
    ):
        streams = {"train": train, "held_out": held_out}

        def write_and_yield_training_texts() -> Iterator[str]:
            for position, line in enumerate(lines):
                if (part := part_of.get(position)) is None:
                    continue
                example, example_format = Example.model_validate_json(line), ExampleFormat.PLAIN
                if part == "train":
                    yield learned_text(example)  # before it is reformatted, because a gap breaks its lines
                    example, example_format = reformat(example)
                    stats.formats[example_format] += 1
                row = line if example_format is ExampleFormat.PLAIN else example.model_dump_json().encode() + b"\n"
                stats.tokens[part] += example.tokens
                streams[part].write(row)
                hashes[part].update(row)

        fingerprint = TrainingFingerprint.of(write_and_yield_training_texts())
    fingerprint = fingerprint if before is None else fingerprint | before
    (directory / FINGERPRINT_FILE_NAME).write_bytes(fingerprint.to_bytes())
    for part, path in partial_files.items():
        path.replace(directory / f"{part}.jsonl")
    stats.sha256 = hashlib.sha256(hashes["train"].digest() + hashes["held_out"].digest()).hexdigest()
    return stats


def write_manifest(
    directory: Path, request: Mapping[str, Any], prepared: PreparedDataset, details: Mapping[str, Any]
) -> None:
    """Write the manifest last and atomically. `details` are further facts for people who read it."""
    manifest = {"schema": _MANIFEST_SCHEMA, "request": request, "dataset": prepared.model_dump(mode="json"), **details}
    atomic_write(directory / "manifest.json", json.dumps(manifest, indent=1, ensure_ascii=False))


def load_finished(directory: Path, request: Mapping[str, Any]) -> PreparedDataset | None:
    """Return the complete dataset that was prepared for an equal request, or None if there is none."""
    try:
        manifest = json.loads((directory / "manifest.json").read_bytes())
        if manifest["schema"] != _MANIFEST_SCHEMA or manifest["request"] != request:
            return None
        if not all((directory / name).is_file() for name in _FILES):
            return None
        return PreparedDataset.model_validate(manifest["dataset"])
    except (OSError, ValueError, KeyError, TypeError, ValidationError):
        return None


def read_examples(path: Path) -> list[Example]:
    """Read examples that `prepare` wrote.

    Raises:
        DataError: 'broken_dataset', if the file is damaged.
    """
    examples = []
    with path.open("rb") as stream:
        for number, line in enumerate(stream, 1):
            try:
                examples.append(Example.model_validate_json(line))
            except ValidationError as error:
                raise DataError(
                    f"Line {number} of {path} is not a valid example.",
                    code="broken_dataset",
                    suggestions=("Delete the job's dataset directory and start the job again.",),
                ) from error
    return examples
