"""Simulate a team on a Ray cluster: how long do trainings wait for a GPU, what is stored and sent, and what breaks first?

    python benchmarks/cluster_queue.py [--users 100] [--gpus 8] [--trainings-per-day 2] [--days 20] [--seed 1]

A discrete-event simulation without Ray: each training takes one GPU, and the first that came goes first, as with Ray for tasks
of equal demands. The same arguments give the same figures. Measured inputs are those of README.md and NOTES.md here, and of a
cluster on one machine; what is assumed is marked so.
"""

from __future__ import annotations

import argparse
import heapq
import random
from collections.abc import Iterator
from dataclasses import dataclass
from statistics import mean, quantiles

# --- Measured -------------------------------------------------------------------------------------------------------------
TOKENS_PER_SECOND = 6777  # the bundled base on an H200, batch 4, where the GPU waits for Python
LAYERS_OF_BUNDLED = 30  # each costs the same number of kernel launches, whatever its width
FLOPS_PER_WEIGHT = 4.4  # of a training token, see planning/cost_model.py
TOKENS_PER_EXAMPLE = 235
DATASET_BYTES_PER_TOKEN = 6.7  # a data set on disk
START_S = 15  # of a worker, until it reads data
CHECKPOINT_INTERVAL_S = 60
COPIES_IN_CHECKPOINT = 4  # of the adapter's weights, in float32
CONNECTION_MB = 145  # resident memory of the process that Ray starts on the head node for each bridge
COORDINATOR_MB = 240  # of the actor on the head node, with a checkpoint of the bundled base mapped

# --- Assumed --------------------------------------------------------------------------------------------------------------
WORKDAY_H = 8  # all trainings are started in these hours of a day
MEDIAN_TOKENS, SIGMA = 275_000, 1.0  # of a training: 1170 functions; log-normal
MAX_TRAINING_S = 7200  # the planner's default for the number of steps
USABLE_FLOPS = 200e12  # of a GPU, of the largest that is useful in training
LOAD_BYTES_PER_SECOND = 1e9  # of a base model, from the node's disk
EVALUATION_S = 60  # before and after the training
CLOSED = 0.2  # share of the trainings whose laptop is closed when they end, until the next morning
HEAD_MEMORY_GB, HEAD_NETWORK_GBIT = 64, 10
OBJECT_STORE_SHARE = 0.3  # of the memory: Ray's default; what is beyond it is moved to disk


@dataclass(frozen=True)
class Kind:
    """A base model, and how often it is trained on."""

    name: str
    weights: float
    layers: int
    adapter_weights: float  # rank 16 on all linear layers
    share: float  # assumed
    base_bytes: float

    @property
    def tokens_per_second(self) -> float:
        launches = TOKENS_PER_SECOND * LAYERS_OF_BUNDLED / self.layers
        return min(launches, USABLE_FLOPS / (FLOPS_PER_WEIGHT * self.weights))

    @property
    def checkpoint_bytes(self) -> float:
        return 4 * COPIES_IN_CHECKPOINT * self.adapter_weights


KINDS = (
    Kind("SmolLM2-135M", 0.135e9, 30, 4.9e6, 0.6, 0.14e9),
    Kind("Qwen2.5-Coder-1.5B", 1.54e9, 28, 18.5e6, 0.3, 3.1e9),
    Kind("Qwen2.5-Coder-7B", 7.61e9, 28, 40.4e6, 0.1, 15.2e9),
)


@dataclass(frozen=True)
class Training:
    submitted_s: float
    run_s: float
    kind: Kind
    dataset_bytes: float
    collected_after_s: float  # from its end until the laptop fetches the adapter


@dataclass(frozen=True)
class Outcome:
    training: Training
    begins_s: float

    @property
    def wait_s(self) -> float:
        return self.begins_s - self.training.submitted_s

    @property
    def ends_s(self) -> float:
        return self.begins_s + self.training.run_s

    @property
    def sent_bytes(self) -> float:
        """To and from the head node: the data set twice, each checkpoint twice, and the adapter twice."""
        checkpoints = 1 + self.training.run_s // CHECKPOINT_INTERVAL_S
        adapter = 4 * self.training.kind.adapter_weights
        return 2 * (self.training.dataset_bytes + checkpoints * self.training.kind.checkpoint_bytes + adapter)

    def stored(self) -> Iterator[tuple[float, float, float]]:
        """Yield (begin, end, bytes) of what the coordinator keeps: the data set, then a checkpoint, and at last the adapter."""
        kind, until = self.training.kind, self.ends_s + self.training.collected_after_s
        yield self.training.submitted_s, until, self.training.dataset_bytes
        yield self.begins_s, until, kind.checkpoint_bytes
        yield self.ends_s, until, 4 * kind.adapter_weights


def submit(users: int, per_day: float, days: int, seed: int) -> Iterator[Training]:
    """Yield the trainings in the order in which they are submitted: a Poisson process within working hours."""
    draw = random.Random(seed)  # noqa: S311 -- not for secrets
    rate = users * per_day / (WORKDAY_H * 3600)
    for day in range(days):
        at = draw.expovariate(rate)
        while at < WORKDAY_H * 3600:
            kind = draw.choices(KINDS, [each.share for each in KINDS])[0]
            tokens = draw.lognormvariate(0, SIGMA) * MEDIAN_TOKENS
            training_s = min(MAX_TRAINING_S, tokens / kind.tokens_per_second)
            run_s = START_S + kind.base_bytes / LOAD_BYTES_PER_SECOND + training_s + EVALUATION_S
            closed = draw.random() < CLOSED
            morning = (24 - WORKDAY_H / 2) * 3600 if closed else 0.0
            yield Training(day * 86_400 + at, run_s, kind, tokens * DATASET_BYTES_PER_TOKEN, morning)
            at += draw.expovariate(rate)


def run(trainings: Iterator[Training], gpus: int) -> list[Outcome]:
    """Give each training in turn the GPU that is free first."""
    free_at = [0.0] * gpus
    outcomes = []
    for training in trainings:
        begins = max(training.submitted_s, heapq.heappop(free_at))
        heapq.heappush(free_at, begins + training.run_s)
        outcomes.append(Outcome(training, begins))
    return outcomes


def most_at_a_time(intervals: Iterator[tuple[float, float, float]]) -> float:
    """Return the largest sum of the weights of intervals (begin, end, weight) that overlap."""
    changes = sorted(change for begin, end, weight in intervals for change in ((begin, 1, weight), (end, 0, -weight)))
    total = largest = 0.0
    for _, _, weight in changes:
        total += weight
        largest = max(largest, total)
    return largest


def report(outcomes: list[Outcome], gpus: int, days: int) -> None:
    waits = [outcome.wait_s for outcome in outcomes]
    runs = [outcome.training.run_s for outcome in outcomes]
    # A coordinator lives from the submission until the adapter is fetched, a connection until the training ends.
    jobs = most_at_a_time(
        (each.training.submitted_s, each.ends_s + each.training.collected_after_s, 1.0) for each in outcomes
    )
    connections = most_at_a_time((each.training.submitted_s, each.ends_s, 1.0) for each in outcomes)
    stored = most_at_a_time(interval for each in outcomes for interval in each.stored())
    last_bases = max(each.base_bytes for each in KINDS)
    sent = sum(outcome.sent_bytes for outcome in outcomes)
    busiest = gpus * max(2 * each.checkpoint_bytes / CHECKPOINT_INTERVAL_S for each in KINDS)
    head_gb = (jobs * COORDINATOR_MB + connections * CONNECTION_MB) / 1e3
    wait = quantiles(waits, n=100)
    print(
        f"{len(outcomes)} trainings, each {mean(runs) / 60:.1f} min on average; GPUs in use "
        f"{100 * sum(runs) / (gpus * days * WORKDAY_H * 3600):.0f} % of the working hours"
    )
    print(
        f"wait for a GPU: {100 * sum(each > 0 for each in waits) / len(waits):.0f} % wait; median {wait[49] / 60:.1f} min, "
        f"95 % {wait[94] / 60:.1f} min, longest {max(waits) / 60:.0f} min"
    )
    print(f"jobs on the cluster at a time: {jobs:.0f}, of which {connections:.0f} are followed")
    print(
        f"processes on the head node: {head_gb:.1f} of {HEAD_MEMORY_GB} GB ({jobs:.0f} coordinators, {connections:.0f} "
        "connections)"
    )
    print(
        f"object store of the head node: {stored / 1e9:.1f} GB of jobs, and {last_bases / 1e9:.1f} GB while the largest base "
        f"model is sent; {OBJECT_STORE_SHARE * HEAD_MEMORY_GB:.0f} GB are in memory"
    )
    print(
        f"network of the head node: {sent / days / 1e9:.0f} GB a day; at most {8 * busiest / 1e9:.2f} Gbit/s of "
        f"{HEAD_NETWORK_GBIT} for checkpoints"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--users", type=int, default=100)
    parser.add_argument("--gpus", type=int, default=8)
    parser.add_argument("--trainings-per-day", type=float, default=2.0, help="of each user")
    parser.add_argument("--days", type=int, default=20)
    parser.add_argument("--seed", type=int, default=1)
    given = parser.parse_args()
    trainings = submit(given.users, given.trainings_per_day, given.days, given.seed)
    report(run(trainings, given.gpus), given.gpus, given.days)


if __name__ == "__main__":
    main()
