"""The rule by which an adapter helps, makes no difference, or harms.

1. The loss on held-out text decides. It must change by MIN_EFFECT at least, and its 95 % interval must leave zero out:
   below zero the adapter helps, above it harms, else no difference was shown. Without an interval (fewer than five files
   and fewer than five examples) nothing is shown.
2. Whatever it does for the project, an adapter harms when it forgets: the loss on general code rises by more than FORGETS,
   with an interval above zero, and by more than the held-out loss falls.

Next lines and edit similarity are reported, and decide nothing: they move less than their noise on small held-out sets,
and a loss that falls while they do not is the common case of a small model.
"""

from __future__ import annotations

from peft_core.results import Benefit, Comparison

MIN_EFFECT = 0.01  # nats per token: one per cent of perplexity, below the noise between two seeds
FORGETS = 0.3  # nats per token: perplexity on general code up by a third


def forgets(general: Comparison | None) -> bool:
    return general is not None and general.low is not None and general.change > FORGETS and general.low > 0


def judge(loss: Comparison, general: Comparison | None, *, unit: str) -> tuple[Benefit, str]:
    """(verdict, why in one sentence). `unit`: what the intervals were drawn over."""
    if general is not None and forgets(general) and general.change > -loss.change:
        return Benefit.HARMS, (
            f"the loss on general code rises by {general.change:.3f} nats per token {_between(general)}, "
            f"more than the held-out loss falls ({loss.change:+.3f})"
        )
    moved = f"the held-out loss {'falls' if loss.change < 0 else 'rises'} by {abs(loss.change):.3f} nats per token"
    if loss.low is None or loss.high is None:
        return Benefit.NO_DIFFERENCE, f"{moved}, but on too few {unit} to tell it from chance"
    if loss.low <= 0 <= loss.high:
        return Benefit.NO_DIFFERENCE, f"{moved} {_between(loss)}, which may be chance"
    if abs(loss.change) < MIN_EFFECT:
        return Benefit.NO_DIFFERENCE, f"{moved} {_between(loss)}, which is next to nothing"
    return (Benefit.HELPS if loss.change < 0 else Benefit.HARMS), f"{moved} {_between(loss)}"


def _between(comparison: Comparison) -> str:
    return f"(95 % interval {comparison.low:+.3f} to {comparison.high:+.3f})"
