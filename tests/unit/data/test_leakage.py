"""The fingerprint of training text, and the overlap of held-out with training text."""

from __future__ import annotations

from collections.abc import Iterable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from peft_core.data.exclusions import ExclusionReason
from peft_core.data.leakage import MAX_FINGERPRINT_BYTES, TrainingFingerprint, overlap_fraction, why_excluded

TEXT = "def f(a):\n    b = a + 1\n    c = b * 2\n    return c\n"


def test_a_fingerprint_recognises_its_text_with_any_indentation_and_no_other_text() -> None:
    fingerprint = TrainingFingerprint.from_bytes(TrainingFingerprint.of([TEXT, "x = 1\n"]).to_bytes())
    assert fingerprint is not None
    assert fingerprint.share_of(TEXT) == 1
    assert fingerprint.share_of("# header\n" + TEXT.replace("    ", "\t\t")) == pytest.approx(2 / 3)
    assert fingerprint.share_of("x = 1") == 1
    assert fingerprint.share_of(TEXT.replace("a", "z")) == 0
    assert fingerprint.share_of("") == 0


@pytest.mark.slow
def test_a_fingerprint_of_much_text_is_a_sample_that_never_reports_seen_text_as_unseen() -> None:
    many = [f"a = {n}\nb = {n}\nc = {n}\n" for n in range(70_000)]
    fingerprint = TrainingFingerprint.of(many)
    assert fingerprint.divisor > 1
    assert len(fingerprint.to_bytes()) < MAX_FINGERPRINT_BYTES
    assert {fingerprint.share_of(text) for text in many[::100]} == {None, 1.0}, (
        "text that was trained on counts as unseen"
    )


@pytest.mark.slow
@settings(max_examples=5, deadline=None)
@given(lines=st.integers(1, 12), seed=st.integers(0, 99))
def test_a_fingerprint_recognises_each_of_twenty_thousand_examples(lines: int, seed: int) -> None:
    many = ["\n".join(f"x_{line} = {n + seed}" for line in range(lines)) for n in range(20_000)]
    fingerprint = TrainingFingerprint.from_bytes(TrainingFingerprint.of(many).to_bytes())
    assert fingerprint is not None
    assert {fingerprint.share_of(text) for text in many} == {1.0}
    assert {fingerprint.share_of(text.replace("x_", "y_")) for text in many[:1000]} <= {0.0, None}


def test_the_overlap_fraction_of_each_text_is_exact() -> None:
    shares = overlap_fraction({3: TEXT, 5: "x = 1\n", 9: TEXT + "print(1)\n"}, ["# header\n" + TEXT, "y = 1\n"])
    assert shares == {3: 1.0, 5: 0.0, 9: pytest.approx(2 / 3)}


@given(st.binary(max_size=64))
def test_bytes_that_are_no_fingerprint_load_as_none(raw: bytes) -> None:
    assert TrainingFingerprint.from_bytes(raw) is None


def fingerprint_of(numbers: Iterable[int]) -> TrainingFingerprint:
    return TrainingFingerprint.of(function_text(number) for number in numbers)


def function_text(number: int) -> str:
    return f"def f_{number}(a):\n    b = a + {number}\n    c = b * {number}\n    return c - {number}\n"


def test_a_text_is_excluded_because_of_the_adapters_that_were_trained_on_it() -> None:
    known = [fingerprint_of(range(4)), fingerprint_of(range(2, 6))]
    reasons = [why_excluded(function_text(number), known) for number in range(7)]
    a, b, both = ExclusionReason.TRAINED_ON_BY_A, ExclusionReason.TRAINED_ON_BY_B, ExclusionReason.TRAINED_ON
    assert reasons == [a, a, both, both, b, b, None]
    assert why_excluded(function_text(1), [known[0]]) is ExclusionReason.TRAINED_ON
    assert why_excluded(function_text(1), [known[0], None]) is ExclusionReason.TRAINED_ON_BY_A
    no_evidence = TrainingFingerprint(divisor=1 << 63, divisor_of_smallest=1 << 63, hashes=frozenset())
    assert why_excluded(function_text(5), [known[0], no_evidence]) is ExclusionReason.MAYBE_TRAINED_ON


def test_what_two_trainings_have_in_common_is_estimated_from_their_samples() -> None:
    small, large = fingerprint_of(range(100)), fingerprint_of(range(75, 400))
    assert small.overlap(large) == large.overlap(small) == pytest.approx(0.25)
    assert small.overlap(small) == 1
    sampled = TrainingFingerprint(
        divisor=2, divisor_of_smallest=2, hashes=frozenset(value for value in large.hashes if value % 2 == 0)
    )
    assert small.overlap(sampled) == pytest.approx(0.25, abs=0.1)
    assert small.overlap(fingerprint_of(range(3))) is None, "too little to say"
