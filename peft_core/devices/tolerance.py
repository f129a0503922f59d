"""How far an accelerator's loss and gradients may be from those of the CPU in float32.

A product in a format with p significant bits is rounded by at most u = 2^-p of its value. Each layer amplifies and adds
roundings, and by how much depends on the model and the text: the gradient's error was between 1 and 5 times u sqrt(layers). So
the CPU measures it: it computes the same step once more, with operands and results of all products rounded to p bits
(`training.device_check`). Device and emulation round the same numbers, but add them up in another order, so that their errors
are of the same size. The tolerance is four times the emulated one. The largest ratio was 1.5, with torch's own arithmetic in
16 bits on a CPU as the device:

                                                          error of the gradient
                                                          emulated       computed
    bundled base, 30 layers, all in bf16                  0.064          0.094
    bundled base, 30 layers, all in float16               0.0062         0.0094
    tiny models of 6 families, products in bf16           0.010-0.019    0.011-0.026
    bundled base, 30 layers, float32, other kernels                      0.0000011

The error of a tensor's gradient behaves alike. The loss and the length of the gradient along the reference are single numbers,
in which errors cancel: one of them may be small by chance, so that their tolerances are shares of the gradient's. The largest
shares that were measured are 0.05 for the loss and 0.34 for the length.

In float32, rounding is far below any error of interest, and GPUs approximate functions such as exp, hence a floor. What exceeds
the ceiling is wrong in any format: a gradient of random numbers differs by 1.4.
"""

from __future__ import annotations

import math

from peft_core.schemas.device_check import GradientDifference, NumberFormat, Tolerance

SIGNIFICANT_BITS: dict[NumberFormat, int] = {"float32": 24, "tf32": 11, "float16": 11, "bfloat16": 8}
_MARGIN = 4.0
_LOSS, _SCALE = 0.25 / _MARGIN, 1.2 / _MARGIN  # shares of the gradient's tolerance
_CEILING = 0.7
_FLOOR = 1e-3
# The estimate of memory is near the peak for families with fused blocks, and an upper bound for others: more is unexpected.
_MORE_MEMORY = 1.2


def needs_emulation(number_format: NumberFormat) -> bool:
    """Return whether rounding in this format may exceed the floor, so that it has to be measured."""
    return SIGNIFICANT_BITS[number_format] < SIGNIFICANT_BITS["float32"]


def tolerance(rounding: GradientDifference | None) -> Tolerance:
    """Return what rounding explains. `rounding`: its emulation on the CPU; None in float32."""
    gradient = _limited(0.0 if rounding is None else _MARGIN * rounding.gradient)
    return Tolerance(
        loss=max(_FLOOR, _LOSS * gradient),
        gradient=gradient,
        worst=_limited(0.0 if rounding is None else _MARGIN * rounding.worst),
        scale=max(_FLOOR, _SCALE * gradient),
    )


def _limited(value: float) -> float:
    return max(_FLOOR, min(_CEILING, value))


def why_different(found: GradientDifference, allowed: Tolerance) -> str:
    """Return what exceeds the tolerance as a clause; "" if nothing does. NaN exceeds every tolerance."""
    problems = []
    if not found.loss <= allowed.loss:
        problems.append(f"the loss differs by {_percent(found.loss)} (tolerance {_percent(allowed.loss)})")
    if not found.gradient <= allowed.gradient:
        problems.append(f"the gradient differs by {_percent(found.gradient)} (tolerance {_percent(allowed.gradient)})")
    elif not found.scale <= allowed.scale:
        problems.append(
            f"the length of the gradient differs by {_percent(found.scale)} (tolerance {_percent(allowed.scale)})"
        )
    if not found.worst <= allowed.worst:
        problems.append(
            f"that of {found.worst_tensor} differs by {_percent(found.worst)} (tolerance {_percent(allowed.worst)})"
        )
    return ", ".join(problems)


def memory_note(measured: int | None, expected: int) -> str:
    """Return as a clause that a device needs more memory than was estimated; "" if it does not, or was not measured."""
    if measured is None or measured <= _MORE_MEMORY * expected:
        return ""
    return f"it takes {measured / 1e9:.2f} GB of its memory, and {expected / 1e9:.2f} GB were estimated"


def _percent(share: float) -> str:
    return f"{100 * share:.2g} %" if math.isfinite(share) else str(share)
