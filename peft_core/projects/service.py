"""Register what projects are trained on, and bring their adapters up to date: when a user asks, or when it is due.

Every method blocks, for seconds on a large repository; the manager calls them in threads.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from peft_core.adapters.registry import Registry
from peft_core.config import Settings
from peft_core.data.git import first_commits, has_commit
from peft_core.data.selection import UNMATCHED_PATTERN
from peft_core.data.table import LANCE_SUFFIX
from peft_core.errors import DataError, InvalidArgument, PeftMcpError, StorageError, sanitize
from peft_core.jobs.service import JobService
from peft_core.jobs.state import Job
from peft_core.projects.registrations import Registrations
from peft_core.schemas.dataset import SourceKind, TrainingData
from peft_core.schemas.project import Outcome, Refreshed, Registration, RetrainThreshold, RetrainWhen
from peft_core.schemas.results import Status
from peft_core.schemas.staleness import Staleness
from peft_core.schemas.task import JobRequest
from peft_core.schemas.training import DataSelection, TrainingConfig
from peft_core.system.durations import rough_duration

AFTER_FAILURE = 24  # times the usual interval between two trainings
_NOT_REPEATED = {"continue_from", "sweep"}  # settings of a training that its successors do not take over

log = logging.getLogger(__name__)  # structlog would slow the server's start down by 0.1 s


@dataclass(frozen=True)
class PlannedRefresh:
    """A training that brings a project up to date, and that is not queued yet."""

    registration: Registration
    draft: JobRequest
    because: str
    only_while_free: bool
    latest: str | None  # id of the project's latest training when this was decided


class ProjectService:
    """`staleness_of(adapter)` returns how far the code of an adapter has moved on, or None if that cannot be said."""

    def __init__(
        self,
        settings: Settings,
        registry: Registry,
        jobs: JobService,
        staleness_of: Callable[[Path], Staleness | None],
    ) -> None:
        self._settings = settings
        self._staleness_of = staleness_of
        self._registry = registry
        self._jobs = jobs
        self._registrations = Registrations(settings.paths)

    # -- registration --------------------------------------------------------------------------------------------------

    def require_same_repository(self, project_id: str, draft: JobRequest) -> None:
        """Check that a training of a project with an adapter is not on another repository than before.

        Raises:
            InvalidArgument: 'another_repository'; the error has both paths.
        """
        if draft.source_kind is not SourceKind.REPOSITORY or not self._settings.paths.current(project_id).is_dir():
            return
        try:
            registration = self._registrations.read(project_id)
        except StorageError:  # the training registers the project anew
            return
        if registration is None or not registration.first_commits or registration.source == str(draft.source):
            return
        found = _first_commits(str(draft.source))
        if found and not set(found) & set(registration.first_commits):
            raise InvalidArgument(
                "training_data",
                str(draft.source),
                f"project {project_id!r} was trained on {registration.source}, which is another repository: the two have no "
                "commit in common",
                code="another_repository",
                suggestions=["Give another project_id", "Or delete the project's adapters first"],
            )

    def register(self, project_id: str, draft: JobRequest, training_data: TrainingData, config: TrainingConfig) -> None:
        """Record what a project's training uses, after it was queued. When to retrain stays as it is.

        A failure is logged only, because the training itself is not affected.
        """
        source = str(draft.source) if isinstance(training_data, str) else None
        more = [str(other.path) for other in draft.more_sources]
        found = {"base_model": draft.base.reference} | ({"more_sources": more} if more else {})
        given = config.model_dump(exclude_unset=True, exclude=_NOT_REPEATED)
        registration = Registration(
            project_id=project_id,
            source=source,
            first_commits=() if source is None else tuple(_first_commits(source)),
            config=TrainingConfig.model_validate(given | found),
            registered_at=_now(),
        )

        def change(before: Registration | None) -> Registration:
            rule: RetrainWhen = "never" if before is None else before.retrain_when
            return registration.model_copy(update={"retrain_when": rule})

        try:
            self._registrations.change(project_id, change)
        except PeftMcpError as error:
            log.warning("Project %s is not registered: %s", project_id, error.message)

    def registered(self, project_id: str) -> Registration:
        """Return a project's registration.

        Raises:
            JobNotFound: there is no such project.
            InvalidArgument: 'not_registered': it was never trained here.
            StorageError: the registration cannot be read.
        """
        registration = self._registrations.read(project_id)
        if registration is None:
            self._jobs.require_project(project_id)
            raise InvalidArgument(
                "project_id",
                project_id,
                "nothing is registered for it: it must be a project that was trained here with train_adapter",
                code="not_registered",
                suggestions=["Call train_adapter with the project's id and its training_data"],
            )
        return registration

    def data_of(self, project_id: str) -> tuple[str, DataSelection]:
        """Return the path that a project's latest training read, and what was selected of it.

        Raises:
            JobNotFound, InvalidArgument, StorageError: as for `registered`; or the path is gone, it is another repository now,
                or the project was trained on inline records.
        """
        registration = self.registered(project_id)
        selected = registration.config.model_dump(include=set(DataSelection.model_fields), exclude_unset=True)
        return self._require_source(registration), DataSelection(**selected)

    def registrations(self, project_ids: Sequence[str] | None) -> list[Registration]:
        """Return the registrations of these projects; None: all that can be read.

        Raises:
            JobNotFound, InvalidArgument, StorageError: as for `registered`.
        """
        if project_ids is None:
            return self._registrations.all()
        return [self.registered(project_id) for project_id in project_ids]

    # -- a user asks ---------------------------------------------------------------------------------------------------

    def plan_refresh(self, project_id: str, retrain_when: RetrainWhen | None) -> Refreshed | PlannedRefresh:
        """Decide what brings a project up to date; return what to pass to `start`, or why there is nothing to start.

        With `retrain_when` the rule is registered, and followed immediately: a training that is due starts by itself.

        Raises:
            PeftMcpError: the project is unknown or not registered, or its training cannot be planned.
        """
        registration = self.registered(project_id)
        if retrain_when == "never":
            registration = self._set_rule(registration, retrain_when)
            return self._nothing(registration, "registered", "It is not retrained by itself from now on")
        if retrain_when is not None:
            self._require_followable(registration, retrain_when)
            return self._plan_due(self._set_rule(registration, retrain_when))
        trainings = self._jobs.trainings(project_id)
        if (unfinished := _unfinished(trainings)) is not None:
            status = self._jobs.ask_for(unfinished.job_id)
            return Refreshed(
                project_id=project_id,
                outcome="already_training",
                reason="A training of the project is queued or running",
                retrain_when=registration.retrain_when,
                source=registration.source,
                job=status,
            )
        source = self._require_source(registration)
        changes = self._changes(registration)
        if changes is not None and not _differs(changes):
            return self._nothing(registration, "nothing_changed", _what(changes))
        because = "started to catch up" if changes is None else f"started to catch up: {_what(changes)}"
        return self._plan(registration, source, because, trainings, only_while_free=False)

    def start(self, planned: PlannedRefresh) -> Refreshed:
        """Queue a planned training, unless another process has queued one since it was planned.

        Raises:
            DataError, StorageError: nothing was queued.
        """
        registration = planned.registration
        status = self._jobs.queue_refresh(
            registration.project_id,
            planned.draft,
            str(registration.source),
            because=planned.because,
            only_while_free=planned.only_while_free,
            latest=planned.latest,
        )
        return Refreshed(
            project_id=registration.project_id,
            outcome="queued" if status.started_because == planned.because else "already_training",
            reason=planned.because,
            retrain_when=registration.retrain_when,
            source=registration.source,
            job=status,
        )

    # -- by itself -----------------------------------------------------------------------------------------------------

    def refresh_due(self, project_ids: Sequence[str] | None = None) -> list[Refreshed]:
        """Queue a training for each project that is due by its rule; it runs only while the machine is free.

        Args:
            project_ids: The projects to look at; None: all that are registered.

        Raises:
            JobNotFound, InvalidArgument, StorageError: a project that was named is unknown, or not registered.
        """
        found = self.registrations(project_ids)
        if project_ids is None:
            found = [registration for registration in found if registration.retrain_when != "never"]
        return [self._refresh_if_due(registration) for registration in found]

    def _refresh_if_due(self, registration: Registration) -> Refreshed:
        try:
            planned = self._plan_due(registration)
            return planned if isinstance(planned, Refreshed) else self.start(planned)
        except PeftMcpError as error:  # the other projects are looked at all the same
            return self._nothing(registration, "not_possible", str(error))

    def _plan_due(self, registration: Registration) -> Refreshed | PlannedRefresh:
        """Return the training that a project's rule demands now, or why it demands none.

        Raises:
            PeftMcpError: it is due, but cannot be planned.
        """
        rule, project_id = registration.retrain_when, registration.project_id
        if not isinstance(rule, RetrainThreshold):
            return self._nothing(registration, "not_due", "It is not retrained by itself")
        trainings = self._jobs.trainings(project_id)
        if _unfinished(trainings) is not None:
            self._jobs.ensure_runner()
            return self._nothing(registration, "already_training", "A training of the project is queued or running")
        if trainings:
            latest, wait_s = trainings[0], self._interval_after(trainings[0])
            if time.time() < latest.updated_at + wait_s:
                reason = f"Its latest training ended less than {rough_duration(wait_s)} ago"
                return self._nothing(registration, "not_due", reason)
            if latest.status is Status.INTERRUPTED and latest.only_while_free:
                reason = "The training that was interrupted continues from its last checkpoint"
                job = self._jobs.resume(latest.job_id, by_itself=True)
                return self._nothing(registration, "queued", reason).model_copy(update={"job": job})
        return self._plan_if_changed(registration, rule, trainings)

    def _interval_after(self, latest: Job) -> float:
        """Return how many seconds must pass after a project's latest training before one starts by itself."""
        failed = latest.only_while_free and latest.status in (Status.FAILED, Status.CANCELLED)
        return self._settings.refresh_interval_s * (AFTER_FAILURE if failed else 1)

    def _plan_if_changed(
        self, registration: Registration, rule: RetrainThreshold, trainings: Sequence[Job]
    ) -> Refreshed | PlannedRefresh:
        source = self._require_source(registration)
        changes = self._changes(registration)
        if changes is None:
            reason = "What has changed since the latest adapter is not known"
            return self._nothing(registration, "not_due", reason)
        if not _demands(rule, changes):
            return self._nothing(registration, "not_due", _what(changes))
        because = f"started by itself: {_what(changes)}"
        return self._plan(registration, source, because, trainings, only_while_free=True)

    # -- both ----------------------------------------------------------------------------------------------------------

    def _plan(
        self, registration: Registration, source: str, because: str, trainings: Sequence[Job], *, only_while_free: bool
    ) -> Refreshed | PlannedRefresh:
        try:
            draft, gone = self._plan_with_what_is_there(registration.project_id, source, registration.config)
        except DataError as error:
            if error.code != "nothing_to_catch_up":
                raise
            return self._nothing(registration, "nothing_changed", error.message)
        return PlannedRefresh(
            registration=registration,
            draft=draft,
            because="; ".join([because, *gone]),
            only_while_free=only_while_free,
            latest=trainings[0].job_id if trainings else None,
        )

    def _plan_with_what_is_there(
        self, project_id: str, source: str, config: TrainingConfig
    ) -> tuple[JobRequest, list[str]]:
        """Plan a training without the patterns whose files were deleted since they were given; name these in sentences.

        Raises:
            PeftMcpError: it cannot be planned.
        """
        gone: list[str] = []
        while True:
            try:
                return self._jobs.plan(project_id, source, config), gone
            except InvalidArgument as error:
                shorter = _without_unmatched(config, error)
                if shorter is None:
                    raise
                config = shorter
                gone.append(f"{error.details['field']} = {error.details['value']} matches no file any more")

    def _changes(self, registration: Registration) -> Staleness | None:
        """Return what has changed since the project's newest adapter was trained; None if there is none, or it is not known.

        The newest one counts even if it did not become current: what has been tried need not be tried again.
        """
        adapters = self._registry.adapters(registration.project_id)
        staleness = self._staleness_of(Path(adapters[0].adapter_path)) if adapters else None
        return None if staleness is None or staleness.files is None else staleness

    def _set_rule(self, registration: Registration, rule: RetrainWhen) -> Registration:
        return self._registrations.change(
            registration.project_id,
            lambda before: (before or registration).model_copy(update={"retrain_when": rule}),
        )

    def _require_followable(self, registration: Registration, rule: RetrainThreshold) -> None:
        """Check that a rule can ever demand a training of a project.

        Raises:
            InvalidArgument: it compares what is not compared for this project, or the project's source cannot be read again.
        """
        project_id = registration.project_id
        paths = [Path(source) for source in (self._require_source(registration), *registration.config.more_sources)]
        repositories = [path for path in paths if path.is_dir() and path.suffix.lower() != LANCE_SUFFIX]
        if not repositories:
            needed = (
                f"it needs a repository, but project {project_id!r} was trained on records, whose changes are not known"
            )
            advice = "Call refresh_project without retrain_when once the records have changed"
        elif rule.commits is not None and not any(map(has_commit, repositories)):
            needed = f"it needs the commits of a git repository, and {', '.join(map(str, repositories))} has none"
            advice = 'Give {"units": N}, which compares the files'
        else:
            return
        raise InvalidArgument(
            "retrain_when", rule.model_dump(exclude_none=True), needed, suggestions=[advice], code="rule_without_effect"
        )

    def _require_source(self, registration: Registration) -> str:
        """Return the path of a project's source.

        Raises:
            InvalidArgument: it is gone, it is another repository now, or the project was trained on inline records.
        """
        project_id, source = registration.project_id, registration.source
        if source is None:
            raise InvalidArgument(
                "project_id",
                project_id,
                "it was trained on records that the call gave, which cannot be read again",
                code="source_gone",
                suggestions=["Call train_adapter with the records of today"],
            )
        if not Path(source).exists():
            raise InvalidArgument(
                "source",
                source,
                f"project {project_id!r} was trained on it, and it does not exist any more",
                code="source_gone",
                suggestions=["Call train_adapter with the project's id and the path where it is now"],
            )
        first_commits = _first_commits(source) if registration.first_commits else []
        if first_commits and not set(first_commits) & set(registration.first_commits):
            raise InvalidArgument(
                "source",
                source,
                f"project {project_id!r} was trained on another repository at this path: its first commit was "
                f"{registration.first_commits[0][:12]}, and is {first_commits[0][:12]} now",
                code="another_repository",
                suggestions=[
                    "Train the new repository under another project_id",
                    "Or, if its history was rewritten, call train_adapter with the project's id and this path",
                ],
            )
        return source

    def _nothing(self, registration: Registration, outcome: Outcome, reason: str) -> Refreshed:
        return Refreshed(
            project_id=registration.project_id,
            outcome=outcome,
            reason=reason,
            retrain_when=registration.retrain_when,
            source=registration.source,
        )


def _unfinished(trainings: Sequence[Job]) -> Job | None:
    return next((job for job in trainings if not job.status.is_final), None)


def _without_unmatched(config: TrainingConfig, error: InvalidArgument) -> TrainingConfig | None:
    """Return the settings without the pattern that the error is about; None if it is about something else.

    The last pattern of `include` stays: without it, all files would be trained on.
    """
    if error.code != UNMATCHED_PATTERN:
        return None
    field = str(error.details["field"]).removeprefix("config.")
    patterns: list[str] = getattr(config, field)
    rest = [pattern for pattern in patterns if sanitize(repr(pattern)) != error.details["value"]]
    if len(rest) == len(patterns) or (field == "include" and not rest):
        return None
    return config.model_copy(update={field: rest})


def _differs(changes: Staleness) -> bool:
    return bool(changes.files_changed or changes.files_new or changes.files_deleted)


def _what(changes: Staleness) -> str:
    """Return the first sentence, which says what has changed, without the advice that follows."""
    return changes.text.partition(". ")[0].rstrip(".")


def _demands(rule: RetrainThreshold, changes: Staleness) -> bool:
    """Return whether a rule demands a training. Commits that change nothing that is read do not count."""
    if not _differs(changes):
        return False
    if rule.units is not None:
        percent = changes.units_changed_percent
        if percent is None:  # no units were recorded, as of a very large code base: a changed file counts as a whole
            percent = 100 * ((changes.files_changed or 0) + (changes.files_new or 0)) / (changes.files or 1)
        return percent >= rule.units
    return rule.commits is not None and (changes.commits_behind or 0) >= rule.commits


def _first_commits(source: str) -> list[str]:
    path = Path(source)
    return first_commits(path) if path.is_dir() else []


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
