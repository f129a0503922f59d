"""Which events of a run on the cluster become events of the job."""

from __future__ import annotations

from typing import get_args

from peft_core.cluster.attachment import _FROM_A_RUN
from peft_core.schemas.events import AdaptersCompared, Event, JobFailed


def test_every_event_of_a_training_may_come_from_the_cluster_and_none_that_the_runner_writes() -> None:
    union, _ = get_args(Event)
    of_the_runner = {kind for kind in get_args(union) if kind.__name__.startswith("Job")} - {JobFailed}
    assert set(_FROM_A_RUN) == set(get_args(union)) - of_the_runner - {AdaptersCompared}
