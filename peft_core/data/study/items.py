"""Decide which study items are used: those whose answer parses, names something of the repository, and invents nothing."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from peft_core.data.exclusions import ExclusionReason
from peft_core.data.languages import language_named, language_of_file
from peft_core.data.records import Record
from peft_core.data.split import STUDY_PREFIX
from peft_core.data.study.answers import NameCheck, read_answer
from peft_core.data.study.builtins import builtin_names
from peft_core.data.study.index import RepositoryIndex
from peft_core.errors import DataError, sanitize
from peft_core.schemas.dataset import SkippedRecords, StudyUse

REASONS = (
    ExclusionReason.STUDY_UNKNOWN_API,
    ExclusionReason.STUDY_BROKEN_CODE,
    ExclusionReason.STUDY_UNKNOWN_NAME,
    ExclusionReason.STUDY_NAMES_NOTHING,
)
_NAMED = 5  # dropped items that are named per reason
_CHOICES = 3


class Drop(NamedTuple):
    """Why an item is not used."""

    reason: ExclusionReason
    detail: str  # the end of a sentence


@dataclass(slots=True)
class StudyItems:
    """Checks the study items of a data set against its repositories, and counts them."""

    index: RepositoryIndex
    items: int = 0
    dropped: dict[ExclusionReason, list[tuple[str, str]]] = field(default_factory=dict)  # (record, detail)

    def accept(self, record: Record) -> Record | None:
        """Return an item as a record that is named by its API; None if it is dropped."""
        self.items += 1
        checked = check_item(record, self.index)
        if isinstance(checked, Drop):
            self.dropped.setdefault(checked.reason, []).append((record.name, checked.detail))
            return None
        return replace(record, path=f"{STUDY_PREFIX}{checked}")

    @property
    def used(self) -> int:
        return self.items - sum(map(len, self.dropped.values()))

    def require_some(self) -> None:
        """Check that at least one item is used, if there are any.

        Raises:
            DataError: 'no_study_item': every item was dropped; why the first of each reason was.
        """
        if self.items and not self.used:
            raise DataError(
                f"None of the {self.items} study items can be used.",
                code="no_study_item",
                suggestions=tuple(each.example for each in self._skipped()),
            )

    def summary(self, train: Iterable[str], held_out: Iterable[str]) -> StudyUse | None:
        """Return what became of the items; None if there were none. `train` and `held_out`: the paths of all examples."""
        if not self.items:
            return None
        trained, tested = ([path for path in paths if path.startswith(STUDY_PREFIX)] for paths in (train, held_out))
        return StudyUse(
            items=self.items,
            trained_on=len(trained),
            held_out=len(tested),
            apis=len({*trained, *tested}),
            held_out_apis=len(set(tested)),
            dropped=self._skipped(),
        )

    def _skipped(self) -> tuple[SkippedRecords, ...]:
        return tuple(
            SkippedRecords(
                reason=reason.value,
                count=len(found),
                first=tuple(name for name, _ in found[:_NAMED]),
                example=f"{found[0][0][:1].upper()}{found[0][0][1:]}: {found[0][1]}.",
            )
            for reason in REASONS
            if (found := self.dropped.get(reason))
        )


def check_item(record: Record, index: RepositoryIndex) -> str | Drop:
    """Return the full name of the API that an item is about, or why the item is dropped."""
    found = index.find(record.study)
    shown = sanitize(record.study, limit=120)
    if not found:
        return Drop(ExclusionReason.STUDY_UNKNOWN_API, f"'study' is {shown!r}, which the repository does not define")
    if len(found) > 1:
        names = ", ".join(each.qualified for each in found[:_CHOICES])
        return Drop(
            ExclusionReason.STUDY_UNKNOWN_API, f"'study' is {shown!r}, which can mean {names}: write more of the name"
        )
    target = found[0]
    is_code = record.language not in ("text", "markdown")
    own = language_of_file(target.path.rpartition("/")[2]) or language_named("text")
    language = language_named(record.language) if is_code else own
    text = "\n\n".join(text for text, learned in record.texts if learned)
    answer = read_answer(text, language, index, is_code=is_code)
    if answer.broken is not None:
        return Drop(ExclusionReason.STUDY_BROKEN_CODE, answer.broken.problem)
    check = NameCheck(answer, index, language)
    check.run()
    if check.unknown:
        invented = ", ".join(sanitize(name, limit=60) for name in list(check.unknown)[:_NAMED])
        return Drop(
            ExclusionReason.STUDY_UNKNOWN_NAME,
            f"it uses {invented}, which the repository does not have",
        )
    names_target = target.name in check.used or target.name in check.own  # an answer may write it
    if not names_target and not check.used - builtin_names(language.name):
        hint = "code in Markdown stands in fences or in `backticks`; an answer that is code as a whole needs the key 'language'"
        return Drop(
            ExclusionReason.STUDY_NAMES_NOTHING, f"its answer names nothing that the repository defines ({hint})"
        )
    return target.qualified
