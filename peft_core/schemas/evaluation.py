"""The evaluation of an adapter, and the comparison of two, with confidence intervals. They are part of results and manifests.

Clients rely on the field names: add fields, but do not rename them.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Literal

from pydantic import Field

from peft_core.schemas.counts import counted
from peft_core.schemas.frozen import FrozenModel


class Verdict(StrEnum):
    """The effect of an adapter on held-out text, decided in `evaluation.summary`."""

    HELPS = "helps"
    NO_DIFFERENCE = "no_difference"  # no significant one
    HARMS = "harms"


class Comparison(FrozenModel):
    """One metric of the base model and of the adapter, measured on the same text."""

    base: float
    adapter: float
    change: float = Field(description="Adapter minus base.")
    low: float | None = Field(
        None, description="95 % confidence interval of the change; null if there is too little data."
    )
    high: float | None = None


class Continuation(FrozenModel):
    """Completions of a held-out text by base model and adapter, with greedy decoding."""

    file: str
    line: int = Field(description="Line number of the first expected line, 1-based; 0 if unknown.")
    prompt: str = Field(description="The last lines of the prompt.")
    expected: str
    base: str
    adapter: str
    base_similarity: float = Field(description="Edit similarity to the expected text; 1 is identical.")
    adapter_similarity: float


class LossChange(FrozenModel):
    """The loss of two adapters on the same held-out text, in nats per token: the continued one, and the new one."""

    before: float
    after: float
    change: float = Field(description="After minus before; negative is better.")
    low: float | None = Field(
        None, description="95 % confidence interval of the change; null if there is too little data."
    )
    high: float | None = None
    files: int
    examples: int

    @property
    def in_words(self) -> str:
        """Both losses with the interval and the size, as in `1.234 -> 1.200 (95 % interval -0.050 to -0.020; ...)`."""
        interval = (
            "" if self.low is None or self.high is None else f"95 % interval {self.low:+.3f} to {self.high:+.3f}; "
        )
        examples, files = counted(self.examples, "example"), counted(self.files, "file")
        return f"{self.before:.3f} -> {self.after:.3f} ({interval}{examples} in {files})"


class CatchUp(FrozenModel):
    """An adapter compared with the one that its training continued from."""

    parent: str = Field(description="Id of the adapter that was continued.")
    changed: LossChange | None = Field(None, description="On held-out code that is new or has changed.")
    old: LossChange | None = Field(None, description="On a sample of what the parent, or an ancestor, held out.")
    loses: bool = Field(
        False, description="The loss on the old examples rises significantly: it is not made current by default."
    )

    @property
    def in_words(self) -> str:
        """The comparison in one sentence."""
        changed = self.changed.in_words if self.changed is not None else "not measured, as none of it has changed"
        old = self.old.in_words if self.old is not None else "not measured, as none of it is left"
        return f"Against {self.parent}, from which it continues: loss on changed held-out code {changed}; on old {old}."


class InFileMetric(StrEnum):
    """What is counted in the middle of whole held-out files, where an editor asks (docs/evaluation.md defines each)."""

    LINES = "exact_lines"
    PROJECT_LINES = "exact_lines_with_project_names"
    BLOCK_STARTS = "exact_first_lines_of_blocks"
    PROJECT_NAMES = "project_names_right"
    LINES_AFTER_20 = "exact_lines_after_20_lines"
    INVENTED_NAMES = "completions_with_invented_names"
    STOPS = "completions_that_stop_in_place"

    @property
    def in_words(self) -> str:
        """As in "exact lines in the file"."""
        words = {
            InFileMetric.LINES: "exact lines in the file",
            InFileMetric.PROJECT_LINES: "exact lines with a project name",
            InFileMetric.BLOCK_STARTS: "exact first lines of blocks",
            InFileMetric.PROJECT_NAMES: "project names right",
            InFileMetric.LINES_AFTER_20: "exact lines after 20 lines",
            InFileMetric.INVENTED_NAMES: "completions with invented names",
            InFileMetric.STOPS: "completions that stop in place",
        }
        return words[self]

    @property
    def lower_is_better(self) -> bool:
        return self is InFileMetric.INVENTED_NAMES


class Share(Comparison):
    """A share of positions, 0 to 1, with base model and adapter."""

    positions: int
    files: int = Field(description="That these positions are in.")


class Repetition(FrozenModel):
    """What one model repeats of training text when it continues the beginnings of training units."""

    prompts: int = Field(description="After which all tokens that it writes are trained text, word for word.")
    longest_tokens: int = Field(description="Longest run of written tokens that is somewhere in the training text.")
    longest_lines: int
    text: str = Field("", description="That run.")


class Memorisation(FrozenModel):
    """What an adapter repeats of its training text, and what the base model writes of it anyway; greedy decoding."""

    prompts: int = Field(description="Beginnings of training units that each model continues.")
    tokens: int = Field(description="Tokens that it writes after each.")
    base: Repetition
    adapter: Repetition

    @property
    def in_words(self) -> str:
        """What was measured, in two sentences."""
        return (
            f"Of {self.prompts} beginnings of training units, the adapter continues {self.adapter.prompts} with {self.tokens} "
            f"tokens of training text word for word (base model: {self.base.prompts}). The longest run that it repeats is "
            f"{self._longest(self.adapter)} (base model: {self._longest(self.base)})."
        )

    @property
    def without_texts(self) -> Memorisation:
        """The measurement without texts from the project."""
        base, adapter = (each.model_copy(update={"text": ""}) for each in (self.base, self.adapter))
        return self.model_copy(update={"base": base, "adapter": adapter})

    def _longest(self, of: Repetition) -> str:
        lines = f" in {of.longest_lines} lines" if of.longest_lines > 1 else ""
        return f"{counted(of.longest_tokens, 'token')}{' or more' if of.longest_tokens == self.tokens else ''}{lines}"


class ColumnName(StrEnum):
    """A state of the model, and whether similar code of the training precedes the prompt."""

    BASE = "base"
    BASE_RETRIEVED = "base_with_retrieved_code"
    ADAPTER = "adapter"
    ADAPTER_RETRIEVED = "adapter_with_retrieved_code"

    @property
    def in_words(self) -> str:
        state, _, retrieved = self.value.partition("_with_")
        return f"the {'base model' if state == 'base' else state}{' with retrieved code' if retrieved else ''}"


class ColumnChange(FrozenModel):
    """A metric of a column minus that of the base model."""

    change: float
    low: float | None = Field(None, description="95 % confidence interval; null if there is too little data.")
    high: float | None = None


class Column(FrozenModel):
    name: ColumnName
    loss: float = Field(description="Nats per token; lower is better.")
    exact_lines: float = Field(description="Share predicted exactly; higher is better.")
    loss_change: ColumnChange | None = Field(None, description="Null for the base model itself.")
    lines_change: ColumnChange | None = None


class Columns(FrozenModel):
    """Base model and adapter, each with and without retrieved code, on the same lines of held-out files."""

    text: str = Field(description="Which one is best, or why nothing was measured.")
    best: ColumnName | None = Field(
        None, description="The one with the lowest loss; text says which others may be as good."
    )
    columns: tuple[Column, ...] = ()
    positions: int = 0
    files: int = 0
    lines: int = 0
    tokens: int = 0


class Evaluation(FrozenModel):
    """Base model and adapter compared on text that the adapter was not trained on."""

    verdict: Verdict
    reason: str = Field(description="Reason for the verdict, in one sentence.")
    loss: Comparison = Field(
        description="Cross-entropy per token of held-out text, in nats; lower is better. It decides the verdict."
    )
    base_perplexity: float
    adapter_perplexity: float
    next_line: Comparison | None = Field(
        None, description="Fraction of held-out lines predicted exactly from all lines before them; higher is better."
    )
    edit_similarity: Comparison | None = Field(
        None,
        description="Edit similarity of completions of up to three lines to the real ones, 0 to 1; higher is better.",
    )
    in_file: dict[InFileMetric, Share] = Field(
        {},
        description="Shares in whole held-out files, given what precedes. Higher is better, except for invented names.",
    )
    general_loss: Comparison | None = Field(
        None, description="Loss on general Python code from no project, in nats per token: shows forgetting."
    )
    columns: Columns | None = Field(
        None, description="Whether retrieval does as well; null without training code to search, and in comparisons."
    )
    forgets: bool = Field(False, description="The loss on general code rises significantly.")
    chosen_on_part: bool = Field(False, description="Early stopping selected the weights on some of these examples.")
    files: int
    examples: int
    tokens: int
    lines: int = 0
    prompts: int = 0
    general_tokens: int = 0
    resampled: Literal["files", "examples"] = Field(
        description="What the bootstrap resamples for the intervals; for general code, functions."
    )
    seen_in_training: float | None = Field(
        None,
        description="Fraction of these examples that the adapter was trained on: 0, as they are excluded; null if its training "
        "data is not recorded.",
    )
    seconds: float = Field(0.0, description="Time that both models took for completions.")
    catch_up: CatchUp | None = Field(None, description="Comparison with the adapter that was continued, if any.")
    memorisation: Memorisation | None = Field(None, description="What it repeats of its training text, if measured.")
    study: LossChange | None = Field(
        None, description="On held-out study items, about APIs that no trained item is about; not part of loss."
    )
    gains: tuple[Continuation, ...] = Field((), description="Completions that the adapter improves most.")
    losses: tuple[Continuation, ...] = Field((), description="Completions that it worsens most.")

    @property
    def caveats(self) -> tuple[str, ...]:
        """Sentences that qualify the verdict."""
        sentences = []
        if self.forgets and self.general_loss is not None:
            sentences.append(
                f"It forgets: the loss on general code rises by {self.general_loss.change:.3f} nats per token."
            )
        if self.columns is not None and self.columns.best in (ColumnName.BASE, ColumnName.BASE_RETRIEVED):
            sentences.append(
                f"Where retrieval is compared, {self.columns.best.in_words} has a lower loss than the adapter."
            )
        if self.chosen_on_part:
            sentences.append(
                "Early stopping chose the best state on a part of these examples, which flatters it a little."
            )
        return tuple(sentences)

    @property
    def without_texts(self) -> Evaluation:
        """The evaluation without texts from the project, for publication with the adapter."""
        memorisation = None if self.memorisation is None else self.memorisation.without_texts
        return self.model_copy(update={"gains": (), "losses": (), "memorisation": memorisation})


class Keep(StrEnum):
    """Which of two adapters to keep, decided in `evaluation.comparison`."""

    ADAPTER_A = "adapter_a"
    ADAPTER_B = "adapter_b"
    EITHER = "either"  # both help, and which one helps more cannot be distinguished from noise
    BASE_MODEL = "base_model"  # neither helps


class Difference(FrozenModel):
    """One metric of two adapters, measured on the same text."""

    adapter_a: float
    adapter_b: float
    change: float = Field(description="B minus A.")
    low: float | None = Field(
        None, description="95 % confidence interval of the change; null if there is too little data."
    )
    high: float | None = None


class ComparedAdapter(FrozenModel):
    """One of two adapters, and how it compares with the base model."""

    name: str
    adapter_path: str
    evaluation: Evaluation


class ComparedCompletion(FrozenModel):
    """Completions of a held-out text by the base model and two adapters, with greedy decoding."""

    file: str
    line: int = Field(description="Line number of the first expected line, 1-based; 0 if unknown.")
    prompt: str
    expected: str
    base: str
    adapter_a: str
    adapter_b: str
    base_similarity: float = Field(description="Edit similarity to the expected text; 1 is identical.")
    a_similarity: float
    b_similarity: float


class TrainedOn(FrozenModel):
    """Examples that were left out of a comparison, because an adapter was trained on them."""

    adapter_a: int = Field(0, description="That A was trained on, and B was not.")
    adapter_b: int = Field(0, description="That B was trained on, and A was not.")
    both: int = 0
    uncertain: int = Field(0, description="For which the records of the two trainings hold no evidence.")

    @property
    def total(self) -> int:
        return self.adapter_a + self.adapter_b + self.both + self.uncertain

    def in_words(self, a: str, b: str) -> str:
        """Such as "3 that only web was trained on, 12 that both were trained on"; empty if there are no such examples."""
        parts = {
            f"that only {a} was trained on": self.adapter_a,
            f"that only {b} was trained on": self.adapter_b,
            "that both were trained on": self.both,
            "that one of them may have been trained on": self.uncertain,
        }
        return ", ".join(f"{count} {words}" for words, count in parts.items() if count)


class AdapterComparison(FrozenModel):
    """Two adapters and their base model, measured on the same text, on which neither adapter is known to have been trained."""

    keep: Keep
    reason: str = Field(description="What to keep and why, in one sentence.")
    adapter_a: ComparedAdapter
    adapter_b: ComparedAdapter
    loss: Difference = Field(description="Of the held-out loss, in nats per token; lower is better. It decides.")
    next_line: Difference | None = None
    edit_similarity: Difference | None = None
    in_file: dict[InFileMetric, Difference] = {}  # noqa: RUF012 -- pydantic copies defaults
    general_loss: Difference | None = None
    left_out: TrainedOn = TrainedOn()
    shared_training: float | None = Field(
        None, description="Fraction of the smaller training set that the other one has as well; null if it is unknown."
    )
    cautions: tuple[str, ...] = ()
    completions: tuple[ComparedCompletion, ...] = Field((), description="Those in which A and B differ most.")

    @property
    def kept(self) -> ComparedAdapter | None:
        """The one adapter to keep, if there is one."""
        return {Keep.ADAPTER_A: self.adapter_a, Keep.ADAPTER_B: self.adapter_b}.get(self.keep)

    @property
    def without_texts(self) -> AdapterComparison:
        """The comparison without texts from the project."""
        return self.model_copy(update={"completions": ()})
