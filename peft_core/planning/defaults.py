"""Choice of the training settings that a request leaves open: duration, LoRA rank, learning rate.

Sources of the constants:

- Minimum size: Codebase Gardener trains on at least 50 units. A held-out tenth of fewer is too small to show a gain.
- Epochs: a second pass makes more lines right, a third one makes the model forget (benchmarks/NOTES.md, "Passes over the
  data"). Three passes over very little code are a rule of thumb. Half an hour is what a better adapter is worth by default;
  two hours is what a user who set no duration may be made to wait.
- Rank: the arithmetic of "LoRA Without Regret" (Schulman et al., Thinking Machines Lab, 2025): a weight stores about two bits,
  and a token of code that the base model half knows has about one to teach.
- Learning rate: measured on the bundled base model (benchmarks/recipes.py). Other sizes follow the rule of the same article:
  proportional to hidden_size^-p, with p = 0.781 for Llama and 0.0775 for Qwen. The larger p is used for all families, because
  too low a rate learns a little less and too high a rate harms; for the same reason, smaller base models get no higher rate.
  It grows with the square root of the batch size, as usual for Adam (Malladi et al., arXiv 2205.10287).
- Catching up: the share of examples keeps a training that continues from an adapter within a third of the time of one from
  scratch. Half of the learning rate, and a quarter of known code in a limited run, were as good as other values or better when
  the weights are averaged with those of the parent (benchmarks/README.md).
"""

from __future__ import annotations

from peft_core.data.catch_up import MIN_REPLAYED
from peft_core.errors import DataError, InvalidArgument
from peft_core.planning.cost_model import TOKENS_PER_EXAMPLE, lora_parameters, steps_of, training_set
from peft_core.schemas.base_model import ModelShape
from peft_core.schemas.counts import counted
from peft_core.schemas.dataset import CatchUpSpec, SourceSummary, TrainingSetSize
from peft_core.schemas.training import TrainingConfig

MIN_UNITS = 50
FEW_STEPS = 60  # an epoch of fewer steps is made twice
VERY_FEW_STEPS = 25  # an epoch of fewer steps is made three times
TWO_EPOCHS_S = 30 * 60.0  # any epoch is made twice if that takes no longer
DEFAULT_MAX_RUN_S = 2 * 3600.0
RANKS = (16, 32, 64)
TOKENS_PER_WEIGHT = 2.0
MEASURED_RATE = 1e-3  # of LoRA A, at the hidden size and batch size below
_MEASURED_HIDDEN_SIZE = 576
_MEASURED_BATCH = 4
_RATE_EXPONENT = 0.781
CATCH_UP_TIME = 0.2  # of the examples of a training from scratch
CATCH_UP_RATE = 0.5  # of the learning rate: the weights are near a minimum, and large steps would leave it
REPLAY_SHARE = 1.0  # tokens of known code for each token of changed code
_EPOCHS = {1: "One epoch", 2: "Two epochs", 3: "Three epochs"}


def choose_defaults(
    config: TrainingConfig,
    shape: ModelShape,
    source: SourceSummary,
    tokens_per_second: float | None,
    *,
    most_steps: int | None = None,
) -> tuple[TrainingConfig, str]:
    """Return the complete settings, and one sentence on each of duration and rank that was chosen here.

    `most_steps` limits a duration that is chosen here: the setting max_training_steps.

    Raises:
        DataError: 'too_little_data', unless the request allows it.
    """
    units = count_units(source)
    if units < MIN_UNITS and not config.allow_little_data:
        raise too_little(units, source)
    train = training_set(source, config.held_out_fraction)
    is_open = config.num_epochs is None and config.max_steps is None
    config, duration = _with_duration(config, train, tokens_per_second)
    steps = config.max_steps or steps_of(train.examples, config.num_epochs or 1, config.batch_size)
    if is_open and most_steps is not None and steps > most_steps:
        config = config.model_copy(update={"max_steps": most_steps, "num_epochs": None})
        duration = f"{counted(most_steps, 'step')}, by the setting max_training_steps."
    config, rank = _with_rank(config, shape, train)
    if config.learning_rate is None:
        rate = default_learning_rate(shape.hidden_size, config.batch_size)
        config = config.model_copy(update={"learning_rate": rate})
    return config, " ".join(filter(None, [duration, rank]))


def choose_catch_up(
    given: TrainingConfig,
    full: TrainingConfig,
    source: SourceSummary,
    changed: int,
    *,
    most_steps: int | None = None,
) -> tuple[TrainingConfig, CatchUpSpec, SourceSummary, str]:
    """Return the settings of a training that continues from an adapter, what it trains on, and the source reduced to that.

    The last result is a sentence on `most_steps`, if it limits the training.

    Args:
        given: The settings of the request, with what the adapter determines.
        full: The same, completed for a training from scratch.
        source: What the sources hold.
        changed: How many units and records may have changed since the adapter was trained.
        most_steps: Limits a duration that is chosen here: the setting max_training_steps.
    """
    config, limit, reason = full, None, ""
    train = training_set(source, given.held_out_fraction)
    if given.num_epochs is None and given.max_steps is None:
        limit = max(MIN_UNITS, round(_full_examples(full, train) * CATCH_UP_TIME))
        if most_steps is not None and most_steps * full.batch_size < limit:
            limit = most_steps * full.batch_size
            reason = f"At most {counted(most_steps, 'step')}, by the setting max_training_steps."
        config = config.model_copy(update={"num_epochs": 1.0, "max_steps": None})
    if given.learning_rate is None:
        config = config.model_copy(update={"learning_rate": float(f"{(full.learning_rate or 0) * CATCH_UP_RATE:.2g}")})
    changed = min(train.examples, changed)
    replayed = max(MIN_REPLAYED, round(changed * REPLAY_SHARE))
    examples = max(1, min(changed + replayed, train.examples, limit or train.examples))
    reduced = TrainingSetSize(examples=examples, tokens=max(1, round(train.tokens / train.examples * examples)))
    spec = CatchUpSpec(replay_share=REPLAY_SHARE, max_examples=limit)
    return config, spec, source.model_copy(update={"training_set": reduced, "cut_records": 0}), reason


def _full_examples(full: TrainingConfig, train: TrainingSetSize) -> float:
    """Return how many examples a training from scratch sees, counting repeated ones."""
    if full.max_steps is not None:
        return full.max_steps * full.batch_size
    return (full.num_epochs or 1.0) * train.examples


def require_complete(config: TrainingConfig) -> None:
    """Check that nothing is left to choose: a worker computes what was planned, and chooses nothing itself.

    Raises:
        InvalidArgument: the task was not made by the planner.
    """
    missing = [name for name in ("rank", "learning_rate") if getattr(config, name) is None]
    if config.num_epochs is None and config.max_steps is None:
        missing.append("num_epochs")
    if missing:
        raise InvalidArgument(
            f"request.config.{missing[0]}",
            None,
            "it must be set in a training task; train_adapter chooses it when it queues the job",
            suggestions=["Start from the task.json of a queued job"],
        )


def count_units(source: SourceSummary) -> int:
    """Return how many functions, methods and classes, and records, a source holds."""
    counts = [count for count in (source.units, source.examples) if count is not None]
    return sum(counts) if counts else round(source.estimated_tokens / TOKENS_PER_EXAMPLE)


def too_little(units: int, source: SourceSummary, minimum: int | None = None) -> DataError:
    """Return the error for a source with too few units. `minimum`: the request's own limit, instead of `MIN_UNITS`."""
    way_out = "set config.allow_little_data = true" if minimum is None else "lower config.min_training_chunks"
    noun, more = (
        "units (functions, methods and classes)",
        "Give more code: a directory further up, or the whole repository",
    )
    if source.examples is not None and source.units is not None:
        noun = "records and units (functions, methods and classes)"
    elif source.examples is not None:
        noun, more = "records", "Give more records"
    return DataError(
        f"Too little data: {source.path or 'training_data'} holds {units} {noun}, about {source.estimated_tokens} tokens; "
        f"at least {minimum or MIN_UNITS} are needed for an adapter that generalises instead of memorising. Retrieval, that "
        "is letting the assistant read these files, works better here.",
        code="too_little_data",
        suggestions=(
            *(source.advice or (more,)),
            f"Or {way_out} to train anyway",
        ),
        details={"units": units, "needed": minimum or MIN_UNITS, "estimated_tokens": source.estimated_tokens},
    )


def _with_duration(
    config: TrainingConfig, train: TrainingSetSize, tokens_per_second: float | None
) -> tuple[TrainingConfig, str]:
    if config.num_epochs is not None or config.max_steps is not None:
        return config, ""
    steps = steps_of(train.examples, 1, config.batch_size)
    epoch_s = train.tokens / tokens_per_second if tokens_per_second else 0.0
    suited = _suited_epochs(steps, epoch_s)
    limit = f"the default limit is {_hours(DEFAULT_MAX_RUN_S)}"
    if epoch_s > DEFAULT_MAX_RUN_S:
        affordable = max(1, int(steps * DEFAULT_MAX_RUN_S / epoch_s))
        return config.model_copy(update={"max_steps": affordable}), (
            f"{affordable} of the {steps} steps of an epoch, because a full epoch would take about {_hours(epoch_s)} and "
            f"{limit}; set num_epochs = 1 for all of them."
        )
    epochs = next(count for count in range(suited, 0, -1) if count * epoch_s <= DEFAULT_MAX_RUN_S)
    examples = f"about {train.examples} examples make"
    if steps < FEW_STEPS:
        reason = f"{_EPOCHS[epochs]}, because {examples} only {steps} steps each"
    elif epochs > 1:
        reason = (
            f"{_EPOCHS[epochs]}, which take less than {TWO_EPOCHS_S / 60:.0f} minutes: {examples} {steps} steps each"
        )
    else:
        reason = f"One epoch, because {examples} {steps} steps"
    if epochs < suited:
        reason += f"; {_EPOCHS[suited].lower()} would take about {_hours(suited * epoch_s)} and {limit}"
    return config.model_copy(update={"num_epochs": float(epochs)}), f"{reason}."


def _suited_epochs(steps: int, epoch_s: float) -> int:
    """Return how often to go over the data. `steps` and `epoch_s`: of an epoch; 0 seconds: its time is not known."""
    if steps < VERY_FEW_STEPS:
        return 3
    return 2 if steps < FEW_STEPS or 0 < 2 * epoch_s <= TWO_EPOCHS_S else 1


def _with_rank(config: TrainingConfig, shape: ModelShape, train: TrainingSetSize) -> tuple[TrainingConfig, str]:
    if config.rank is not None:
        return config, ""
    if config.target_modules != "all-linear":  # the capacity of a selection of modules is not known here
        return config.model_copy(update={"rank": RANKS[0]}), ""
    share = 1.0
    if config.max_steps is not None:
        share = min(1.0, config.max_steps * config.batch_size / train.examples)
    distinct = train.tokens * share  # further epochs repeat the same tokens
    sufficient = [rank for rank in RANKS if lora_parameters(rank, shape) * TOKENS_PER_WEIGHT >= distinct]
    rank = sufficient[0] if sufficient else RANKS[-1]
    weights = f"{lora_parameters(rank, shape) / 1e6:.1f} million weights"
    reason = (
        f"because its {weights} can store what {_rounded(distinct)} tokens teach"
        if sufficient
        else f"the highest that is chosen automatically: its {weights} store part of what {_rounded(distinct)} tokens teach"
    )
    return config.model_copy(update={"rank": rank}), f"Rank {rank}, {reason}."


def default_learning_rate(hidden_size: int, batch_size: int) -> float:
    """Return the peak rate of LoRA A, to two digits."""
    by_size = min(1.0, (_MEASURED_HIDDEN_SIZE / hidden_size) ** _RATE_EXPONENT)
    by_batch = (batch_size / _MEASURED_BATCH) ** 0.5
    return float(f"{MEASURED_RATE * by_size * by_batch:.2g}")


def _hours(seconds: float) -> str:
    hours = seconds / 3600
    return f"{hours:.1f} hours" if hours < 10 and round(hours, 1) % 1 else f"{hours:.0f} hours"


def _rounded(tokens: float) -> str:
    return f"{tokens / 1e6:.1f} million" if tokens >= 1e6 else f"{max(1, round(tokens / 1e3))} thousand"
