"""Training and evaluation data: the source, the dataset that is prepared from it, and the examples in it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from enum import StrEnum
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import Field

from peft_core.schemas.counts import counted
from peft_core.schemas.frozen import FrozenModel
from peft_core.schemas.training import HeldOutBy, TaskMixture

_MAX_SHOWN_EXTENSIONS = 8  # of one reason, in a sentence

TrainingData = str | Sequence[Mapping[str, Any]]  # of a request: a path, or inline records


class SourceKind(StrEnum):
    """What a data source is."""

    REPOSITORY = "repository"  # a directory with code
    JSONL = "jsonl"  # a file of records, of any type that `data/records/files.py` reads
    RECORDS = "records"  # records from the request or from a table; they are copied into a .jsonl file of the job


class DatasetPurpose(StrEnum):
    """What a dataset is prepared for. The value is the request field that names its source."""

    TRAINING = "training_data"  # one part is trained on, the other is held out
    EVALUATION = "evaluation_data"  # all of it is held out

    @property
    def field(self) -> str:
        return self.value

    @property
    def tool(self) -> str:
        """The tool whose request names the source."""
        return "train_adapter" if self is DatasetPurpose.TRAINING else "evaluate_adapter"

    @property
    def min_examples(self) -> int:
        """Fewer examples than this are rejected."""
        return 8 if self is DatasetPurpose.TRAINING else 5

    @property
    def min_files(self) -> int:
        """A training needs a file to train on and another one to hold out."""
        return 2 if self is DatasetPurpose.TRAINING else 1

    @property
    def needed_for(self) -> str:
        """The end of the sentence "at least 8 examples are needed..."."""
        return ", one to train on and one to hold out" if self is DatasetPurpose.TRAINING else " to evaluate on"


class DataSource(FrozenModel):
    """One of the sources of a dataset."""

    path: Path
    kind: SourceKind
    name: str = ""  # of several sources: the end of the path, unique among them

    @property
    def prefix(self) -> str:
        """What is put before the names of its files."""
        return f"{self.name}/" if self.name else ""


class RepositoryState(FrozenModel):
    """What a repository among several sources was when the dataset was prepared."""

    name: str
    commit: str | None
    dirty: bool | None


class CatchUpSpec(FrozenModel):
    """What a training that continues from an adapter trains on: what has changed, and a sample of what it already knows."""

    replay_share: float  # tokens of known examples for each token of changed ones
    max_examples: int | None = None  # of both together; None: no limit


class DatasetSpec(FrozenModel):
    """How a source becomes a dataset. The dataset's manifest records it: a dataset with an equal spec is reused."""

    source: Path
    source_kind: SourceKind
    source_name: str = ""  # see `DataSource`
    more_sources: tuple[DataSource, ...] = ()
    include: tuple[str, ...] = ()  # patterns as in .gitignore, see `data/selection.py`
    exclude: tuple[str, ...] = ()
    max_length: int  # tokens per example
    held_out_fraction: float
    seed: int
    skip_unusable_records: bool = False
    enough_examples: int | None = None  # the run trains on no more examples than this; None: on all
    held_out_by: HeldOutBy = "file"
    mixture: TaskMixture = TaskMixture()
    catch_up: CatchUpSpec | None = None  # set if the training continues from an adapter
    purpose: DatasetPurpose = DatasetPurpose.TRAINING

    @property
    def sources(self) -> tuple[DataSource, ...]:
        """All sources, the main one first."""
        return (DataSource(path=self.source, kind=self.source_kind, name=self.source_name), *self.more_sources)


class SkippedRecords(FrozenModel):
    """Records that cannot be used, and that the request allows to skip."""

    reason: str
    count: int
    first: tuple[str, ...]  # names of the first few: "line 17"
    example: str  # what is wrong with the first one


class RecordLengths(FrozenModel):
    """How many records are longer than `max_length`, in tokens of the base model."""

    records: int
    too_long: int
    shortened: int = 0  # those of `too_long` whose first answers fit: a conversation keeps them
    longest: int
    max_length: int
    suggested: int | None = None  # a max_length that takes more of them; None: the base model takes no more

    @property
    def in_words(self) -> str:
        kept = f", of {self.shortened} of them only the first turns are used" if self.shortened else ""
        return (
            f"{self.too_long} of {self.records} records are longer than config.max_length = {self.max_length} tokens{kept} "
            f"(the longest has about {self.longest})"
        )

    @property
    def advice(self) -> str:
        """What the user can do, or ""."""
        if not self.too_long or self.suggested is None or self.suggested <= self.max_length:
            return ""
        which = "takes all of them" if self.suggested >= self.longest else "takes more of them"
        return f"Set config.max_length = {self.suggested}, which {which}"

    @property
    def with_advice(self) -> str:
        return f"{self.in_words}. {self.advice}" if self.advice else self.in_words


class TrainingSetSize(FrozenModel):
    """What of a source will be trained on, after deduplication and without what is held out; estimated."""

    examples: int
    tokens: int


class SourceSummary(FrozenModel):
    """What a data source holds, found without tokenising it: fast enough to answer a tool call."""

    kind: SourceKind
    path: Path | None
    files: int  # usable ones; those of the repositories if records are trained on together with code
    examples: int | None  # usable records; None for code alone, whose examples are only known after preparation
    estimated_tokens: int
    units: int | None = (
        None  # functions, methods and classes of a repository; extrapolated from `sampled_files` if those are fewer
    )
    sampled_files: int = 0  # files that were cut into examples for these numbers
    training_set: TrainingSetSize | None = None  # of a repository
    study_items: int = 0  # of the records: they are checked against the repositories beside them
    cut_records: int = 0  # examples that distinct records become: a long text becomes several
    languages: dict[str, int]  # files per language
    without_grammar: dict[str, int] = {}  # noqa: RUF012 -- those of them that are cut at blank lines for want of a package
    left_out: dict[str, int]  # excluded files or records per reason
    left_out_by_extension: dict[str, dict[str, int]] = {}  # noqa: RUF012 -- of files: reason -> extension -> count
    name: str = ""  # of the main source, if there are more
    more_sources: tuple[DataSource, ...] = ()
    # Of several sources: one summary of all repositories and one per file of records. Only planning needs them.
    parts: tuple[SourceSummary, ...] = Field((), exclude=True)
    advice: tuple[str, ...] = ()  # what the user may do about files that are left out
    needs_chat_template: bool = False
    unused_keys: dict[str, int] = {}  # noqa: RUF012 -- pydantic copies defaults; records per key that has no meaning for training
    skipped: tuple[SkippedRecords, ...] = ()
    lengths: RecordLengths | None = None  # of records, if some are too long
    raised_max_length: RecordLengths | None = None  # why max_length is higher than its default

    @property
    def unused_in_words(self) -> str:
        """What records have that is not used: "Not used: id, source. Skipped: 2 records, unknown key (line 4, line 9)."."""
        skipped = {each.reason for each in self.skipped}
        parts = [
            f"{count} {reason.replace('_', ' ')}" for reason, count in self.left_out.items() if reason not in skipped
        ]
        sentences = [f"Not used: {', '.join(self.unused_keys)}." if self.unused_keys else ""]
        if self.units is None and parts:  # what is left out of code is named by extension
            sentences.append(f"Left out: {', '.join(parts)}.")
        for each in self.skipped:
            more = ", …" if each.count > len(each.first) else ""
            sentences.append(
                f"Skipped: {counted(each.count, 'record')}, {each.reason.replace('_', ' ')} ({', '.join(each.first)}{more})."
            )
        return " ".join(filter(None, sentences))


class StudyUse(FrozenModel):
    """What became of the study items of a dataset. All items of one API are either trained on or held out."""

    items: int
    trained_on: int  # examples
    held_out: int
    apis: int  # that these are about
    held_out_apis: int
    dropped: tuple[SkippedRecords, ...] = ()

    @property
    def in_words(self) -> str:
        """The counts in sentences, with the first example of each reason."""
        dropped = sum(each.count for each in self.dropped)
        others = counted(self.held_out_apis, "other API")
        used = f"Study items: {self.items - dropped} of {self.items} can be used"
        sentences = [
            f"{used}: {counted(self.trained_on, 'example')} to train on, {self.held_out} held out, about {others}."
        ]
        for each in self.dropped:
            more = f" ({each.count})" if each.count > 1 else ""
            sentences.append(f"Dropped, {each.reason.replace('_', ' ')}{more}: {each.example}")
        return " ".join(sentences)


class DatasetSummary(FrozenModel):
    """The size of a prepared dataset, and what was excluded from it."""

    train_examples: int
    held_out_examples: int
    train_tokens: int
    held_out_tokens: int
    files: int
    left_out: dict[str, int]
    left_out_by_extension: dict[str, dict[str, int]] = {}  # noqa: RUF012 -- of files: reason -> extension -> count
    secrets_removed: int = 0
    replayed_examples: int = 0  # of the training examples: known to the adapter that the run continues from
    study: StudyUse | None = None  # set if there are study items
    # Training examples per format: plainly, fill_in_the_middle, instruction.
    told: dict[str, int] = {}  # noqa: RUF012 -- pydantic copies defaults
    sha256: str = ""


class Segment(FrozenModel):
    """A piece of an example. With `learn=False` it is context without loss, such as a prompt."""

    text: str
    learn: bool = True
    literal: bool = False
    """True: text that looks like a special token is tokenised as text, as source code must be. False: it becomes the special
    token, as in a rendered conversation."""


class FillInTheMiddle(NamedTuple):
    """A family's special tokens for fill-in-the-middle (FIM)."""

    prefix: str
    suffix: str
    middle: str  # empty: the suffix comes first, and the middle follows the prefix
    end: str = ""  # ends the middle; empty: the end-of-text token does

    def prompt(self, before: str, after: str) -> tuple[Segment, ...]:
        """Return the segments of a FIM prompt, in the order that the family was trained on. The code is literal."""
        prefix, suffix = Segment(text=self.prefix), Segment(text=self.suffix)
        code_before, code_after = Segment(text=before, literal=True), Segment(text=after, literal=True)
        if not self.middle:
            return (suffix, code_after, prefix, code_before)
        return (prefix, code_before, suffix, code_after, Segment(text=self.middle))

    def prompt_text(self, before: str, after: str) -> str:
        """Return a FIM prompt as text, in which runtimes without segments look for the tokens."""
        return "".join(segment.text for segment in self.prompt(before, after))


class Example(FrozenModel):
    """One document of a dataset: segments that are tokenised in order, followed by end-of-text if `ends`."""

    segments: tuple[Segment, ...]
    path: str  # relative to the source; "record 3" for inline records without a path
    language: str  # "python", "text", ...
    kind: str  # "function", "class", "method", "module", "block", "record", ...
    start_line: int = 0  # 1-based; 0: unknown
    end_line: int = 0
    tokens: int = 0  # of all segments, including the end-of-text token if there is one
    ends: bool = True
    """False for a part of a longer text, such as a unit that is too long for one example: it gets no end-of-text token, or the
    model would learn to stop in the middle of functions."""

    @property
    def text(self) -> str:
        return "".join(segment.text for segment in self.segments)


class HeldOutFile(FrozenModel):
    """A file that held-out examples were cut from, without secrets."""

    path: str  # as in the examples
    language: str
    text: str
    rows: tuple[tuple[int, int], ...]  # of the held-out examples, 0-based and half-open; the rest is context


class CodeNames(FrozenModel):
    """The names of a code base, see `data/code_names.py`."""

    defined: frozenset[str] = frozenset()
    used: frozenset[str] = frozenset()  # all words


def describe_by_extension(by_extension: Mapping[str, Mapping[str, int]]) -> str:
    """Return `30 .json, 2 .yml (no code); 12 .png (binary)`, or an empty text. The largest group comes first."""
    groups = sorted(by_extension.items(), key=lambda group: (-sum(group[1].values()), group[0]))
    return "; ".join(f"{_describe_counts(counts)} ({reason.replace('_', ' ')})" for reason, counts in groups)


def _describe_counts(counts: Mapping[str, int]) -> str:
    shown = [f"{count} {extension}" for extension, count in list(counts.items())[:_MAX_SHOWN_EXTENSIONS]]
    if rest := sum(list(counts.values())[_MAX_SHOWN_EXTENSIONS:]):
        shown.append(f"{rest} others")
    return ", ".join(shown)
