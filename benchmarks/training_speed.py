"""Compare our training with `transformers.Trainer` + PEFT and with TRL: real tokens per CPU-second, and peak memory.

All use the same base, examples and LoRA (rank 16 on all linear layers). Ours is the product's own worker process, planned
as the manager plans a job, with default settings (batch 4). Peers use batches of 8, chosen to represent short and long
batches of an epoch. All are pinned to `--threads` cores and alternate, so that other work on the machine disturbs all of
them; ratios are taken within a round. CPU-seconds are those of the optimiser steps without the first. Padding tokens do not
count. Peak memory is that of the process since it started; for ours this includes converting the base, as in a user's
first job.

"GEMM" only multiplies the base's matrices with 512 tokens, forward and for the gradient of the input: the speed of a
training without any other work. "lean" is ours with the smallest `max_memory_mb` that the planner accepts. The TRL rows
need `make peers`.

    python benchmarks/training_speed.py [--steps 6] [--repeats 3] [--threads 1] [--only peft-mcp Trainer …]
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from statistics import median

from contenders import (
    PEER_BATCH,
    RANK,
    TRL_PYTHON,
    Workplace,
    linears,
    metrics,
    pin,
    run_peer,
    smallest_limit_mb,
    spread_of,
    tokens_per_cpu_s,
    train,
    workplace,
)
from peers import PEERS, Figures

from peft_core.planning.cost_model import lora_parameters
from peft_core.schemas.training import TrainingConfig

OURS, LEAN = "peft-mcp", "peft-mcp, lean"
SPEED_TARGETS = {"Trainer": 3.0, "Trainer, group_by_length": 1.4, "TRL": 4.0, "TRL, packing": 2.0}
MEMORY_TARGETS = {OURS: 1.4, LEAN: 0.9}  # GB
CONFIG = TrainingConfig(device="cpu", rank=RANK, held_out_fraction=0.02)  # small, because evaluation is not timed here

Results = dict[str, list[Figures]]  # by contender, one entry per round


@dataclass(frozen=True)
class Target:
    what: str
    values: list[float]
    limit: float
    at_least: bool = True

    @property
    def met(self) -> bool:
        return median(self.values) >= self.limit if self.at_least else max(self.values) <= self.limit


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=6, help=f"measured steps of {PEER_BATCH} examples each")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--only", nargs="+", choices=[OURS, LEAN, *PEERS], help="default: all")
    options = parser.parse_args()
    pin(options.threads)
    names = [name for name in options.only or (OURS, LEAN, *PEERS) if is_installed(name)]
    with workplace(CONFIG.held_out_fraction) as place:
        contenders = {name: contender(name, place, options.steps) for name in names}
        results: Results = {name: [] for name in names}
        for number in range(options.repeats):
            for name in names if number % 2 == 0 else names[::-1]:
                results[name].append(contenders[name](number))
                print(f"# {name}: {results[name][-1]}", file=sys.stderr, flush=True)
        flops = flops_per_token(place)
    print(f"\n{options.repeats} x {options.steps} steps of {PEER_BATCH} examples, {options.threads} thread(s)\n")
    return report(results, flops)


def is_installed(name: str) -> bool:
    if name.startswith("TRL") and not TRL_PYTHON.exists():
        print(f"# {name}: skipped, TRL is not installed ({TRL_PYTHON} is missing); `make peers` installs it")
        return False
    return True


def contender(name: str, place: Workplace, steps: int) -> Callable[[int], Figures]:
    """Return a function that runs the contender once, given the number of the round."""
    if name not in (OURS, LEAN):
        return lambda number: run_peer(name, place, steps=steps, seed=number)  # padding differs from round to round
    all_steps = -(-(1 + steps) * PEER_BATCH // CONFIG.batch_size)  # as many examples
    config = CONFIG.model_copy(update={"max_steps": all_steps, "eval_steps": all_steps})
    if name == LEAN:
        limit_mb = smallest_limit_mb(config, place)
        print(f"# {LEAN}: max_memory_mb = {limit_mb}")
        config = config.model_copy(update={"max_memory_mb": limit_mb})
    return lambda _number: ours(config, place)


def ours(config: TrainingConfig, place: Workplace) -> Figures:
    seen = train(config, place)
    return {"tokens_per_cpu_s": tokens_per_cpu_s(seen), "peak_gb": (metrics(seen).peak_memory_bytes or 0) / 1e9}


def flops_per_token(place: Workplace) -> float:
    """Return the useful flops of a training step per token; recomputation does not count.

    Frozen weights: 2 forward, 2 for the gradient of the input. LoRA weights: 2 more for their own gradient. Attention: a
    token at position t attends to t keys, on average half its document's length: 4 flops per key and hidden unit forward
    (query x key, weight x value), and twice that backward.
    """
    shape = place.base.shape
    frozen = sum(count * inputs * outputs for count, inputs, outputs in linears(shape))
    keys = sum(length * length / 2 for length in place.lengths) / sum(place.lengths)
    return 4 * frozen + 6 * lora_parameters(CONFIG.lora_rank, shape) + 12 * keys * shape.hidden_size * shape.layers


def report(results: Results, flops: float) -> int:
    """Print the tables; return 1 if a target is missed."""
    rates = {name: [rate(f) for f in runs] for name, runs in results.items() if name != "GEMM"}
    print(f"| {'':24} | {'tokens / CPU-s':>18} | {'peak memory':>11} |\n|{'-' * 26}|{'-' * 20}|{'-' * 13}|")
    for name, values in rates.items():
        print(f"| {name:24} | {spread_of(values, '.1f'):>18} | {max(f['peak_gb'] for f in results[name]):8.2f} GB |")
    for dtype in ("float32", "bfloat16") if "GEMM" in results else ():
        gigaflops = [f[f"{dtype}_flops"] / 1e9 for f in results["GEMM"]]
        print(
            f"| {'GEMM, ' + dtype:24} | {spread_of(gigaflops, '.0f'):>18} GFLOP / CPU-s; {flops / 1e9:.3f} GFLOP per token"
        )
    print()
    targets = list(targets_of(results, rates, flops))
    for target in targets:
        sign, word = ("≥" if target.at_least else "≤"), ("met" if target.met else "MISSED")
        print(f"| {target.what:44} | {spread_of(target.values, '.2f'):>18} | {sign} {target.limit:<4} | {word} |")
    return int(not all(target.met for target in targets))


def rate(figures: Figures) -> float:
    """Return tokens per CPU-second."""
    return figures["tokens_per_cpu_s"] if "tokens_per_cpu_s" in figures else figures["tokens"] / figures["cpu_s"]


def targets_of(results: Results, rates: dict[str, list[float]], flops: float) -> Iterator[Target]:
    """Yield the targets whose contenders took part."""
    if OURS in rates:
        for peer, limit in SPEED_TARGETS.items():
            if peer in rates:
                yield Target(
                    f"speed: over {peer}", [a / b for a, b in zip(rates[OURS], rates[peer], strict=True)], limit
                )
        if "GEMM" in results:
            gemm_rates = [f["float32_flops"] for f in results["GEMM"]]
            shares = [a * flops / gemm for a, gemm in zip(rates[OURS], gemm_rates, strict=True)]
            yield Target("speed: share of the float32 GEMM rate", shares, 0.62)
    for name, limit in MEMORY_TARGETS.items():
        if name in results:
            yield Target(f"peak memory, GB: {name}", [f["peak_gb"] for f in results[name]], limit, at_least=False)


if __name__ == "__main__":
    sys.exit(main())
