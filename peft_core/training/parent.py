"""The adapter that a training continues from: read, checked, and kept from being deleted while the run needs it."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from peft_core.adapters.files import AdapterFiles, read_adapter
from peft_core.adapters.verify import verify_files
from peft_core.data.catch_up import ParentData
from peft_core.data.leakage import read_fingerprint
from peft_core.data.snapshot import read_snapshot
from peft_core.errors import TrainingError
from peft_core.evaluation.catch_up import compare_with_parent
from peft_core.evaluation.summary import Scores
from peft_core.evaluation.worker.scoring import HeldOutExample
from peft_core.evaluation.worker.setup import require_adapter
from peft_core.modeling.adapter_model import tensors_of
from peft_core.schemas.evaluation import CatchUp
from peft_core.schemas.task import TrainingTask

# The new adapter is the mean of the parent's weights and of those that the training ends with, as in "Robust fine-tuning of
# zero-shot models" (Wortsman et al., arXiv 2109.01903): it predicts both new and old code better than either of them.
# benchmarks/README.md has the measurement.
SHARE_OF_PARENT = 0.5


class Parent:
    """An adapter that was checked, with the bytes that were checked until `take_tensors`."""

    def __init__(self, adapter_id: str, files: AdapterFiles, data: ParentData) -> None:
        self.data = data
        self._adapter_id = adapter_id
        self._files: AdapterFiles | None = files

    def take_tensors(self) -> dict[str, torch.Tensor]:
        """Return the weights under PEFT's names. They are not kept, so this can be called once."""
        files, self._files = self._files, None
        assert files is not None, "the weights were taken already"  # noqa: S101 -- a caller's mistake
        return tensors_of(files)

    def compare(self, held_out: Sequence[HeldOutExample], before: Scores, after: Scores) -> CatchUp:
        """Compare the scores of this adapter and of the new one on the held-out examples."""
        is_old = [self.data.held_out_before(example.example) for example in held_out]
        return compare_with_parent(self._adapter_id, before.held_out, after.held_out, is_old)


def read_parent(task: TrainingTask) -> Parent | None:
    """Return the adapter that the task continues from, or None if it starts from scratch.

    Raises:
        TrainingError: it was deleted or has changed since the job was queued, or cannot be used.
        InvalidArgument: it lies where nothing may be read.
    """
    continued = task.request.continued
    if continued is None:
        return None
    directory = continued.adapter_path
    require_adapter(task, directory)
    if not directory.is_dir():
        raise _unusable(continued.adapter_id, "was deleted after the job was queued")
    files = read_adapter(directory, weights="keep")
    check = verify_files(files, task.request.base)
    if not check.compatible:
        reasons = "; ".join(reason.message for reason in check.reasons[:3]) or check.verdict
        raise _unusable(continued.adapter_id, f"cannot be used: {reasons}")
    if files.sha256 != continued.weights_sha256:
        raise _unusable(continued.adapter_id, "has other weights than when the job was queued")
    snapshot, fingerprint = read_snapshot(directory), read_fingerprint(directory)
    if snapshot is None or fingerprint is None:
        raise _unusable(continued.adapter_id, "has lost the record of what it was trained on")
    return Parent(continued.adapter_id, files, ParentData(snapshot, fingerprint))


def _unusable(adapter_id: str, problem: str) -> TrainingError:
    return TrainingError(
        f"Adapter {adapter_id}, which this training was to continue from, {problem}.",
        code="parent_unusable",
        suggestions=[
            "Call train_adapter again: it continues from the project's current adapter, if there is one",
            "Or set config.continue_from = 'none' to train from scratch",
        ],
        details={"adapter_id": adapter_id},
    )
