"""What a project is trained on and when it is retrained, and what came of bringing it up to date."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, ValidationError, ValidatorFunctionWrapHandler, WrapValidator, model_validator

from peft_core.schemas.frozen import FrozenModel
from peft_core.schemas.results import NextStep, TrainingStatus
from peft_core.schemas.training import ProjectId, TrainingConfig

COMMIT = r"^[0-9a-f]{40,64}$"


class RetrainThreshold(FrozenModel):
    """How much must change. Exactly one field is set."""

    units: Annotated[int | None, Field(ge=1, le=100, description="Percent of the code units.")] = None
    commits: Annotated[int | None, Field(ge=1, le=100_000, description="Commits.")] = None

    @model_validator(mode="after")
    def _one_of_both(self) -> RetrainThreshold:
        if (self.units is None) == (self.commits is None):
            raise ValueError(ALLOWED_RULES)
        return self

    @property
    def in_words(self) -> str:
        if self.units is not None:
            return f"{self.units} % of the units have changed"
        return "a commit has been made" if self.commits == 1 else f"{self.commits} commits have been made"


ALLOWED_RULES = (
    'must be "never", {"units": N} (percent of the code units that have changed, from 1 to 100) or {"commits": N} (commits '
    "since, from 1 to 100000)"
)


def _one_error(value: object, validate: ValidatorFunctionWrapHandler) -> object:
    """Say once what is allowed, and not for each of the alternatives why it is none."""
    try:
        return validate(value)
    except ValidationError as error:
        raise ValueError(ALLOWED_RULES) from error


RetrainWhen = Annotated[Literal["never"] | RetrainThreshold, WrapValidator(_one_error)]


class Registration(FrozenModel):
    """The content of a project's `project.json`."""

    schema_version: Literal[1] = 1
    project_id: ProjectId
    source: Annotated[str | None, Field(max_length=4096)] = None  # an absolute path; None: records that a call gave
    first_commits: Annotated[tuple[Annotated[str, Field(pattern=COMMIT)], ...], Field(max_length=64)] = ()
    """Of the repository at `source`: the commits without a parent. Empty: it is none, or its history is too long to say."""
    config: TrainingConfig = (
        TrainingConfig()
    )  # as it was given, with the base model and other sources as they were found
    retrain_when: RetrainWhen = "never"
    registered_at: Annotated[str, Field(max_length=64)] = ""  # ISO 8601


Outcome = Literal["queued", "already_training", "nothing_changed", "not_due", "registered", "not_possible"]


class Refreshed(FrozenModel):
    """What came of bringing a project's adapter up to date."""

    project_id: str
    outcome: Outcome
    reason: str = Field("", description="What has changed, or why nothing was started.")
    retrain_when: RetrainWhen = "never"
    source: str | None = None
    job: TrainingStatus | None = Field(None, description="The training that brings it up to date.")
    next: str = ""
    next_step: NextStep | None = None
