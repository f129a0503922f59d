"""Summarise repositories before training: which files are read, which are not, and whether they are enough."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from peft_core.data.classification import NOTEBOOK
from peft_core.data.examples import examples_from_file, keep_secrets
from peft_core.data.exclusions import ExclusionReason, Exclusions
from peft_core.data.minhash import MinHashIndex
from peft_core.data.notebook import Notebook, read_notebook
from peft_core.data.records import FORMATS
from peft_core.data.selection import Selection
from peft_core.data.sources import SourceFiles, walk_sources
from peft_core.data.split import (
    ExampleKey,
    count_distinct,
    describe_exclusions,
    digest,
    require_enough_examples,
    with_canonical_digests,
)
from peft_core.data.token_counter import BYTES_PER_TOKEN, EstimatedTokenCounter
from peft_core.data.walk import File
from peft_core.errors import DataError, InvalidArgument
from peft_core.schemas.dataset import DatasetPurpose, DataSource, SourceKind, SourceSummary, describe_by_extension

# Limits of the work that is done to see whether there is enough. A source that is still in doubt then is judged by `prepare`.
_PROBE_FILES = 300
_PROBE_BYTES = 1_500_000
_PROBE_MIN_BYTES = 400  # smaller files, such as an almost empty __init__.py, are looked at last
_MARKDOWN_CODE_SHARE = 0.2  # share of a Markdown file that is fenced code
# Notebooks that are read to see which share of them is code. The rest is outputs, of which some notebooks have a hundred times
# as much as code, and others none.
_SAMPLED_NOTEBOOKS = 20
_SAMPLED_NOTEBOOK_BYTES = 20_000_000


def summarise_repositories(
    repositories: Sequence[DataSource], selection: Selection, max_length: int, purpose: DatasetPurpose
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
    _require_enough_code(found, where, max_length, purpose)
    shares = {"markdown": _MARKDOWN_CODE_SHARE, NOTEBOOK.name: _code_share_of_notebooks(found.files)}
    size = sum(file.size * shares.get(file.language.name, 1.0) for file in found.files)
    return SourceSummary(
        kind=SourceKind.REPOSITORY,
        path=repositories[0].path,
        files=len(found.files),
        examples=None,
        estimated_tokens=round(size / BYTES_PER_TOKEN),
        languages=dict(Counter(file.language.name for file in found.files).most_common()),
        left_out=dict(found.exclusions.reasons),
        left_out_by_extension=found.exclusions.by_extension,
        advice=found.exclusions.advice,
    )


def _code_share_of_notebooks(files: Sequence[File]) -> float:
    """Return which share of the bytes of the notebooks is code, from a sample."""
    read = code = 0
    notebooks = sorted((file for file in files if file.language is NOTEBOOK), key=lambda file: file.name)
    for file in notebooks[:: 1 + len(notebooks) // _SAMPLED_NOTEBOOKS]:
        if read and read + file.size > _SAMPLED_NOTEBOOK_BYTES:
            break
        notebook = read_notebook(file.path)
        read += file.size
        if isinstance(notebook, Notebook):
            code += sum(len(line.encode()) for part in notebook.parts for line in part.lines)
    return code / read if read else 0.0


def _require_matches(selection: Selection, where: str) -> None:
    for pattern in selection.unmatched:
        which = "include" if pattern in selection.include else "exclude"
        raise InvalidArgument(
            f"config.{which}",
            pattern,
            f"it matches no file in {where}; a pattern must be as in .gitignore, relative to the directory, such as 'src/' or "
            "'*.sql'",
            suggestions=("Correct the pattern, or omit it. Files that git ignores are not listed",),
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


def _require_enough_code(found: SourceFiles, where: str, max_length: int, purpose: DatasetPurpose) -> None:
    """Split files into examples until there are certainly enough; refuse only if all files together give too few."""
    keys: list[ExampleKey] = []
    signatures = MinHashIndex()
    exclusions = Exclusions()
    exclusions.update(found.exclusions)
    all_left_out = Counter(found.exclusions.reasons)
    token_counter = EstimatedTokenCounter()
    probed_bytes = 0
    files = sorted(found.files, key=lambda file: (file.size < _PROBE_MIN_BYTES, file.size, file.name))
    for number, file in enumerate(files):
        if number >= _PROBE_FILES or probed_bytes > _PROBE_BYTES:
            return
        result = examples_from_file(file, token_counter=token_counter, max_length=max_length, redact=keep_secrets)
        probed_bytes += file.size
        all_left_out.update(result.left_out)
        if result.not_read is not None:
            exclusions.add(result.not_read, file.name)
        for example in result.examples:
            keys.append(ExampleKey(example.path, digest(example.segments[-1].text), example.tokens))
            signatures.add(example.segments[-1].text)
        if len(keys) >= purpose.min_examples:
            examples, sources = count_distinct(with_canonical_digests(keys, signatures))
            if examples >= purpose.min_examples and sources >= purpose.min_files:
                return
    distinct = with_canonical_digests(keys, signatures)
    require_enough_examples(distinct, all_left_out, where, purpose, advice=exclusions.advice)
