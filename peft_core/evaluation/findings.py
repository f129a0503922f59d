"""What a report shows of an evaluation, or of a comparison of two adapters: texts and table cells, ready for the template."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

from peft_core.schemas.counts import counted
from peft_core.schemas.evaluation import (
    AdapterComparison,
    ComparedCompletion,
    Comparison,
    Continuation,
    Difference,
    Evaluation,
    InFileMetric,
    Keep,
    Share,
    Verdict,
)

_HEADINGS = {
    Verdict.HELPS: "The adapter helps",
    Verdict.NO_DIFFERENCE: "No difference could be shown",
    Verdict.HARMS: "The adapter harms",
}
_TONES = {Verdict.HELPS: "good", Verdict.NO_DIFFERENCE: "", Verdict.HARMS: "bad"}
_NEXT = {
    Verdict.HELPS: "Load it with load_adapter, or take it to another runtime with export_adapter. Train again when much of the "
    "code has changed.",
    Verdict.NO_DIFFERENCE: "Train on more data or for more epochs, or on a larger base model. For few files, letting the "
    "assistant read them works better than an adapter.",
    Verdict.HARMS: "Do not use it on such code. Train with a lower learning_rate, for fewer epochs, or on more data.",
}
_KEEP_HEADINGS = {
    Keep.ADAPTER_A: "Keep adapter A",
    Keep.ADAPTER_B: "Keep adapter B",
    Keep.EITHER: "Keep either adapter",
    Keep.BASE_MODEL: "Keep the base model",
}
_KEEP_NEXT = {
    Keep.ADAPTER_A: "Load A with load_adapter; delete_adapter deletes B.",
    Keep.ADAPTER_B: "Load B with load_adapter; delete_adapter deletes A.",
    Keep.EITHER: "Load one with load_adapter; delete_adapter deletes the other one.",
    Keep.BASE_MODEL: "Use the base model for such code, or train on more data or for more epochs.",
}


@dataclass(frozen=True)
class Metric:
    """How a metric is named and written."""

    name: str
    note: str
    lower_is_better: bool = False
    percent: bool = False

    def text(self, value: float, *, sign: bool = False) -> str:
        number = f"{100 * value:+.1f}" if self.percent else f"{value:+.3f}"
        return (number if sign else number.lstrip("+")) + ((" points" if sign else " %") if self.percent else "")

    def interval(self, change: Comparison | Difference) -> str:
        if change.low is None or change.high is None:
            return "too little data"
        low, high = self.text(change.low, sign=True), self.text(change.high, sign=True)
        return f"{low.removesuffix(' points')} to {high}"

    def is_better(self, change: Comparison | Difference) -> bool | None:
        """Return whether the second model is better; None if that may be chance."""
        if change.low is None or change.high is None or change.low <= 0 <= change.high:
            return None
        return (change.change < 0) is self.lower_is_better


@dataclass(frozen=True)
class Value:
    """A cell of the table. `note` is the change from the base model, where another column does not have it."""

    text: str
    note: str = ""


@dataclass(frozen=True)
class Row:
    """One metric in the table."""

    name: str
    note: str
    values: tuple[Value, ...]
    change: str
    interval: str
    tone: str  # of the interval: good, bad, quiet, or none
    meaning: str  # of the interval, where the tone does not say it
    strip: tuple[float, float, float] | None  # interval's low end, change and high end on a scale from -1 to 1


@dataclass(frozen=True)
class Version:
    """What one model wrote."""

    model: str
    similarity: float
    text: str


@dataclass(frozen=True)
class Quote:
    """A prompt with its real continuation and the models' own."""

    file: str
    line: int
    prompt: str
    expected: str
    versions: tuple[Version, ...]


@dataclass(frozen=True)
class Findings:
    """Everything on the page that comes from the measurements."""

    heading: str
    tone: str  # good, bad, or none
    reason: str
    cautions: tuple[str, ...]
    advice: str
    table_heading: str
    columns: tuple[str, ...]  # the models
    change: str  # heading of the column with the change
    rows: tuple[Row, ...]
    basis: str
    quotes: tuple[tuple[str, tuple[Quote, ...]], ...]  # with their headings


def findings_of(result: Evaluation | AdapterComparison) -> Findings:
    return _of_evaluation(result) if isinstance(result, Evaluation) else _of_comparison(result)


def _of_evaluation(evaluation: Evaluation) -> Findings:
    unknown = (
        "The adapter's training data is unknown. If it includes these examples, the results are too favourable."
        if evaluation.seen_in_training is None
        else ""
    )
    excluded = "" if unknown else ", none of which the adapter was trained on"
    return Findings(
        heading=_HEADINGS[evaluation.verdict],
        tone=_TONES[evaluation.verdict],
        reason=_sentence(evaluation.reason),
        cautions=(*evaluation.caveats, *filter(None, [unknown])),
        advice=_NEXT[evaluation.verdict],
        table_heading="Base model compared with adapter",
        columns=("base model", "adapter"),
        change="change",
        rows=tuple(
            _row(metric, change, (metric.text(change.base), metric.text(change.adapter)))
            for metric, change in _metrics(evaluation)
        ),
        basis=(
            f"The perplexity is {evaluation.base_perplexity:.2f} with the base model and "
            f"{evaluation.adapter_perplexity:.2f} with the adapter. Both were evaluated on the same "
            f"{_size(evaluation)}{excluded}. {_about_intervals(evaluation)}"
        ),
        quotes=(
            ("Largest improvements in completions", tuple(map(_quote, evaluation.gains))),
            ("Largest deteriorations in completions", tuple(map(_quote, evaluation.losses))),
        ),
    )


def _of_comparison(comparison: AdapterComparison) -> Findings:
    a, b = comparison.adapter_a.evaluation, comparison.adapter_b.evaluation
    left_out = comparison.left_out.in_words("A", "B")
    return Findings(
        heading=_KEEP_HEADINGS[comparison.keep],
        tone="" if comparison.kept is None else "good",
        reason=_sentence(comparison.reason),
        cautions=comparison.cautions,
        advice=_KEEP_NEXT[comparison.keep],
        table_heading="Base model and two adapters",
        columns=("base model", "A", "B"),
        change="B minus A",
        rows=tuple(_rows_of_comparison(comparison)),
        basis=(
            f"A is {comparison.adapter_a.name}, B is {comparison.adapter_b.name}. The perplexity is {a.base_perplexity:.2f} "
            f"with the base model, {a.adapter_perplexity:.2f} with A and {b.adapter_perplexity:.2f} with B. All three were "
            f"evaluated on the same {_size(a)}. {f'Examples left out: {left_out}. ' if left_out else ''}{_about_intervals(a)}"
        ),
        quotes=(
            ("Completions in which A and B differ most", tuple(map(_quote_of_comparison, comparison.completions))),
        ),
    )


def _metrics(evaluation: Evaluation) -> Iterator[tuple[Metric, Comparison]]:
    """Yield what was measured, in the order of the table."""
    prompts = f"of completions of up to three lines for {evaluation.prompts} prompts; higher is better"
    lines = f"share of {evaluation.lines} lines, each predicted from all lines before it; higher is better"
    general = "loss on code of Python's standard library, nats per token: rises if the adapter forgets; lower is better"
    in_file = [(_in_file(metric, share), share) for metric, share in evaluation.in_file.items()]
    measured: Iterable[tuple[Metric, Comparison | None]] = (
        (Metric("Held-out loss", "nats per token; lower is better; decides", lower_is_better=True), evaluation.loss),
        *in_file,
        (
            Metric("Exact lines" if not in_file else "Exact lines of examples", lines, percent=True),
            evaluation.next_line,
        ),
        (Metric("Edit similarity", prompts, percent=True), evaluation.edit_similarity),
        (Metric("General code", general, lower_is_better=True), evaluation.general_loss),
    )
    for metric, change in measured:
        if change is not None:
            yield metric, change


def _in_file(metric: InFileMetric, share: Share) -> Metric:
    places = f"{share.positions} in {share.files} {'file' if share.files == 1 else 'files'}"
    notes = {
        InFileMetric.LINES: f"{places}, each predicted from the file above it, as in an editor; higher is better",
        InFileMetric.PROJECT_LINES: f"{places}: those of the lines that use a name that the project defines",
        InFileMetric.BLOCK_STARTS: f"{places}: those of the lines that begin a block",
        InFileMetric.PROJECT_NAMES: f"{places}, each predicted from all text before it; higher is better",
        InFileMetric.LINES_AFTER_20: f"{places}, each predicted from 20 to 24 lines above it alone",
        InFileMetric.INVENTED_NAMES: f"of {places}: they call or read a name that occurs nowhere; lower is better",
        InFileMetric.STOPS: f"of {places}: after as many lines as are missing, given the text behind the gap",
    }
    name = metric.in_words
    return Metric(f"{name[:1].upper()}{name[1:]}", notes[metric], metric.lower_is_better, percent=True)


def _rows_of_comparison(comparison: AdapterComparison) -> Iterator[Row]:
    differences = (
        comparison.loss,
        *comparison.in_file.values(),
        comparison.next_line,
        comparison.edit_similarity,
        comparison.general_loss,
    )
    measured = [difference for difference in differences if difference is not None]
    of_both = zip(_metrics(comparison.adapter_a.evaluation), _metrics(comparison.adapter_b.evaluation), strict=True)
    for ((metric, a), (_, b)), difference in zip(of_both, measured, strict=True):
        values = (
            Value(metric.text(a.base)),
            *(
                Value(metric.text(each.adapter), f"{metric.text(each.change, sign=True)} ({metric.interval(each)})")
                for each in (a, b)
            ),
        )
        meaning = {None: "", True: "B is better", False: "A is better"}[metric.is_better(difference)]
        tone = "" if meaning else "quiet"  # a colour would not say which one is better
        yield replace(_row(metric, difference, ()), values=values, tone=tone, meaning=meaning)


def _row(metric: Metric, change: Comparison | Difference, values: Iterable[str]) -> Row:
    strip = None
    if change.low is not None and change.high is not None:
        reach = 1.1 * max(abs(change.low), abs(change.high)) or 1.0
        strip = (change.low / reach, change.change / reach, change.high / reach)
    return Row(
        name=metric.name,
        note=metric.note,
        values=tuple(map(Value, values)),
        change=metric.text(change.change, sign=True),
        interval=metric.interval(change),
        tone={None: "quiet", True: "good", False: "bad"}[metric.is_better(change)],
        meaning="",
        strip=strip,
    )


def _quote(item: Continuation) -> Quote:
    versions = (
        Version("base model", item.base_similarity, item.base),
        Version("adapter", item.adapter_similarity, item.adapter),
    )
    return Quote(item.file, item.line, item.prompt, item.expected, versions)


def _quote_of_comparison(item: ComparedCompletion) -> Quote:
    versions = (
        Version("base model", item.base_similarity, item.base),
        Version("A", item.a_similarity, item.adapter_a),
        Version("B", item.b_similarity, item.adapter_b),
    )
    return Quote(item.file, item.line, item.prompt, item.expected, versions)


def _sentence(reason: str) -> str:
    return f"{reason[:1].upper()}{reason[1:]}."


def _size(evaluation: Evaluation) -> str:
    examples, files = counted(evaluation.examples, "example"), counted(evaluation.files, "file")
    return f"{examples} ({evaluation.tokens} tokens) from {files}"


def _about_intervals(evaluation: Evaluation) -> str:
    return f"Intervals come from a paired bootstrap over {evaluation.resampled}, or over functions for general code."
