"""What a run needs on the cluster, prepared on this machine: the dataset, and the task without this machine's paths."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

from peft_core.base_models.tokenizer import BaseTokenizer, load_tokenizer, require_rows
from peft_core.cluster.transfer import files_below
from peft_core.data.catch_up import ParentData
from peft_core.data.leakage import read_fingerprint
from peft_core.data.prepare import prepare
from peft_core.data.snapshot import read_snapshot
from peft_core.errors import TrainingError
from peft_core.paths import JobPaths
from peft_core.schemas.machine import TokenizerAnswer, TokenizerRequest
from peft_core.schemas.task import TrainingTask
from peft_core.system.allowed_paths import require_data_path
from peft_core.system.child_process import run_json_child
from peft_core.system.files import atomic_write

_MANIFEST = "manifest.json"
_TOKENIZER_S = 600.0  # most of it for importing transformers on a busy machine


def prepare_dataset(task: TrainingTask, report: Callable[[str], None]) -> None:
    """Write JOB/dataset as the worker would; it is reused if it exists.

    Raises:
        DataError: The data cannot be used.
        TrainingError: `parent_unusable`: the adapter to continue from was deleted.
    """
    request = task.request
    tokenizer = _tokenizer(task)
    require_rows(tokenizer, request.base)
    prepare(
        request.dataset,
        directory=JobPaths(task.job_dir).dataset,
        token_counter=tokenizer,
        report=report,
        parent=_parent(task),
        may_read=partial(
            require_data_path,
            data_dir=task.data_dir or task.job_dir,
            allowed_roots=task.allowed_roots,
            field=request.purpose.field,
        ),
    )


def _tokenizer(task: TrainingTask) -> BaseTokenizer:
    """Return the tokenizer that the worker will use. Another process reads that of a GGUF file, for it needs transformers.

    Raises:
        BaseCheckpointError, DataError: It cannot be read.
    """
    base = task.request.base
    if base.format == "huggingface":
        return load_tokenizer(base.path)
    with tempfile.TemporaryDirectory(prefix=".tokenizer-", dir=task.job_dir) as directory:
        run_json_child(
            "peft_core.modeling.write_tokenizer",
            TokenizerRequest(gguf=base.path, directory=Path(directory)),
            TokenizerAnswer,
            timeout_s=_TOKENIZER_S,
            action=f"Reading the tokenizer of {base.name}",
            on_timeout=["Close other programs, and resume the training"],
        )
        return load_tokenizer(Path(directory))


def task_files(task: TrainingTask, wanted: str, directory: Path) -> list[tuple[str, Path]]:
    """Return what is sent to the cluster, by name: the task, the dataset, the adapter to continue from and its examples.

    No file has a path of this machine except the base model's, which the nodes may have at the same place. `directory`: for
    the files that differ from those here. `wanted`: the identity of the base model.
    """
    sent = without_paths(task)
    manifest = json.loads((JobPaths(task.job_dir).dataset / _MANIFEST).read_bytes())
    # The worker reuses a dataset only if it was prepared for its own spec.
    manifest["request"] |= sent.request.dataset.model_dump(mode="json")
    changed = {
        "task.json": sent.model_dump_json(),
        "base.sha256": wanted,
        "manifest.json": json.dumps(manifest, ensure_ascii=False),
    }
    for name, content in changed.items():
        atomic_write(directory / name, content)
    continued = task.request.continued
    return [
        ("task.json", directory / "task.json"),
        ("base.sha256", directory / "base.sha256"),
        ("dataset/manifest.json", directory / _MANIFEST),
        *((n, p) for n, p in files_below(JobPaths(task.job_dir).dataset, "dataset/") if p.name != _MANIFEST),
        *(files_below(continued.adapter_path, "parent/") if continued is not None else ()),
        *((name.as_posix(), file) for name, file in zip(sent.earlier_examples, task.earlier_examples, strict=True)),
    ]


def without_paths(task: TrainingTask) -> TrainingTask:
    """Return the task with names in place of this machine's paths."""
    request = task.request
    changes = {
        "source": _name_only(request.source),
        "more_sources": tuple(
            source.model_copy(update={"path": _name_only(source.path)}) for source in request.more_sources
        ),
        "found": request.found.model_copy(update={"path": _name_only(request.found.path)}),
        "config": request.config.model_copy(update={"base_model": None, "more_sources": [], "continue_from": None}),
        "continued": request.continued
        and request.continued.model_copy(update={"adapter_path": _name_only(request.continued.adapter_path)}),
    }
    places = {
        "job_dir": Path("/job"),
        "base_models_dir": Path("/base_models"),
        "earlier_examples": tuple(Path(f"earlier/{number}.jsonl") for number in range(len(task.earlier_examples))),
        "data_dir": None,
        "allowed_roots": None,
    }
    return task.model_copy(update={"request": request.model_copy(update=changes), **places})


def _name_only(path: Path | None) -> Path | None:
    return path and Path("/") / path.name


def _parent(task: TrainingTask) -> ParentData | None:
    """Return what the adapter that the training continues from records about its data; the worker verifies its weights."""
    continued = task.request.continued
    if continued is None:
        return None
    snapshot, fingerprint = read_snapshot(continued.adapter_path), read_fingerprint(continued.adapter_path)
    if snapshot is None or fingerprint is None:
        raise TrainingError(
            f"Adapter {continued.adapter_id}, which this training was to continue from, was deleted or has lost the record of "
            "what it was trained on.",
            code="parent_unusable",
            suggestions=["Call train_adapter again: it continues from the project's current adapter, if there is one"],
        )
    return ParentData(snapshot, fingerprint)
