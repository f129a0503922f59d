"""From the measurements of base model and two adapters to one AdapterComparison, which says what to keep.

Each adapter has its own verdict against the base model (`summary`). An adapter is kept only if it helps.

1. If neither helps, the base model is kept.
2. If one helps, it is kept.
3. If both help, the one with the lower held-out loss is kept, if the difference is at least `summary.MIN_EFFECT` and its 95 %
   confidence interval excludes zero. Otherwise it does not matter which one is kept.
"""

from __future__ import annotations

from collections.abc import Sequence

from peft_core.evaluation.bootstrap import PairedChange, ResamplingUnit
from peft_core.evaluation.summary import (
    MAX_QUOTED_TEXT,
    Measurement,
    QuotedPrompt,
    doubt_about,
    interval_text,
    measure_changes,
    quoted,
    similarity,
)
from peft_core.schemas.evaluation import (
    AdapterComparison,
    ComparedAdapter,
    ComparedCompletion,
    Difference,
    Keep,
    TrainedOn,
    Verdict,
)

SAME_CODE = 0.5  # of the smaller training set: with less in common, two adapters were trained on different code
_QUOTED = 5  # completions in which the adapters differ most
_MIN_QUOTED_DIFFERENCE = 0.05  # of edit similarity


def compare_adapters(
    adapters: tuple[ComparedAdapter, ComparedAdapter],
    measured: Sequence[Measurement],
    prompts: Sequence[QuotedPrompt],
    *,
    left_out: TrainedOn,
    shared_training: float | None,
    seed: int = 0,
) -> AdapterComparison:
    """Compare two adapters. `measured` has the base model, A and B, on the same text and prompts."""
    a, b = adapters
    changes = measure_changes(measured[1], measured[2], prompts, seed=seed)
    loss = _difference(changes.loss)
    keep, reason = decide(a, b, loss, unit=changes.unit)
    return AdapterComparison(
        keep=keep,
        reason=reason,
        adapter_a=a,
        adapter_b=b,
        loss=loss,
        next_line=changes.next_line and _difference(changes.next_line),
        edit_similarity=changes.edit_similarity and _difference(changes.edit_similarity),
        in_file={metric: _difference(share.change) for metric, share in changes.in_file.items()},
        general_loss=changes.general_loss and _difference(changes.general_loss),
        left_out=left_out,
        shared_training=shared_training,
        cautions=tuple(cautions(a, b, shared_training)),
        completions=_largest_differences(prompts, measured),
    )


def decide(a: ComparedAdapter, b: ComparedAdapter, loss: Difference, *, unit: ResamplingUnit) -> tuple[Keep, str]:
    """Apply the rules in the module's docstring. Return what to keep, and the sentence that says so, without its full stop."""
    a_helps, b_helps = (each.evaluation.verdict is Verdict.HELPS for each in (a, b))
    if not (a_helps or b_helps):
        return Keep.BASE_MODEL, (
            f"Neither adapter helps, so keep the base model: with {a.name} {a.evaluation.reason}; "
            f"with {b.name} {b.evaluation.reason}"
        )
    doubt = doubt_about(loss, unit=unit)
    difference = f"{abs(loss.change):.3f} nats per token{interval_text(loss)}"
    if a_helps and b_helps:
        if doubt:
            return Keep.EITHER, (
                f"Keep either: both help, and no difference between them can be distinguished from noise: the held-out losses "
                f"differ by {difference}, {doubt}"
            )
        keep, better, worse = (Keep.ADAPTER_B, b, a) if loss.change < 0 else (Keep.ADAPTER_A, a, b)
        return (
            keep,
            f"Keep {better.name}: its held-out loss is lower than that of {worse.name} by {difference}; both help",
        )
    keep, better, worse = (Keep.ADAPTER_A, a, b) if a_helps else (Keep.ADAPTER_B, b, a)
    between = f"; the two differ by {difference}, {doubt}" if doubt else ""
    return keep, (
        f"Keep {better.name}: {better.evaluation.reason}; {worse.name} does not help, as with it {worse.evaluation.reason}"
        f"{between}"
    )


def cautions(a: ComparedAdapter, b: ComparedAdapter, shared_training: float | None) -> list[str]:
    """Return sentences that qualify the result."""
    sentences = []
    unknown = [each.name for each in (a, b) if each.evaluation.seen_in_training is None]
    if unknown:
        sentences.append(
            f"The training data of {' and '.join(unknown)} is not recorded: if it includes these examples, the result is too "
            "favourable."
        )
    if shared_training is not None and shared_training < SAME_CODE:
        sentences.append(
            f"The two were trained on different code: {100 * shared_training:.0f} % of the smaller training set is in the "
            "other one. The result shows which one suits this code, not which training was better."
        )
    for each in (a, b):
        sentences += [f"{each.name}: {caveat}" for caveat in each.evaluation.caveats]
    return sentences


def _difference(change: PairedChange) -> Difference:
    return Difference(
        adapter_a=change.first, adapter_b=change.second, change=change.change, low=change.low, high=change.high
    )


def _largest_differences(
    prompts: Sequence[QuotedPrompt], measured: Sequence[Measurement]
) -> tuple[ComparedCompletion, ...]:
    compared = [
        ComparedCompletion(
            file=prompt.file,
            line=prompt.line,
            prompt=prompt.text[-MAX_QUOTED_TEXT:],
            expected=quoted(prompt.expected),
            base=quoted(prompt.indentation + base.text),
            adapter_a=quoted(prompt.indentation + a.text),
            adapter_b=quoted(prompt.indentation + b.text),
            base_similarity=similarity(base.text, prompt),
            a_similarity=similarity(a.text, prompt),
            b_similarity=similarity(b.text, prompt),
        )
        for prompt, base, a, b in zip(prompts, *(each.completions for each in measured), strict=True)
    ]

    def size(completion: ComparedCompletion) -> float:
        return abs(completion.a_similarity - completion.b_similarity)

    quotable = [completion for completion in compared if size(completion) >= _MIN_QUOTED_DIFFERENCE]
    return tuple(sorted(quotable, key=size, reverse=True)[:_QUOTED])
