"""How much an evaluation reads and writes besides the held-out examples: in proportion to the training or the held-out text.

The unit is a token that one model reads or writes. Two models are measured, and training on a token costs as much as reading
three.
"""

from __future__ import annotations

from dataclasses import dataclass

_MIN_TOKENS = 1200  # fewer say nothing
# Windows of whole files give about a line for each 25 tokens, so a thousand lines at most, whose share of exact ones is known
# to a few points. More lines would narrow the interval little, because lines of a file resemble each other.
_MAX_TOKENS = 30_000
_SHARE_OF_COMPLETIONS, _MAX_COMPLETION_TOKENS = 0.4, 5600  # 16 prompts
# After a training, these and the positions for retrieval take a tenth of its time each.
_SHARE_OF_TRAINED_TOKENS = 0.1 * 3 / 2
# After an evaluation that was asked for, figures are all that is waited for, and ten positions show a large difference only.
_MORE_POSITIONS, _MAX_POSITION_TOKENS = 4, 56_000
# Both models repeat training text. With the bundled base on one CPU core, a written token costs up to three trained ones,
# because each step reads all weights for eight tokens; a read token costs less than half of a trained one.
MEMORISED_TOKENS, MEMORY_PROMPT_TOKENS = 50, 64
_MEMORISATION_WORK = 2 * (3 * MEMORISED_TOKENS + MEMORY_PROMPT_TOKENS / 2)  # of a prompt, in tokens of training
_SHARE_OF_MEMORISATION, _MAX_MEMORISATION_PROMPTS = 0.03, 48


@dataclass(frozen=True)
class EvaluationBudget:
    """Tokens that each model reads and writes besides the held-out examples."""

    windows: int  # of whole held-out files
    completions: int
    positions: int  # with and without retrieved code
    memorisation_prompts: int = 0

    @property
    def tokens(self) -> int:
        return self.windows + self.completions + self.positions

    @property
    def memorisation_work(self) -> float:
        """The work of measuring memorisation, in tokens of training."""
        return self.memorisation_prompts * _MEMORISATION_WORK


def budget_after_training(trained_tokens: float) -> EvaluationBudget:
    tokens = _useful(_SHARE_OF_TRAINED_TOKENS * trained_tokens)
    prompts = min(_MAX_MEMORISATION_PROMPTS, int(_SHARE_OF_MEMORISATION * trained_tokens / _MEMORISATION_WORK))
    return EvaluationBudget(*_windows_and_completions(tokens), positions=tokens, memorisation_prompts=prompts)


def budget_of_evaluation(held_out_tokens: float, *, has_training_code: bool) -> EvaluationBudget:
    """Return what each model reads and writes.

    `has_training_code`: there is one adapter, and the code that it was trained on is kept; retrieval is not measured otherwise.
    """
    tokens = _useful(2 * held_out_tokens)
    positions = min(_MAX_POSITION_TOKENS, _MORE_POSITIONS * tokens) if has_training_code else 0
    return EvaluationBudget(*_windows_and_completions(tokens), positions=positions)


def _useful(tokens: float) -> int:
    return round(min(_MAX_TOKENS, max(_MIN_TOKENS, tokens)))


def _windows_and_completions(tokens: int) -> tuple[int, int]:
    completions = min(_MAX_COMPLETION_TOKENS, round(_SHARE_OF_COMPLETIONS * tokens))
    return tokens - completions, completions
