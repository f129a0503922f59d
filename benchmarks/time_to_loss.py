"""Measure when our defaults reach the held-out loss that `transformers.Trainer` + PEFT ends with, and a whole epoch's time.

Trainer's settings: batch 8, rate 2e-4, linear, no warm-up, plain LoRA, one epoch of 1000 examples.

1. The loss to reach: our training worker with Trainer's settings. Its loss and gradients equal those of plain PEFT (there
   is a test for this); the order of the examples differs from Trainer's. `--really` also trains with Trainer itself, and
   shifts the loss to reach by the difference between the two on the whole held-out set.
2. Trainer's time: the epoch's tokens divided by its tokens per second, measured over some steps before and after our runs.
   This extrapolation excludes its start and imports. With `--really` the time is measured.
3. Our time: from the start of the process (including imports, data preparation, conversion and evaluation of the base)
   until the held-out loss is at or below the loss to reach. It is evaluated more often than by default, which costs time
   too. All held-out losses here are those of the same sample, which is evaluated during training.

    python benchmarks/time_to_loss.py [--threads 2] [--steps 6] [--eval-steps 25] [--epochs 1] [--really]
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from contenders import PEER_BATCH, PEER_RATE, RANK, TimedEvent, metrics, pin, run_peer, spread_of, train, workplace

from peft_core.schemas.events import HeldOutMeasured
from peft_core.schemas.training import TrainingConfig

HELD_OUT_FRACTION = 0.13  # leaves 1000 examples to train on
TARGET_RATIO, TARGET_MINUTES = 8.0, 20.0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--steps", type=int, default=6, help="steps of Trainer, measured twice")
    parser.add_argument("--eval-steps", type=int, default=25, help="our steps between two evaluations")
    parser.add_argument(
        "--epochs", type=float, default=1.0, help="our epochs; less than 1 only shows that the script works"
    )
    parser.add_argument("--really", action="store_true", help="train the whole epoch with Trainer (takes an hour)")
    options = parser.parse_args()
    if options.really and options.epochs != 1:
        parser.error("--really compares whole epochs: omit --epochs")
    pin(options.threads)

    defaults = TrainingConfig(
        device="cpu",
        rank=RANK,
        held_out_fraction=HELD_OUT_FRACTION,
        num_epochs=options.epochs,
        eval_steps=options.eval_steps,
    )
    as_trainer = defaults.model_copy(
        update={
            "batch_size": PEER_BATCH,
            "learning_rate": PEER_RATE,
            "lora_plus_ratio": 1.0,
            "warmup_ratio": 0.0,
            "eval_steps": 1_000_000,
            "early_stopping_patience": 100,  # never reached; it makes the run evaluate the sample at the end too
        }
    )
    with workplace(HELD_OUT_FRACTION) as place:
        tokens = round(options.epochs * sum(place.lengths))
        partial_runs = [run_peer("Trainer", place, steps=options.steps, seed=0)]
        ours = train(defaults, place)
        same_settings = train(as_trainer, place)
        partial_runs.append(run_peer("Trainer", place, steps=options.steps, seed=1))
        real = run_peer("Trainer", place, steps=None) if options.really else None

    # 1. The loss to reach.
    goal = sample_losses(same_settings)[-1][1]
    print(f"\nheld-out loss with Trainer's settings, {options.epochs:g} epoch(s): {goal:.3f} on the sample", end="")
    if real is not None:
        whole = metrics(same_settings).adapter_loss or 0.0
        print(f", {whole:.3f} on the whole set; Trainer itself {real['held_out_loss']:.3f} on the whole set", end="")
        goal += real["held_out_loss"] - whole
    print()

    # 2. Trainer's time.
    speeds = [f["tokens"] / f["wall_s"] for f in partial_runs]
    trainer_s = tokens * sum(f["wall_s"] for f in partial_runs) / sum(f["tokens"] for f in partial_runs)
    how = f"extrapolated: {tokens} tokens at {spread_of(speeds, '.1f')} tokens/s"
    if real is not None:
        trainer_s, how = real["wall_s"] * tokens / real["tokens"], f"measured; {how} gives {trainer_s:.0f} s"
    print(f"Trainer's time: {trainer_s:.0f} s ({how})")

    # 3. Ours.
    print("ours, time and held-out loss:", ", ".join(f"{at_s:.0f} s {loss:.3f}" for at_s, loss in sample_losses(ours)))
    reached_s = next((at_s for at_s, loss in sample_losses(ours) if loss <= goal), None)
    whole_s = ours[-1].at_s
    ratio = trainer_s / reached_s if reached_s is not None else 0.0
    reached = "never" if reached_s is None else f"after {reached_s:.0f} s"
    print(f"\nloss {goal:.3f} reached: {reached}; Trainer's time over ours {ratio:.1f} (target {TARGET_RATIO:g})")
    print(
        f"one run of {options.epochs:g} epoch(s): {whole_s / 60:.1f} minutes with {options.threads} thread(s)", end=""
    )
    print(f" (target {TARGET_MINUTES:g})")
    return int(ratio < TARGET_RATIO or whole_s > TARGET_MINUTES * 60)


def sample_losses(seen: Sequence[TimedEvent]) -> list[tuple[float, float]]:
    """Return (seconds since the process was started, loss) for each evaluation of the held-out sample."""
    return [(s.at_s, s.event.loss) for s in seen if isinstance(s.event, HeldOutMeasured) and not s.event.whole_set]


if __name__ == "__main__":
    sys.exit(main())
