"""Repacked weights are those of ggml's formats, bit for bit."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from peft_core.modeling import quantised as repacked
from peft_core.modeling.ggml import PLAIN, SUPPORTED
from peft_core.modeling.quantised import BYTES_PER_WEIGHT, PackedLayout, QuantisedMatrix
from tests.unit.modeling.test_ggml import PER_BLOCK, assert_same_bits, random_rows

KINDS = sorted(SUPPORTED - PLAIN.keys())


@pytest.mark.parametrize("kind", KINDS)
@settings(deadline=None, max_examples=20)
@given(rows=st.integers(1, 19), blocks=st.integers(1, 5), seed=st.integers(0, 2**32 - 1))
def test_any_bytes_stay_the_weights_that_they_were(kind: str, rows: int, blocks: int, seed: int) -> None:
    columns = blocks * PER_BLOCK[kind]
    stored = QuantisedMatrix(random_rows(kind, rows, columns, seed), kind, columns)
    copy = stored.repacked()
    assert isinstance(copy.kind, PackedLayout)
    assert copy.shape == stored.shape
    assert_same_bits(copy.whole(), stored.whole())
    assert_same_bits(copy.rows(rows // 2, rows), stored.rows(rows // 2, rows))
    some = torch.randint(rows, (7,), generator=torch.Generator().manual_seed(seed))
    assert_same_bits(copy.select(some), stored.select(some))


@pytest.mark.parametrize("kind", KINDS)
def test_they_take_a_byte_and_a_quarter_a_weight_at_most(kind: str) -> None:
    stored = QuantisedMatrix(random_rows(kind, 6, 512, 0), kind, 512)
    assert stored.repacked().nbytes <= BYTES_PER_WEIGHT * 6 * 512


def test_rows_of_interleaved_heads_are_put_in_order_once() -> None:
    stored = QuantisedMatrix(random_rows("Q8_0", 12, 64, 1), "Q8_0", 64, heads=3)
    copy = stored.repacked()
    assert copy.heads is None
    assert_same_bits(copy.whole(), stored.whole())


def test_a_matrix_that_is_unpacked_in_several_steps_has_no_seams(monkeypatch: pytest.MonkeyPatch) -> None:
    stored = QuantisedMatrix(random_rows("Q4_1", 11, 64, 2), "Q4_1", 64)
    expected = stored.whole()
    monkeypatch.setattr(repacked, "AT_A_TIME", 3 * 64)
    assert_same_bits(stored.repacked().whole(), expected)


@pytest.mark.parametrize("kind", sorted(PLAIN))
def test_what_is_no_quantisation_stays_what_it_is(kind: str) -> None:
    stored = QuantisedMatrix(random_rows(kind, 3, 32, 0), kind, 32)
    assert stored.repacked() is stored
