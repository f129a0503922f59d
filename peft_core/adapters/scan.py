"""Look at the weights themselves: is every number finite, and would they do anything at all?

Without numpy, and fast because no number is ever made of the bytes: the sign and the larger part of the exponent of a
float are its top byte, and C code looks through all top bytes at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from peft_core.adapters.reasons import about, error
from peft_core.bases.header import TensorInfo
from peft_core.results import Reason

_WIDTH = {"F32": 4, "BF16": 2, "F16": 2}
# Top bytes of an infinity or NaN: an exponent of ones. In float32 and bfloat16 its last bit is in the byte below.
_SUSPECT = {"F32": b"\x7f\xff", "BF16": b"\x7f\xff", "F16": bytes([*range(0x7C, 0x80), *range(0xFC, 0x100)])}
_ZEROS = b"\x00\x80"  # a zero's top byte: either sign


def scan(tensors: Iterable[TensorInfo], read: Callable[[TensorInfo], bytes]) -> list[Reason]:
    """Reasons against these weights. `read` gives a tensor's bytes, little-endian as in the file.

    One tensor is looked at at a time. Types that are no floats of these kinds are passed over: the check of the header
    refuses them.
    """
    odd: list[str] = []
    b_seen = b_moves = False
    for tensor in tensors:
        if tensor.dtype not in _WIDTH:
            continue
        data = read(tensor)
        if not _is_finite(data, tensor.dtype):
            odd.append(tensor.name)
        if ".lora_B." in tensor.name:
            b_seen = True
            b_moves = b_moves or not _is_zero(data, _WIDTH[tensor.dtype])
    reasons = [
        *about("not_finite", "tensors hold NaN or infinity", odd, fix="Train it again with a lower learning rate")
    ]
    if b_seen and not b_moves:
        message = "Every B is zero: the adapter would change nothing. It was never trained, or its weights were lost."
        reasons.append(error("b_all_zero", message, where="lora_B", fix="Train it, or fetch it again"))
    return reasons


def _is_finite(data: bytes, dtype: str) -> bool:
    width = _WIDTH[dtype]
    top = data[width - 1 :: width]
    if not any(byte in top for byte in _SUSPECT[dtype]):
        return True
    if dtype == "F16":
        return False
    below = data[width - 2 :: width]
    return not any(high & 0x7F == 0x7F and low & 0x80 for high, low in zip(top, below, strict=True))


def _is_zero(data: bytes, width: int) -> bool:
    if data[:4096].strip(_ZEROS) or data.strip(_ZEROS):  # mostly the beginning tells
        return False
    # Only bytes 0 and 128 are left: zero of either sign, if 128 is nowhere but on top.
    return not any(0x80 in data[place::width] for place in range(width - 1))
