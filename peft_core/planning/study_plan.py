"""Propose what an assistant should write study items about; a child process reads the code (`study_targets.py`)."""

from __future__ import annotations

from pathlib import Path

from peft_core.config import Settings
from peft_core.data.sources import unique_names
from peft_core.errors import InvalidArgument
from peft_core.planning.planner import require_places
from peft_core.schemas.dataset import DatasetPurpose, DataSource, SourceKind, TrainingData
from peft_core.schemas.results import NextStep
from peft_core.schemas.study import StudyPlan, StudyPlanRequest
from peft_core.schemas.training import DataSelection
from peft_core.system.child_process import run_json_child
from peft_core.system.user_paths import user_path

TIMEOUT_S = 100.0
ITEMS = "study_items.jsonl"
RECORD_FORMAT = (
    'A .jsonl file with one object per line: {"study": one of these names, "question": ..., "answer": ...}. The answer is '
    'Markdown with its code in fences, or with "language": "python" (or another) code as a whole. It must parse, and every '
    "name in its code and in `backticks` must exist in the repository, in what it imports, in the language, or in the answer; "
    "otherwise the item is dropped and counted. Write two to five items about each: how to call it, what it returns and "
    "raises, with what else it is used. All items about one name are either trained on or held out."
)


def propose_study_plan(
    project_id: str, training_data: TrainingData, selection: DataSelection, settings: Settings, adapter: Path | None
) -> StudyPlan:
    """Return what of a project's API is most worth questions and answers, and how to write them.

    `adapter`: the project's current one, whose snapshot says what is new.

    Raises:
        InvalidArgument: the data is no repository, or must not be read.
        DataError: 'no_api', 'inspection_timeout', 'inspection_failed', or the code cannot be walked.
    """
    field = DatasetPurpose.TRAINING.field
    require_places(field, training_data, selection.more_sources, settings)
    paths = [user_path(str(training_data)).absolute()] if isinstance(training_data, str) else []
    paths += [user_path(other).absolute() for other in selection.more_sources]
    directories = [path for path in paths if path.is_dir() and path.suffix != ".lance"]
    if not directories:
        raise InvalidArgument(
            field,
            training_data if isinstance(training_data, str) else "records",
            "a study plan is made of the code of a repository; it must be a directory that exists",
            suggestions=["Give the absolute path of the repository as training_data"],
        )
    names = unique_names(paths)
    repositories = tuple(
        DataSource(path=path, kind=SourceKind.REPOSITORY, name=name)
        for path, name in zip(paths, names, strict=True)
        if path in directories
    )
    plan = run_json_child(
        "peft_core.planning.study_targets",
        StudyPlanRequest(
            project_id=project_id,
            repositories=repositories,
            include=tuple(selection.include),
            exclude=tuple(selection.exclude),
            adapter=adapter,
            data_dir=settings.data_dir,
            allowed_roots=settings.allowed_roots,
        ),
        StudyPlan,
        timeout_s=TIMEOUT_S,
        action="Reading the code for a study plan",
        on_timeout=("Give a part of the code as training_data",),
    )
    config = selection.model_dump(exclude_unset=True)
    config["more_sources"] = [*selection.more_sources, f"/path/of/{ITEMS}"]
    step = NextStep(
        tool="inspect_training_data",
        arguments={"training_data": str(paths[0]), "config": config},
        reason="Write the items into a file and have them checked; train_adapter takes the same arguments.",
    )
    return plan.model_copy(update={"record_format": RECORD_FORMAT, "next": step.sentence, "next_step": step})
