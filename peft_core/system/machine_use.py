"""How much of this machine others use at the moment: processors, memory, the battery, and models that answer requests."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from peft_core.schemas.frozen import FrozenModel
from peft_core.system.activity import idle_seconds
from peft_core.system.machine import available_memory_bytes


class MachineUse(FrozenModel):
    """One measurement."""

    load: float | None  # share of all processors that other programs use, 0 to 1; None: not known yet
    on_battery: bool = False
    model_idle_s: float | None = None  # since a model of this data directory answered a request; None: none ever did
    available_bytes: int = 1 << 62  # of memory


Measure = Callable[[], MachineUse]


class MachineMeter:
    """Measures with psutil. `model_activity`: the file that says when a model was used, see `activity`."""

    def __init__(self, model_activity: Path) -> None:
        self._model_activity = model_activity
        self._before: tuple[float, float, float] | None = None

    def __call__(self) -> MachineUse:
        """Measure; the load is that since the previous call."""
        import psutil  # noqa: PLC0415 -- not at the server's start

        battery = psutil.sensors_battery() if hasattr(psutil, "sensors_battery") else None
        return MachineUse(
            load=self._load(),
            on_battery=battery is not None and battery.power_plugged is False,
            model_idle_s=idle_seconds(self._model_activity, time.time()),
            available_bytes=available_memory_bytes(),
        )

    def _load(self) -> float | None:
        now = (*_processor_seconds(), _own_seconds())
        before, self._before = self._before, now
        if before is None or now[0] <= before[0]:
            return None
        total, busy, own = (new - old for new, old in zip(now, before, strict=True))
        # Processes of ours that ended since the previous call are missing in `own`, which can only raise the result.
        return min(1.0, max(0.0, (busy - max(0.0, own)) / total))


def _processor_seconds() -> tuple[float, float]:
    """Return the seconds of all processors since the machine started: (all, busy)."""
    import psutil  # noqa: PLC0415 -- as above

    times = psutil.cpu_times()
    guests = getattr(times, "guest", 0.0) + getattr(times, "guest_nice", 0.0)  # they are part of user and nice
    total = sum(times) - guests
    return total, total - times.idle - getattr(times, "iowait", 0.0)


def _own_seconds() -> float:
    """Return the processor time of this process and its descendants."""
    import psutil  # noqa: PLC0415 -- as above

    own = psutil.Process()
    seconds = 0.0
    for process in (own, *own.children(recursive=True)):
        with suppress(psutil.Error):  # it ended meanwhile
            seconds += sum(process.cpu_times()[:4])  # user, system, and of children that have ended
    return seconds
