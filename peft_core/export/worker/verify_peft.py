"""Load a written directory again with PEFT, and compare its log-probabilities with those of the adapter that was exported."""

from __future__ import annotations

from importlib.metadata import version

from peft_core.adapters.files import read_adapter
from peft_core.adapters.verify import verify_files
from peft_core.errors import ExportError
from peft_core.export.worker.compare import Reference, compare_references, reference
from peft_core.export.worker.job import FLOAT32, Job
from peft_core.modeling.adapter_model import ResidentModel, release_memory
from peft_core.schemas.export import Verification

SAME_NUMBERS = 0.001  # nats: only the order of additions may differ
ROUNDED_WEIGHTS = {"F32": 0.001, "F16": 0.05, "BF16": 0.1}  # by the type that merged weights were rounded to


def verify_directory(job: Job) -> Verification:
    """Compare an adapter directory.

    Raises:
        ExportError: It is not a valid adapter, or computes something else.
    """
    if (missing := job.memory_missing) is not None:
        return Verification(
            status="not_verified", reason=f"{missing}. Free the memory, then export again with overwrite=true."
        )
    written = read_adapter(job.directory, weights="keep")
    check = verify_files(written, job.base)
    errors = [reason.message for reason in check.reasons if reason.severity == "error"]
    if errors:
        raise ExportError(
            f"The written directory is not a valid adapter: {' '.join(errors[:3])}", code="export_not_loadable"
        )
    model, _, text, ours = job.load_model()
    job.say("comparing the written directory with the adapter")
    name, _ = model.add(written)
    theirs = reference(model, name, text)
    return compare_references(text, ours, theirs, f"PEFT {version('peft')}", SAME_NUMBERS)


def verify_merged_directory(job: Job, weights: str) -> Verification:
    """Compare a merged model directory. `weights`: the type of its matrices, "F32", "F16" or "BF16".

    Raises:
        ExportError: It cannot be loaded or computes something else.
    """
    if (missing := job.memory_missing) is not None:
        return Verification(
            status="not_verified", reason=f"{missing}. Free the memory, then export again with overwrite=true."
        )
    text, ours = job.results_of_peft()
    job.say("comparing the merged model with the adapter")
    merged = ResidentModel.load(job.base, job.directory, FLOAT32)
    theirs = reference(merged, None, text)
    del merged
    release_memory()
    return compare_references(
        text,
        ours,
        Reference(theirs.with_adapter, ours.without_adapter),
        f"transformers {version('transformers')}",
        ROUNDED_WEIGHTS[weights],
    )
