"""Of a Mac's GPU and CPU both are timed; what cannot run here is imitated."""

from __future__ import annotations

import pytest
import torch

from peft_core.modeling import device as speed
from peft_core.modeling.device import Machine, flops, timed

MAC = Machine(mps=True, mps_bfloat16=True)


def test_the_cpu_is_timed_and_not_for_long() -> None:
    times = iter(range(1000))
    # It warms up until second 1, sees at 4 that time is over, and asks for the time once more: three batches in four.
    counted = flops("cpu", torch.float32, at_most_s=3.5, clock=lambda: float(next(times)))
    assert counted == pytest.approx(2 * 512 * 576 * 1536 * 8 * 3 / 4)
    assert 1e8 < flops("cpu", torch.float32, at_most_s=0.05) < 1e15


def test_both_are_timed_in_the_formats_that_they_would_compute_in(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def pretend(device: str, dtype: torch.dtype) -> float:
        asked.append((device, dtype))
        return {"mps": 2.4e12, "cpu": 1.1e12}[device]

    monkeypatch.setattr(speed, "flops", pretend)
    machine = timed("auto", MAC)
    assert asked == [("mps", torch.bfloat16), ("cpu", torch.float32)]
    assert (machine.mps_flops, machine.cpu_flops) == (2.4e12, 1.1e12)
    timed("auto", MAC, "float32")
    assert asked[2:] == [("mps", torch.float32), ("cpu", torch.float32)]


@pytest.mark.parametrize(
    ("requested", "machine"),
    [("mps", MAC), ("cpu", MAC), ("auto", Machine()), ("auto", Machine(cuda=True, cuda_bfloat16=True))],
)
def test_nothing_is_timed_where_there_is_nothing_to_choose(
    requested: str,
    machine: Machine,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(speed, "flops", lambda *_: pytest.fail("timed"))
    assert timed(requested, machine) is machine
