"""Check the values of an adapter's weights, piece by piece: they must be finite, and not every B may be zero.

This needs no numpy: the top byte of a float holds the sign and most of the exponent, and the methods of `bytes` search all top
bytes in C.
"""

from __future__ import annotations

from peft_core.adapters.findings import error, error_about
from peft_core.base_models.checkpoint_info import TensorInfo
from peft_core.schemas.results import Reason

_WIDTH = {"F32": 4, "BF16": 2, "F16": 2}
# The top bytes of an infinity or NaN, whose exponent bits are all 1. In float32 and bfloat16, the last of these bits is in
# the next byte.
_SUSPECT = {"F32": b"\x7f\xff", "BF16": b"\x7f\xff", "F16": bytes([*range(0x7C, 0x80), *range(0xFC, 0x100)])}
_ZEROS = b"\x00\x80"  # the top bytes of 0.0 and -0.0


class WeightCheck:
    """Collects what is wrong with the values of tensors, which are given in pieces."""

    def __init__(self) -> None:
        self._not_finite: dict[str, None] = {}  # in the order of the file
        self._has_b = False
        self._has_nonzero_b = False

    def add(self, tensor: TensorInfo, data: bytes) -> None:
        """Check some or all numbers of a tensor, little-endian as in the file.

        Unsupported data types are skipped, because `check_tensors` rejects them.
        """
        if tensor.dtype not in _WIDTH:
            return
        if not _is_finite(data, tensor.dtype):
            self._not_finite[tensor.name] = None
        if is_b(tensor.name):
            self._has_b = True
            self._has_nonzero_b = self._has_nonzero_b or not _is_zero(data, _WIDTH[tensor.dtype])

    def findings(self) -> list[Reason]:
        """Return the errors in all that was added."""
        fix = "Train the adapter again with a lower learning rate"
        names = list(self._not_finite)
        reasons = list(error_about("not_finite", "These tensors contain NaN or infinity", names, fix=fix))
        if self._has_b and not self._has_nonzero_b:
            message = "Every B is zero, so the adapter has no effect: it was never trained, or its weights were lost."
            reasons.append(error("b_all_zero", message, where="lora_B", fix="Train the adapter, or download it again"))
        return reasons


def is_b(name: str) -> bool:
    return ".lora_B." in name or name.endswith(".lora_b")


def _is_finite(data: bytes, dtype: str) -> bool:
    width = _WIDTH[dtype]
    top = data[width - 1 :: width]
    if not any(byte in top for byte in _SUSPECT[dtype]):
        return True
    if dtype == "F16":
        return False
    next_bytes = data[width - 2 :: width]
    return not any(high & 0x7F == 0x7F and low & 0x80 for high, low in zip(top, next_bytes, strict=True))


def _is_zero(data: bytes, width: int) -> bool:
    if data[:4096].strip(_ZEROS) or data.strip(_ZEROS):  # the first bytes usually decide
        return False
    # All bytes are 0x00 or 0x80: each number is a zero of either sign if 0x80 is only in top bytes.
    return not any(0x80 in data[offset::width] for offset in range(width - 1))
