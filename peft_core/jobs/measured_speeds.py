"""How fast earlier trainings were: what estimates are based on, where there is something."""

from __future__ import annotations

from collections.abc import Sequence

from peft_core.jobs.state import Job
from peft_core.planning.cost_model import MeasuredRun
from peft_core.schemas.base_model import Base


class MeasuredSpeeds:
    """The speeds of completed jobs of one place, this machine or a cluster, the newest job first."""

    def __init__(self, jobs: Sequence[Job]) -> None:
        self._jobs = jobs

    def of(self, base: Base, device: str) -> float | None:
        """Return the tokens per second of the newest run of the same base model on the same device."""
        for job in self._jobs:
            same_setup = job.device == device and job.request.base.fingerprint.same_weights(base.fingerprint)
            if same_setup and job.metrics and job.metrics.tokens_per_second:
                return job.metrics.tokens_per_second
        return None

    def newest(self, device: str) -> MeasuredRun | None:
        """Return the newest run of any base model on a device."""
        for job in self._jobs:
            if job.device == device and job.metrics and job.metrics.tokens_per_second:
                base = job.request.base
                return MeasuredRun(base.name, base.shape, job.metrics.tokens_per_second)
        return None
