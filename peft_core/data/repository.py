"""Summarise repositories before training: which files are read, which are not, and whether they are enough."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from peft_core.data.exclusions import ExclusionReason, Exclusions
from peft_core.data.grammars import without_grammar
from peft_core.data.records import FORMATS
from peft_core.data.sample import RepositorySample, sample_repository
from peft_core.data.selection import UNMATCHED_PATTERN, Selection
from peft_core.data.sources import SourceFiles, walk_sources
from peft_core.data.split import describe_exclusions, require_enough_examples
from peft_core.errors import DataError, InvalidArgument
from peft_core.schemas.dataset import DatasetPurpose, DataSource, SourceKind, SourceSummary, describe_by_extension


def summarise_repositories(
    repositories: Sequence[DataSource],
    selection: Selection,
    max_length: int,
    purpose: DatasetPurpose,
    *,
    held_out_fraction: float,
    seed: int,
) -> SourceSummary:
    """Return what one or several repositories hold together.

    Raises:
        InvalidArgument: a pattern of config.include or config.exclude matches no file.
        DataError: 'no_code', 'too_few_examples', 'too_many_files', 'git_directory'.
    """
    found = walk_sources(repositories, selection)
    where = ", ".join(str(source.path) for source in repositories)
    _require_matches(selection, where)
    if not found.files:
        raise _no_source_files(where, found.exclusions)
    sample = sample_repository(found.files, max_length, purpose)
    if sample.is_complete:
        _require_enough_code(found, sample, where, purpose)
    training_set = sample.training_set(held_out_fraction, seed) if purpose is DatasetPurpose.TRAINING else None
    languages = Counter(file.language.name for file in found.files)
    return SourceSummary(
        kind=SourceKind.REPOSITORY,
        path=repositories[0].path,
        files=len(found.files),
        examples=None,
        estimated_tokens=sample.estimated_tokens,
        units=sample.estimated_units,
        sampled_files=sample.files,
        training_set=training_set,
        languages=dict(languages.most_common()),
        without_grammar=without_grammar(languages),
        left_out=dict(found.exclusions.reasons),
        left_out_by_extension=found.exclusions.by_extension,
        advice=found.exclusions.advice,
    )


def _require_matches(selection: Selection, where: str) -> None:
    for pattern in selection.unmatched:
        which = "include" if pattern in selection.include else "exclude"
        raise InvalidArgument(
            f"config.{which}",
            pattern,
            f"it matches no file in {where}; a pattern must be as in .gitignore, relative to the directory, such as 'src/' or "
            "'*.sql'",
            suggestions=("Correct the pattern, or omit it. Files that git ignores are not listed",),
            code=UNMATCHED_PATTERN,
        )


def _no_source_files(where: str, exclusions: Exclusions) -> DataError:
    not_read = describe_by_extension(exclusions.by_extension)
    suggestions = exclusions.advice
    if not suggestions:
        suggestions = (
            "Give the directory that holds the source files",
            f"For data that is not code, give a .jsonl file, {FORMATS}",
        )
        if not set(exclusions.reasons) - {ExclusionReason.HIDDEN}:
            how = "If its files are not checked out, run `git checkout HEAD`, or `git submodule update --init` for a submodule"
            suggestions = (how, *suggestions)
    return DataError(
        f"{where} contains no source files. Left out: {describe_exclusions(exclusions.reasons)}."
        + (f" Not read: {not_read}." if not_read else ""),
        code="no_code",
        suggestions=suggestions,
        details={"left_out": dict(exclusions.reasons), "left_out_by_extension": exclusions.by_extension},
    )


def _require_enough_code(found: SourceFiles, sample: RepositorySample, where: str, purpose: DatasetPurpose) -> None:
    """Refuse repositories if all their files together give too few examples."""
    exclusions = Exclusions()
    exclusions.update(found.exclusions)
    exclusions.update(sample.not_read)
    left_out = Counter(found.exclusions.reasons) + sample.left_out
    require_enough_examples(sample.distinct_keys(), left_out, where, purpose, advice=exclusions.advice)
