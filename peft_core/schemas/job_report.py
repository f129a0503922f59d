"""What a job has recorded beyond its status: too much for an assistant, but not for a page that draws it."""

from __future__ import annotations

from peft_core.schemas.evaluation import ComparedCompletion, Continuation
from peft_core.schemas.frozen import FrozenModel
from peft_core.schemas.results import TrainingStatus

Points = tuple[tuple[int, float], ...]  # (step, nats per token)


class JobReport(FrozenModel):
    """A job's status, loss curve and what the evaluation found. They are empty until they are known."""

    status: TrainingStatus
    steps: Points = ()
    smooth: Points = ()  # a moving average of `steps`
    held_out: Points = ()  # on the sample that is evaluated during training
    whole: Points = ()  # on all held-out examples: of the base model at step 0, and of the adapter at the step of its weights
    caveats: tuple[str, ...] = ()  # sentences that qualify the verdict
    gains: tuple[Continuation, ...] = ()
    losses: tuple[Continuation, ...] = ()
    differences: tuple[ComparedCompletion, ...] = ()  # of two adapters
