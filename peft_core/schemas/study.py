"""What `propose_study_plan` answers: the parts of an API that are worth questions and answers."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field

from peft_core.schemas.dataset import DataSource
from peft_core.schemas.frozen import FrozenModel
from peft_core.schemas.results import NextStep


class StudyTarget(FrozenModel):
    """A function, method or class to write study items about."""

    study: str = Field(description="Its name, for the key 'study'.")
    kind: str
    path: str
    start_line: int
    end_line: int
    signature: str
    reasons: list[str] = Field(description="Why it matters, the strongest first.")
    calls: int = Field(description="In the repository, by name.")
    callers: list[str] = Field([], description="What calls it, with path and line.")
    usage: list[str] = Field([], description="Lines that call it.")
    documented: bool
    changed: bool = Field(False, description="Or new, since the latest training.")
    excerpt: str


class StudyPair(FrozenModel):
    """Two that the same code uses together."""

    first: str
    second: str
    together: int = Field(description="In how many functions.")
    where: str


class StudyPlan(FrozenModel):
    """The API of a project by what is most worth learning, and how to write items about it."""

    project_id: str
    source: str
    definitions: int = Field(description="Functions, methods and classes that were ranked.")
    unread_files: int = Field(0, description="Files that were not read in time, or that do not parse.")
    compared_with: str = Field("", description="The adapter whose snapshot says what is new; empty: none.")
    targets: list[StudyTarget]
    pairs: list[StudyPair] = []  # noqa: RUF012 -- pydantic copies defaults
    record_format: str = ""
    example: dict[str, str] = Field({}, description="One record as it is written, which passes the check.")
    next: str = ""
    next_step: NextStep | None = None


class StudyPlanRequest(FrozenModel):
    """What the child process reads that makes a plan."""

    project_id: str
    repositories: tuple[DataSource, ...]
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    adapter: Path | None = None  # whose snapshot says what is new
    data_dir: Path  # never read as code
    allowed_roots: tuple[Path, ...] | None = None
