"""Unit tests of WeightCheck: the scan of the weights' values, byte by byte and without numpy."""

from __future__ import annotations

import math
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from peft_core.adapters.weight_check import WeightCheck
from peft_core.base_models.checkpoint_info import TensorInfo
from tests.model_files import encoded

A, B = "base_model.model.x.lora_A.weight", "base_model.model.x.lora_B.weight"
TYPES = ["F32", "F16", "BF16"]
NAN, INF = math.nan, math.inf


def error_codes(dtype: str, **tensors: bytes) -> list[str]:
    """Return the codes of the errors in the tensors A and B (and B of a second module), given as bytes."""
    names = {"a": A, "b": B, "b2": B.replace(".x.", ".y.")}
    check = WeightCheck()
    for key, data in tensors.items():
        tensor = TensorInfo(names[key], dtype, (len(data),), 0, len(data))
        half = len(data) // 8 * 4  # of whole numbers
        for piece in (data[:half], data[half:]):
            check.add(tensor, piece)
    return [reason.code for reason in check.findings()]


@pytest.mark.parametrize("dtype", TYPES)
def test_ordinary_weights_are_accepted(dtype: str) -> None:
    numbers = encoded([0.0, -0.0, 1.0, -0.5, 6e-5, 60000.0], dtype)
    assert error_codes(dtype, a=numbers, b=numbers) == []


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("value", [NAN, -NAN, INF, -INF])
@pytest.mark.parametrize("position", [0, -1])
def test_a_single_nan_or_infinity_is_detected(dtype: str, value: float, position: int) -> None:
    numbers = [0.5] * 3000
    numbers[position] = value
    assert error_codes(dtype, a=encoded(numbers, dtype), b=encoded([1.0], dtype)) == ["not_finite"]


@pytest.mark.parametrize("bits", [0x7F800001, 0xFF800000, 0x7FC00000, 0xFFFFFFFF])
def test_every_bit_pattern_of_nan_and_infinity_is_detected(bits: int) -> None:
    assert error_codes("F32", a=struct.pack("<I", bits), b=encoded([1.0], "F32")) == ["not_finite"]


def test_the_largest_numbers_are_accepted_as_finite() -> None:
    largest = struct.pack("<I", 0x7F7FFFFF) + struct.pack("<I", 0xFF7FFFFF)
    assert error_codes("F32", b=largest) == []
    assert error_codes("BF16", b=struct.pack("<H", 0x7F7F)) == []
    assert error_codes("F16", b=struct.pack("<H", 0x7BFF)) == []


@pytest.mark.parametrize("dtype", TYPES)
def test_an_adapter_whose_every_b_is_zero_is_reported(dtype: str) -> None:
    zeros = encoded([0.0, -0.0] * 3000, dtype)
    assert error_codes(dtype, a=encoded([1.0], dtype), b=zeros, b2=zeros) == ["b_all_zero"]
    assert error_codes(dtype, a=zeros, b=zeros, b2=encoded([0.0, 1.0], dtype)) == []
    assert error_codes(dtype, a=zeros, b=zeros[:-2] + b"\1\0") == []


@pytest.mark.parametrize(("dtype", "bits"), [("F32", 0x00800080), ("BF16", 0x0080), ("F16", 0x0080)])
def test_a_small_number_with_the_bytes_of_a_negative_zero_is_not_zero(dtype: str, bits: int) -> None:
    assert error_codes(dtype, b=struct.pack("<I" if dtype == "F32" else "<H", bits)) == []


def test_missing_empty_and_integer_tensors_cause_no_error() -> None:
    assert error_codes("F32") == []
    assert error_codes("F32", a=b"") == []
    assert error_codes("I8", a=b"\xff", b=b"\0") == []  # the check of the header rejects this type


@given(st.lists(st.floats(width=32), min_size=1, max_size=50))
def test_the_scan_agrees_with_floating_point_arithmetic(numbers: list[float]) -> None:
    expected = [] if all(map(math.isfinite, numbers)) else ["not_finite"]
    if not any(numbers):
        expected.append("b_all_zero")
    assert error_codes("F32", b=struct.pack(f"<{len(numbers)}f", *numbers)) == expected
