"""When a job that started by itself may run. Pure: measurements and times come in as arguments.

It begins once the machine has been free for a while, and is paused when others need it. The limit on the load for the
beginning is half of the limit for the pause, and both must hold for some time, so that it does not alternate.
"""

from __future__ import annotations

from dataclasses import dataclass

from peft_core.config import Settings
from peft_core.system.machine_use import MachineUse

BUSY_S = 30.0  # how long the load must exceed the limit before a running job is paused


@dataclass(frozen=True)
class Limits:
    """What counts as free."""

    max_load: float = 0.3  # share of the processors that others may use while the job runs; 1: it does not matter
    on_battery: bool = False
    quiet_s: float = 60.0  # how long the machine must have been free before the job begins, or continues

    @classmethod
    def of(cls, settings: Settings) -> Limits:
        return cls(settings.refresh_max_load / 100, settings.refresh_on_battery, settings.refresh_quiet_s)


class FreeMachine:
    """Remembers since when the machine has been free or busy."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._free_since: float | None = None
        self._busy_since: float | None = None

    def why_wait(self, use: MachineUse, now: float, *, needed_bytes: int = 0) -> str:
        """Return why a job may not begin yet; "" if it may. `now`: seconds of a clock that never jumps."""
        self._busy_since = None
        obstacle = self._claimed(use)
        if not obstacle and self._limits.max_load < 1:
            is_measured = use.load is not None
            obstacle = (
                _overload(use, self._limits.max_load / 2)
                if is_measured
                else "the load of the machine is being measured"
            )
        if use.available_bytes < needed_bytes:
            obstacle = obstacle or f"it needs about {needed_bytes / 1e9:.1f} GB of memory, which other programs use"
        if obstacle:
            self._free_since = None
            return obstacle
        if self._free_since is None:
            self._free_since = now
        if now - self._free_since < self._limits.quiet_s:
            return self.settling
        return ""

    @property
    def settling(self) -> str:
        """The reason to wait while nothing else is one."""
        return f"the machine must have been free for {self._limits.quiet_s:g} s"

    def why_pause(self, use: MachineUse, now: float) -> str:
        """Return why a running job must be paused; "" if it may continue."""
        self._free_since = None
        overload = _overload(use, self._limits.max_load)
        if not overload:
            self._busy_since = None
        elif self._busy_since is None:
            self._busy_since = now
        is_lasting = self._busy_since is not None and now - self._busy_since >= BUSY_S
        return self._claimed(use) or (overload if is_lasting else "")

    def _claimed(self, use: MachineUse) -> str:
        """Return what asks for the machine whatever its load is."""
        if use.on_battery and not self._limits.on_battery:
            return "the machine runs on its battery"
        if use.model_idle_s is not None and use.model_idle_s <= self._limits.quiet_s:
            return "a loaded model is in use"
        return ""


def _overload(use: MachineUse, max_load: float) -> str:
    if use.load is None or use.load <= max_load:
        return ""
    return f"other programs use more than {100 * max_load:g} % of the processors"
