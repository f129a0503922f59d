"""Preview a dataset in a child process: a PreviewRequest (JSON) in, a Preview or an ErrorInfo out.

The dataset is prepared as the training worker does it, but the tokens of a repository are estimated, and of a large one a
sample is read; not so for a training that continues from an adapter, since what has changed may be anywhere. The child process
keeps grammars and the secret scanner out of the server. By hand:
`python -m peft_core.planning.preview < request.json`.
"""

from __future__ import annotations

import random
import sys
import tempfile
from collections import Counter
from functools import partial
from pathlib import Path

from peft_core.data.catch_up import ParentData
from peft_core.data.dataset import read_examples
from peft_core.data.exclusions import ExclusionReason
from peft_core.data.leakage import read_fingerprint
from peft_core.data.prepare import prepare
from peft_core.data.snapshot import read_snapshot
from peft_core.data.token_counter import EstimatedTokenCounter, TokenCounter
from peft_core.errors import DataError
from peft_core.schemas.base_model import Base
from peft_core.schemas.dataset import DatasetSpec, DatasetSummary, Example, SourceKind
from peft_core.schemas.frozen import FrozenModel
from peft_core.system.allowed_paths import require_data_path
from peft_core.system.child_process import answer_request
from peft_core.system.failures import TaskKind

TASK = TaskKind(
    name="inspection",
    crash_code="inspection_failed",
    log="the log of the server",
    memory_advice=("Close other programs, or give a part of the data.",),
)
SAMPLES = 3
LARGEST = 3


class PreviewRequest(FrozenModel):
    dataset: DatasetSpec
    base: Base
    parent: Path | None = None  # the adapter that the training continues from
    data_dir: Path  # never read as training data
    allowed_roots: tuple[Path, ...] | None = None


class Preview(FrozenModel):
    dataset: DatasetSummary
    languages: dict[str, int]
    unread_files: int  # only a longer run would read them
    held_out_files: list[str]
    largest_files: dict[str, int]  # the files with the most training tokens
    samples: list[Example]


def _token_counter(request: PreviewRequest) -> TokenCounter:
    """Return the base model's own for records. The tokens of a repository are estimated: cutting it takes many counts.

    Examples that are cut elsewhere than before would not be recognised as those that the parent held out, so then none are.
    """
    from peft_core.planning.token_counts import token_counter_of  # noqa: PLC0415 - the server imports this module, too

    if request.dataset.source_kind is not SourceKind.REPOSITORY or request.parent is not None:
        return token_counter_of(request.base)
    if request.dataset.mixture.instructions:
        return token_counter_of(request.base, exact=False)
    return EstimatedTokenCounter()


def _read_parent(adapter: Path) -> ParentData:
    """Return what an adapter that has just been checked records about its data.

    Raises:
        DataError: it has been deleted since.
    """
    snapshot, fingerprint = read_snapshot(adapter), read_fingerprint(adapter)
    if snapshot is None or fingerprint is None:
        raise DataError(
            f"{adapter}, which the training would continue from, has just been deleted.",
            code="parent_unusable",
            suggestions=["Call inspect_training_data again"],
        )
    return ParentData(snapshot, fingerprint)


def preview(request: PreviewRequest) -> Preview:
    """Prepare the dataset in a temporary directory and describe it.

    Raises:
        DataError: see `prepare`.
    """
    parent = None if request.parent is None else _read_parent(request.parent)
    with tempfile.TemporaryDirectory(prefix="peft-mcp-preview-") as temporary:
        directory = Path(temporary)
        prepared = prepare(
            # The smallest sample that `prepare` reads.
            request.dataset.model_copy(update={"enough_examples": 1}) if parent is None else request.dataset,
            directory=directory,
            parent=parent,
            token_counter=_token_counter(request),
            report=lambda _detail: None,
            may_read=partial(
                require_data_path,
                data_dir=request.data_dir,
                allowed_roots=request.allowed_roots,
                field=request.dataset.purpose.field,
            ),
        )
        train = read_examples(directory / "train.jsonl")
        held_out = read_examples(directory / "held_out.jsonl")
    tokens: Counter[str] = Counter()
    for example in train:
        tokens[example.path] += example.tokens
    dataset, left_out = prepared.summary, dict(prepared.summary.left_out)
    # Of files; in a training that continues, all are read, and this counts examples.
    unread_files = left_out.pop(ExclusionReason.NOT_NEEDED, 0) if parent is None else 0
    return Preview(
        dataset=dataset.model_copy(update={"left_out": left_out}),
        languages=prepared.languages,
        unread_files=unread_files,
        held_out_files=sorted({example.path for example in held_out}),
        largest_files=dict(tokens.most_common(LARGEST)),
        samples=random.Random(request.dataset.seed).sample(train, min(SAMPLES, len(train))),  # noqa: S311 - no cryptography here
    )


if __name__ == "__main__":
    sys.exit(answer_request(PreviewRequest, preview, TASK))
