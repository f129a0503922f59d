"""The arithmetic of evaluations: confidence intervals, verdicts, exact lines, completion points."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping
from itertools import pairwise
from types import MappingProxyType

import pytest
from hypothesis import given
from hypothesis import strategies as st

from peft_core.evaluation.bootstrap import MIN_UNITS, PairedSum, choose_resampling_unit, compare, sum_by_file
from peft_core.evaluation.stdlib_code import stdlib_examples
from peft_core.evaluation.summary import (
    FORGETTING_THRESHOLD,
    MIN_EFFECT,
    ExampleScore,
    Measurement,
    QuotedPrompt,
    Scores,
    WindowScore,
    Written,
    decide_verdict,
    edit_similarity,
    stops_in_place,
    summarise,
)
from peft_core.evaluation.worker.completion_points import find_completion_points, find_lines, sample_completion_points
from peft_core.schemas.evaluation import Comparison, InFileMetric, Verdict

paired_sums = st.builds(
    PairedSum, first=st.floats(0, 1e4), second=st.floats(0, 1e4), weight=st.integers(1, 500).map(float)
)
texts = st.lists(st.sampled_from(["", "    ", "\t", "def f(x):", "    return x + 1", "        y = [x, 'ä']", "}"])).map(
    "\n".join
)


@given(st.lists(paired_sums, min_size=1, max_size=30), st.integers(0, 5))
def test_the_change_is_the_difference_of_the_means_and_inside_its_interval(sums: list[PairedSum], seed: int) -> None:
    comparison = compare(sums, seed=seed)
    assert comparison is not None
    assert comparison.change == pytest.approx(comparison.second - comparison.first, abs=1e-5)
    assert comparison == compare(sums, seed=seed)
    if len(sums) < MIN_UNITS:
        assert (comparison.low, comparison.high) == (None, None)
    else:
        assert comparison.low is not None
        assert comparison.high is not None
        assert comparison.low <= comparison.change <= comparison.high


@given(st.lists(paired_sums, min_size=MIN_UNITS, max_size=20))
def test_swapping_the_models_changes_the_sign_of_the_change(sums: list[PairedSum]) -> None:
    forward = compare(sums)
    swapped = compare([PairedSum(paired.second, paired.first, paired.weight) for paired in sums])
    assert forward is not None
    assert swapped is not None
    assert swapped.change == -forward.change
    assert (forward.low, forward.high) != (None, None)


def test_a_comparison_of_nothing_is_none() -> None:
    assert compare([]) is None
    assert compare([PairedSum(1, 2, 0)]) is None


@pytest.mark.slow
def test_intervals_contain_the_true_value_with_the_stated_probability() -> None:
    generator = random.Random(1)  # noqa: S311 -- a simulation
    held = 0
    for _ in range(200):
        sums = [PairedSum(0.0, generator.gauss(-0.1, 0.3), 1.0) for _ in range(8)]
        comparison = compare(sums)
        assert comparison is not None
        assert comparison.low is not None
        assert comparison.high is not None
        held += comparison.low <= -0.1 <= comparison.high
    assert 0.9 <= held / 200 <= 0.99  # plain percentiles contain it in about 88 % of the cases


def test_examples_are_resampled_if_there_are_too_few_files() -> None:
    assert choose_resampling_unit(["a", "b", "c", "d", "e"]) == "files"
    assert choose_resampling_unit(["a", "a", "b", "b", "b", "b"]) == "examples"
    assert sum_by_file([("a", PairedSum(1, 2, 3)), ("b", PairedSum(1, 1, 1)), ("a", PairedSum(1, 1, 1))]) == [
        PairedSum(2, 3, 4),
        PairedSum(1, 1, 1),
    ]


def comparison(change: float, low: float | None, high: float | None) -> Comparison:
    return Comparison(base=2.0, adapter=2.0 + change, change=change, low=low, high=high)


GENERAL = comparison(0.02, 0.01, 0.03)


@pytest.mark.parametrize(
    ("loss", "general", "verdict", "why"),
    [
        (comparison(-0.3, -0.4, -0.2), GENERAL, Verdict.HELPS, "falls by 0.300"),
        (comparison(-0.3, -0.7, 0.1), GENERAL, Verdict.NO_DIFFERENCE, "chance"),
        (comparison(-0.3, None, None), GENERAL, Verdict.NO_DIFFERENCE, "too few files"),
        (comparison(-0.005, -0.006, -0.004), None, Verdict.NO_DIFFERENCE, "negligible"),
        (comparison(0.3, 0.2, 0.4), GENERAL, Verdict.HARMS, "rises by 0.300"),
        (comparison(0.3, -0.2, 0.7), None, Verdict.NO_DIFFERENCE, "chance"),
        (comparison(-0.3, -0.4, -0.2), comparison(0.5, 0.4, 0.6), Verdict.HARMS, "general code rises by 0.500"),
        (comparison(-0.8, -0.9, -0.7), comparison(0.5, 0.4, 0.6), Verdict.HELPS, "falls by 0.800"),
        (comparison(-0.3, -0.4, -0.2), comparison(0.5, -0.1, 0.9), Verdict.HELPS, "falls by 0.300"),
    ],
)
def test_the_verdict_follows_the_documented_rules(
    loss: Comparison, general: Comparison | None, verdict: Verdict, why: str
) -> None:
    decided, reason = decide_verdict(loss, general, unit="files")
    assert decided is verdict
    assert why in reason


@given(st.floats(-3, 3), st.floats(0, 2), st.floats(0, 2), st.floats(-1, 1))
def test_a_verdict_requires_an_interval_that_excludes_zero(
    change: float, below: float, above: float, general: float
) -> None:
    loss = comparison(change, change - below, change + above)
    known = comparison(general, general, general)
    verdict, _ = decide_verdict(loss, known, unit="files")
    if verdict is Verdict.HELPS:
        assert change + above < 0
        assert change <= -MIN_EFFECT
    if verdict is Verdict.HARMS:
        assert change - below > 0 or general > FORGETTING_THRESHOLD


def tokens_of(text: str, size: int) -> list[tuple[int, int]]:
    """Return offsets of tokens of `size` characters, with a token boundary before the visible part of every row."""
    offsets, begin = [], 0
    for row in text.splitlines(keepends=True):
        visible = begin + len(row) - len(row.lstrip())
        edges = sorted({*range(visible, begin + len(row), size), begin, visible, begin + len(row)})
        offsets += [(a, b) for a, b in pairwise(edges) if a < b]
        begin += len(row)
    return offsets


@given(texts, st.integers(1, 4))
def test_the_tokens_of_a_line_form_its_visible_part(text: str, size: int) -> None:
    offsets = tokens_of(text, size)
    rows = text.splitlines()
    for line in find_lines(text, offsets):
        written = text[offsets[line.first][0] : offsets[line.last - 1][1]]
        assert written.strip() == rows[line.row].strip()
        assert line.row > 0


def test_a_line_that_begins_inside_a_token_is_skipped() -> None:
    text = "alpha = 1\nbeta = 2\ngamma = 3\n"
    separate = list(find_lines(text, [(0, 9), (9, 10), (10, 18), (18, 19), (19, 28), (28, 29)]))
    assert [line.row for line in separate] == [1, 2]
    assert not separate[0].includes_newline
    across = list(find_lines(text, [(0, 9), (9, 12), (12, 18), (18, 19), (19, 28), (28, 29)]))
    assert [line.row for line in across] == [2]
    with_end = list(find_lines(text, [(0, 10), (10, 19), (19, 29)]))
    assert [(line.row, line.includes_newline) for line in with_end] == [(1, True), (2, True)]


def test_completion_points_are_inside_blocks_and_reproducible_for_a_seed() -> None:
    text = "import os\n\ndef walk(path):\n    names = os.listdir(path)\n    # sorted\n    return sorted(names)\n"
    cuts = find_completion_points(text, tokens_of(text, 3))
    assert [cut.row for cut in cuts] == [5]
    assert cuts[0].expected == "    return sorted(names)\n"
    many = [cuts * 3, [], cuts * 2]
    chosen = sample_completion_points(many, 4, seed=7)
    assert chosen == sample_completion_points(many, 4, seed=7)
    assert sorted(index for index, _ in chosen) == [0, 0, 2, 2]
    assert len(sample_completion_points(many, 50, seed=7)) == 5
    assert sample_completion_points([], 5, seed=0) == []


def test_all_held_out_measurements_use_the_same_resampling_unit() -> None:
    prompts = [QuotedPrompt(f"f{n % 2}.py", 3, "x = 1\n", "", "return x") for n in range(8)]
    base = Measurement(make_scores({f"f{n}.py": 2.0 for n in range(6)}, lines=2), [Written("return y")] * 8)
    adapter = Measurement(make_scores({f"f{n}.py": 1.5 for n in range(6)}, lines=3), [Written("return x")] * 8)
    evaluation = summarise(base, adapter, prompts)
    assert (evaluation.resampled, evaluation.prompts) == ("files", 8)
    assert evaluation.edit_similarity is not None
    assert evaluation.edit_similarity.low is None, "two files are too few"


def in_file(files: int, right: int) -> list[WindowScore]:
    metric = InFileMetric.LINES
    return [WindowScore(file=f"f{n % files}.py", metric=metric, positions=10, right=right) for n in range(6)]


def test_positions_in_files_are_counted_with_an_interval_over_files_or_windows() -> None:
    for files in (6, 2):
        base, adapter = (
            Measurement(make_scores({"a": 2.0}, lines=2).model_copy(update={"in_file": in_file(files, right)}))
            for right in (2, 5)
        )
        share = summarise(base, adapter, []).in_file[InFileMetric.LINES]
        assert (share.base, share.adapter, share.positions, share.files) == (0.2, 0.5, 60, files)
        assert (share.low, share.high) == (0.3, 0.3)


def test_what_was_not_measured_is_not_reported() -> None:
    scores = make_scores({"a": 2.0}, lines=2)
    prompts = [QuotedPrompt("a", 3, "x = 1\n", "", "return x")]
    written = Measurement(scores, [Written("return y", invents=True, has_ended=True)])
    assert set(summarise(written, written, prompts).in_file) == {InFileMetric.INVENTED_NAMES}
    assert summarise(Measurement(scores), Measurement(scores), []).in_file == {}


def test_a_completion_stops_in_place_if_it_ends_by_itself_after_the_missing_lines() -> None:
    prompt = QuotedPrompt("a", 3, "x = 1\n", "", "y = 2\n\nreturn x\n", fills_gap=True)
    assert stops_in_place(Written("z = 1\n    return 3", has_ended=True), prompt)
    assert not stops_in_place(Written("z = 1\n    return 3"), prompt)
    assert not stops_in_place(Written("z = 1\n", has_ended=True), prompt)


@given(st.text(max_size=40), st.text(max_size=40))
def test_edit_similarity_is_between_0_and_1_and_ignores_indentation(written: str, expected: str) -> None:
    assert 0 <= edit_similarity(written, expected) <= 1
    assert edit_similarity(written, written) == 1
    assert edit_similarity("  a = 1\n", "a = 1") == 1


def make_scores(
    held_out: Mapping[str, float], general: Mapping[str, float] = MappingProxyType({}), *, lines: int
) -> Scores:
    """Scores with these losses per token, by file."""

    def score(file: str, loss: float) -> ExampleScore:
        return ExampleScore(file=file, tokens=100, total_lines=10, loss=100 * loss, lines=lines)

    return Scores(
        held_out=tuple(score(*item) for item in held_out.items()),
        general=tuple(score(*item) for item in general.items()),
    )


def test_an_evaluation_contains_everything_that_was_measured() -> None:
    base = make_scores({f"f{n}.py": 2.0 + n / 10 for n in range(6)}, {f"g{n}": 1.0 for n in range(5)}, lines=2)
    adapter = make_scores({f"f{n}.py": 1.5 + n / 10 for n in range(6)}, {f"g{n}": 1.1 for n in range(5)}, lines=3)
    prompts = [QuotedPrompt(file, 3, "x = 1\n", "    ", "    return x") for file in ("a.py", "b.py")]
    evaluation = summarise(
        Measurement(base, [Written("return y"), Written("return x")], 1.5),
        Measurement(adapter, [Written("return x"), Written("pass")], 1.7),
        prompts,
    )
    assert evaluation.verdict is Verdict.HELPS
    assert evaluation.loss.change == pytest.approx(-0.5)
    assert evaluation.adapter_perplexity == pytest.approx(math.exp(1.75))
    assert evaluation.next_line is not None
    assert evaluation.next_line.change == pytest.approx(0.1)
    assert evaluation.general_loss is not None
    assert evaluation.general_loss.change == pytest.approx(0.1)
    assert (evaluation.files, evaluation.lines, evaluation.prompts, evaluation.resampled) == (6, 60, 2, "files")
    assert [each.file for each in evaluation.gains] == ["a.py"]
    assert [each.file for each in evaluation.losses] == ["b.py"]
    assert evaluation.gains[0].adapter == "    return x", "the indentation that ends the prompt belongs to the line"
    assert evaluation.seconds == 3.2
    assert evaluation.without_texts.gains == ()


def test_the_packaged_stdlib_functions_compile() -> None:
    examples = stdlib_examples()
    assert len(examples) == 16
    for example in examples:
        compile(example.text, example.path, "exec")
