"""Two adapters compared: what is kept, and what the result says about it."""

from __future__ import annotations

import pytest

from peft_core.evaluation.comparison import SAME_CODE, cautions, compare_adapters, decide
from peft_core.evaluation.summary import ExampleScore, Measurement, QuotedPrompt, Scores, Written, summarise
from peft_core.schemas.evaluation import AdapterComparison, ComparedAdapter, Difference, Keep, TrainedOn, Verdict
from tests.factories import make_evaluation

FILES = 8
PROMPTS = [QuotedPrompt(f"f{n}.py", 3, "x = 1\n", "    ", "return x") for n in range(FILES)]


def measured(*losses: float, completion: str = "return y", general: float = 1.0) -> Measurement:
    """One loss per token for all files, or one for each."""
    each = losses * FILES if len(losses) == 1 else losses
    held_out = [
        ExampleScore(file=f"f{n}.py", tokens=100, total_lines=10, loss=100 * each[n], lines=3) for n in range(FILES)
    ]
    rest = [ExampleScore(file=f"g{n}", tokens=100, total_lines=10, loss=100 * general, lines=3) for n in range(FILES)]
    return Measurement(Scores(held_out=tuple(held_out), general=tuple(rest)), [Written(completion)] * FILES)


def compared(a: Measurement, b: Measurement, base: Measurement | None = None) -> AdapterComparison:
    base = base or measured(2.0)
    adapters = [
        ComparedAdapter(name=name, adapter_path=f"/{name}", evaluation=summarise(base, each, PROMPTS))
        for name, each in (("web/a", a), ("web/b", b))
    ]
    return compare_adapters(
        (adapters[0], adapters[1]), (base, a, b), PROMPTS, left_out=TrainedOn(), shared_training=None
    )


@pytest.mark.parametrize(
    ("a", "b", "keep", "sentence"),
    [
        (1.5, 1.2, Keep.ADAPTER_B, "Keep web/b: its held-out loss is lower than that of web/a by 0.300 nats per token"),
        (1.2, 1.5, Keep.ADAPTER_A, "Keep web/a: its held-out loss is lower than that of web/b by 0.300 nats per token"),
        (1.5, 1.5, Keep.EITHER, "no difference between them can be distinguished from noise"),
        (1.5, 1.495, Keep.EITHER, "which is negligible"),
        (1.5, 2.0, Keep.ADAPTER_A, "web/b does not help"),
        (2.3, 1.5, Keep.ADAPTER_B, "web/a does not help, as with it the held-out loss rises by 0.300"),
        (2.0, 2.0, Keep.BASE_MODEL, "Neither adapter helps, so keep the base model"),
        (2.3, 2.6, Keep.BASE_MODEL, "Neither adapter helps, so keep the base model"),
    ],
)
def test_the_adapter_that_demonstrably_predicts_better_is_kept_if_it_helps(
    a: float, b: float, keep: Keep, sentence: str
) -> None:
    comparison = compared(measured(a), measured(b))
    assert comparison.keep is keep
    assert sentence in comparison.reason
    assert comparison.loss.change == pytest.approx(b - a)


def test_adapters_whose_difference_is_noise_are_equal_although_their_means_differ() -> None:
    a = measured(1.5)
    b = measured(*(1.5 + change for change in (0.5, -0.6, 0.4, -0.5, 0.3, -0.4, 0.2, -0.3)))
    comparison = compared(a, b, base=measured(3.0))
    assert comparison.loss.change == pytest.approx(-0.05)
    assert comparison.keep is Keep.EITHER
    assert "which may be chance" in comparison.reason
    assert comparison.kept is None


def test_an_adapter_that_forgets_more_than_it_learns_is_not_kept() -> None:
    comparison = compared(measured(1.9), measured(1.5, general=2.0))
    assert comparison.adapter_b.evaluation.verdict is Verdict.HARMS
    assert comparison.keep is Keep.ADAPTER_A
    assert "web/b does not help, as with it the loss on general code rises by 1.000" in comparison.reason


def test_the_one_that_helps_is_kept_with_the_doubt_about_their_difference_in_the_sentence() -> None:
    helps, unclear = (
        ComparedAdapter(name=name, adapter_path="/", evaluation=make_evaluation(verdict))
        for name, verdict in (("a", Verdict.HELPS), ("b", Verdict.NO_DIFFERENCE))
    )
    loss = Difference(adapter_a=1.8, adapter_b=1.9, change=0.1, low=-0.1, high=0.3)
    keep, reason = decide(helps, unclear, loss, unit="files")
    assert keep is Keep.ADAPTER_A
    assert reason.endswith(
        "; the two differ by 0.100 nats per token (95 % interval -0.100 to +0.300), which may be chance"
    )


def test_all_metrics_and_the_completions_that_differ_are_in_the_comparison() -> None:
    comparison = compared(measured(1.5), measured(1.2, completion="return x"))
    assert comparison.edit_similarity is not None
    assert comparison.edit_similarity.adapter_b == 1
    assert comparison.edit_similarity.change > 0
    assert comparison.general_loss is not None
    assert comparison.general_loss.change == 0
    quoted = comparison.completions[0]
    assert (quoted.adapter_a, quoted.adapter_b, quoted.b_similarity) == ("    return y", "    return x", 1)
    assert comparison.without_texts.completions == ()
    assert compared(measured(1.5), measured(1.2)).completions == (), "they wrote the same"


def test_cautions_say_what_the_result_does_not_show() -> None:
    recorded, unknown = (
        ComparedAdapter(name=name, adapter_path="/", evaluation=make_evaluation(seen_in_training=seen))
        for name, seen in (("a", 0.0), ("b", None))
    )
    (different,) = cautions(recorded, recorded, 0.04)
    assert "trained on different code: 4 % of the smaller training set" in different
    assert cautions(recorded, recorded, SAME_CODE) == []
    (unrecorded,) = cautions(recorded, unknown, None)
    assert unrecorded.startswith("The training data of b is not recorded")
    forgetful = recorded.model_copy(update={"evaluation": make_evaluation(chosen_on_part=True, seen_in_training=0.0)})
    assert cautions(recorded, forgetful, None)[0].startswith("a: Early stopping chose")
