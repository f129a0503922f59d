"""The look at the weights themselves, byte by byte, without numpy."""

from __future__ import annotations

import math
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from peft_core.adapters.tensor_check import check_weights
from peft_core.base_models.checkpoint_info import TensorInfo
from tests.model_files import encoded

A, B = "base_model.model.x.lora_A.weight", "base_model.model.x.lora_B.weight"
TYPES = ["F32", "F16", "BF16"]
NAN, INF = math.nan, math.inf


def found(dtype: str, **tensors: bytes) -> list[str]:
    """Codes for tensors a and b, given as bytes."""
    names = {"a": A, "b": B, "b2": B.replace(".x.", ".y.")}
    infos = {key: TensorInfo(names[key], dtype, (len(data),), 0, len(data)) for key, data in tensors.items()}
    content = {infos[key].name: data for key, data in tensors.items()}
    return [reason.code for reason in check_weights(infos.values(), lambda tensor: content[tensor.name])]


@pytest.mark.parametrize("dtype", TYPES)
def test_ordinary_weights_have_no_reason_against_them(dtype: str) -> None:
    numbers = encoded([0.0, -0.0, 1.0, -0.5, 6e-5, 60000.0], dtype)
    assert found(dtype, a=numbers, b=numbers) == []


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("odd", [NAN, -NAN, INF, -INF])
@pytest.mark.parametrize("place", ["first", "last"])
def test_one_nan_or_infinity_is_found_wherever_it_is(dtype: str, odd: float, place: str) -> None:
    numbers = [0.5] * 3000
    numbers[0 if place == "first" else -1] = odd
    assert found(dtype, a=encoded(numbers, dtype), b=encoded([1.0], dtype)) == ["not_finite"]


@pytest.mark.parametrize("bits", [0x7F800001, 0xFF800000, 0x7FC00000, 0xFFFFFFFF])
def test_every_kind_of_nan_counts(bits: int) -> None:
    assert found("F32", a=struct.pack("<I", bits), b=encoded([1.0], "F32")) == ["not_finite"]


def test_the_largest_numbers_are_finite() -> None:
    largest = struct.pack("<I", 0x7F7FFFFF) + struct.pack("<I", 0xFF7FFFFF)
    assert found("F32", b=largest) == []
    assert found("BF16", b=struct.pack("<H", 0x7F7F)) == []
    assert found("F16", b=struct.pack("<H", 0x7BFF)) == []


@pytest.mark.parametrize("dtype", TYPES)
def test_an_adapter_whose_every_b_is_zero_of_either_sign_does_nothing(dtype: str) -> None:
    zeros = encoded([0.0, -0.0] * 3000, dtype)
    assert found(dtype, a=encoded([1.0], dtype), b=zeros, b2=zeros) == ["b_all_zero"]
    assert found(dtype, a=zeros, b=zeros, b2=encoded([0.0, 1.0], dtype)) == []
    assert found(dtype, a=zeros, b=zeros[:-2] + b"\1\0") == []


@pytest.mark.parametrize(("dtype", "bits"), [("F32", 0x00800080), ("BF16", 0x0080), ("F16", 0x0080)])
def test_a_small_number_that_looks_like_signs_of_zeros_is_not_zero(dtype: str, bits: int) -> None:
    assert found(dtype, b=struct.pack("<I" if dtype == "F32" else "<H", bits)) == []


def test_no_tensors_and_empty_tensors_are_no_finding() -> None:
    assert found("F32") == []
    assert found("F32", a=b"") == []
    assert found("I8", a=b"\xff", b=b"\0") == []  # the check of the header refuses the type


@given(st.lists(st.floats(width=32), min_size=1, max_size=50))
def test_it_agrees_with_arithmetic(numbers: list[float]) -> None:
    expected = [] if all(map(math.isfinite, numbers)) else ["not_finite"]
    if not any(numbers):
        expected.append("b_all_zero")
    assert found("F32", b=struct.pack(f"<{len(numbers)}f", *numbers)) == expected
