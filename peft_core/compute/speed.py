"""How fast a device multiplies matrices. A new Mac's CPU (SME) may be about as fast as its GPU: hence both are timed."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace

import torch

from peft_core.compute.device import Machine, choose
from peft_core.compute.threads import SHAPE
from peft_core.spec import DeviceName, Precision

_AT_MOST_S = 1.0
_TOGETHER = 8  # products handed over before waiting: one by one a GPU would mostly wait, and training does not


def timed(requested: DeviceName, machine: Machine, precision: Precision = "auto") -> Machine:
    """The machine with the speeds of MPS and CPU, where there is a choice between them; two seconds at most."""
    if requested != "auto" or not machine.mps:
        return machine
    plans = choose("mps", machine, precision), choose("cpu", machine, precision)
    mps, cpu = (flops(plan.device, plan.weights) for plan in plans)
    return replace(machine, mps_flops=mps, cpu_flops=cpu)


def flops(
    device: str, dtype: torch.dtype, at_most_s: float = _AT_MOST_S, clock: Callable[[], float] = time.perf_counter
) -> float:
    """Floating point operations per second in products of a typical layer, the first ones (compilation) left out."""
    rows, inner, columns = SHAPE
    synchronise = torch.mps.synchronize if device == "mps" else _nothing
    left = torch.ones(rows, inner, dtype=dtype, device=device)
    right = torch.ones(inner, columns, dtype=dtype, device=device)

    def compute() -> None:
        for _ in range(_TOGETHER):
            torch.mm(left, right)
        synchronise()

    end = clock() + at_most_s
    compute()
    began, batches = clock(), 0
    while batches == 0 or clock() < end:
        compute()
        batches += 1
    return 2 * rows * inner * columns * _TOGETHER * batches / (clock() - began)


def _nothing() -> None:
    """The CPU has done what it was told when the call returns."""
