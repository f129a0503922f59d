"""ggml's block formats against gguf's own numpy code, bit for bit."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType
from gguf.quants import dequantize
from hypothesis import given, settings
from hypothesis import strategies as st

from peft_core.base_models.gguf import GGML_TYPES
from peft_core.errors import BaseCheckpointError
from peft_core.modeling import ggml
from peft_core.modeling.ggml import SUPPORTED, bytes_per_row, dequantise

KINDS = sorted(SUPPORTED)
PER_BLOCK = {name: per_block for name, per_block, _ in GGML_TYPES.values()}


def random_rows(kind: str, rows: int, columns: int, seed: int) -> torch.Tensor:
    size = (rows, bytes_per_row(kind, columns))
    return torch.from_numpy(np.random.default_rng(seed).integers(0, 256, size, dtype=np.uint8))


def reference(blocks: torch.Tensor, kind: str) -> torch.Tensor:
    with np.errstate(all="ignore"):  # random bytes are infinite scales too
        return torch.from_numpy(dequantize(blocks.contiguous().numpy(), GGMLQuantizationType[kind]).copy())


def assert_same_bits(found: torch.Tensor, expected: torch.Tensor) -> None:
    """Assert that every bit is equal, signs of zeros included; any NaN equals any other."""
    assert found.dtype == expected.dtype == torch.float32
    assert found.shape == expected.shape
    same = found.view(torch.int32) == expected.view(torch.int32)
    assert bool((same | (found.isnan() & expected.isnan())).all())


@pytest.mark.parametrize("kind", KINDS)
@settings(deadline=None, max_examples=25)
@given(rows=st.integers(1, 19), blocks=st.integers(1, 5), seed=st.integers(0, 2**32 - 1))
def test_dequantising_random_bytes_equals_gguf(kind: str, rows: int, blocks: int, seed: int) -> None:
    columns = blocks * PER_BLOCK[kind]
    stored = random_rows(kind, rows, columns, seed)
    before = stored.clone()
    assert_same_bits(dequantise(stored, kind, columns), reference(stored, kind))
    assert torch.equal(stored, before)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("half", [0x0000, 0x8000, 0x0001, 0x83FF, 0x7BFF, 0x7C00, 0xFC00, 0x7E00])
def test_every_byte_dequantises_right_under_extreme_scales(kind: str, half: int) -> None:
    columns = 256
    size = bytes_per_row(kind, columns)
    stored = (torch.arange(256 * size, dtype=torch.int32) * 7 // 5).remainder(256).to(torch.uint8).view(256, size)
    if kind.startswith("Q"):
        per_row = columns // PER_BLOCK[kind]
        at = [104] if kind == "Q6_K" else [0, 1] if kind in ("Q4_1", "Q5_1", "Q4_K", "Q5_K") else [0]
        halves = stored.view(torch.int16).view(256 * per_row, -1)
        halves[:, at] = torch.tensor(half, dtype=torch.int32).to(torch.int16)
    assert_same_bits(dequantise(stored, kind, columns), reference(stored, kind))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("start", [1, 2, 3])
def test_dequantising_accepts_unaligned_bytes(kind: str, start: int) -> None:
    stored = random_rows(kind, 3, 256, 2)
    file = torch.zeros(start + stored.numel(), dtype=torch.uint8)
    file[start:] = stored.flatten()
    assert_same_bits(dequantise(file[start:].view(stored.shape), kind, 256), reference(stored, kind))


@pytest.mark.parametrize("kind", KINDS)
def test_dequantising_accepts_rows_that_are_not_contiguous(kind: str) -> None:
    stored = random_rows(kind, 9, 256, 3)
    assert_same_bits(dequantise(stored[::2], kind, 256), reference(stored[::2], kind))


@pytest.mark.parametrize("kind", KINDS)
def test_dequantising_in_chunks_gives_the_same_matrix(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ggml, "_CHUNK_WEIGHTS", 3 * 256)
    stored = random_rows(kind, 11, 256, 5)
    assert_same_bits(dequantise(stored, kind, 256), reference(stored, kind))


@pytest.mark.parametrize("kind", KINDS)
def test_dequantising_no_rows_gives_no_weights(kind: str) -> None:
    assert dequantise(random_rows(kind, 0, 256, 0), kind, 256).shape == (0, 256)


def test_dequantising_float32_makes_no_copy() -> None:
    stored = random_rows("F32", 3, 8, 4)
    assert dequantise(stored, "F32", 8).data_ptr() == stored.data_ptr()


def test_an_unsupported_format_is_refused_by_name() -> None:
    with pytest.raises(
        BaseCheckpointError, match=r"format IQ2_XS, which is not supported.*Q4_K.*Use a GGUF file of another"
    ):
        dequantise(torch.zeros(1, 74, dtype=torch.uint8), "IQ2_XS", 256)


@pytest.mark.parametrize(
    ("stored", "columns"),
    [
        (torch.zeros(2, 33, dtype=torch.uint8), 32),
        (torch.zeros(2, 34, dtype=torch.int8), 32),
        (torch.zeros(2, 34, dtype=torch.uint8), 40),
    ],
)
def test_bytes_of_the_wrong_shape_are_refused(stored: torch.Tensor, columns: int) -> None:
    with pytest.raises(ValueError, match="Q8_0"):
        dequantise(stored, "Q8_0", columns)
