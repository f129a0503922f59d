"""The evaluation at the end of a training, or of any adapter: base model against adapter on text that neither has seen."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path

import structlog
from accelerate import Accelerator
from pydantic import ValidationError
from transformers import PreTrainedModel

from peft_core.base_models.tokenizer import BaseTokenizer
from peft_core.evaluation.stdlib_code import stdlib_examples
from peft_core.evaluation.summary import Measurement, QuotedPrompt, Scores, summarise
from peft_core.evaluation.worker.completions import Prompt, choose_prompts, complete
from peft_core.evaluation.worker.scoring import HeldOutExample, make_held_out_examples, score_examples
from peft_core.modeling.objective import Objective
from peft_core.schemas.evaluation import Evaluation
from peft_core.system.cancellation import StopFlag
from peft_core.system.files import atomic_write

MAX_PROMPTS = 48
# Tokens that each model may spend on completions: fewer say nothing, more would not change the result.
_MIN_COMPLETION_TOKENS, _MAX_COMPLETION_TOKENS = 1200, 12_000
# Completions may take a tenth of the training time. Two models write, and training on a token costs as much as reading three.
_SHARE_OF_TRAINED_TOKENS = 0.1 * 3 / 2

_log = structlog.get_logger(__name__)


def completion_budget(tokens: float) -> int:
    """Limit a number of tokens that each model may spend on completions to what is useful."""
    return round(min(_MAX_COMPLETION_TOKENS, max(_MIN_COMPLETION_TOKENS, tokens)))


def completion_budget_after_training(trained_tokens: int) -> int:
    """Return the number of tokens that each model may spend on completions after training on `trained_tokens`."""
    return completion_budget(_SHARE_OF_TRAINED_TOKENS * trained_tokens)


class Evaluator:
    """Scores models on held-out examples and on general code, and compares base model and adapter."""

    def __init__(
        self, held_out: Sequence[HeldOutExample], tokenizer: BaseTokenizer, max_length: int, *, seed: int
    ) -> None:
        self._held_out = held_out
        self._general = make_held_out_examples(stdlib_examples(), tokenizer, max_length)
        self._tokenizer = tokenizer
        self.seed = seed

    @property
    def held_out_examples(self) -> int:
        return len(self._held_out)

    def work_after_training(self, trained_tokens: int) -> float:
        """Return the work of scoring and comparing the adapter in tokens of training, each of which costs three of reading."""
        scored = sum(len(example.document) for example in [*self._held_out, *self._general])
        return (scored + 2 * completion_budget_after_training(trained_tokens)) / 3

    def score(
        self, objective: Objective, accelerator: Accelerator, stop: StopFlag, *, key: str = "", general: bool = True
    ) -> Scores:
        """Score the model in its present state. `general`: on general code as well."""
        examples = [*self._held_out, *(self._general if general else ())]
        scores = score_examples(objective, examples, self._tokenizer, accelerator, stop)
        border = len(self._held_out)
        return Scores(key=key, held_out=tuple(scores[:border]), general=tuple(scores[border:]))

    def choose_prompts(self, budget: int) -> list[Prompt]:
        """Choose the prompts that every model completes. `budget` limits the tokens per model."""
        return choose_prompts(self._held_out, MAX_PROMPTS, budget, self.seed, self._tokenizer)

    def measure(
        self, scores: Scores, prompts: Sequence[Prompt], causal: PreTrainedModel, stop: StopFlag
    ) -> Measurement:
        """Complete the prompts with the model in its present state, of which these are the scores.

        Fusion must have been undone (`undo_fusion`).
        """
        began = time.monotonic()
        texts = complete(causal, prompts, self._tokenizer, stop)
        return Measurement(scores, texts, time.monotonic() - began)

    def compare(
        self,
        base: Scores,
        adapter: Scores,
        causal: PreTrainedModel,
        without_adapter: Callable[[], AbstractContextManager[object]],
        *,
        budget: int,
        stop: StopFlag,
    ) -> Evaluation:
        """Let both models complete prompts, and summarise everything. The adapter must be active; else as for `measure`."""
        prompts = self.choose_prompts(budget)
        with_adapter = self.measure(adapter, prompts, causal, stop)
        with without_adapter():
            return self.summarise(self.measure(base, prompts, causal, stop), with_adapter, prompts)

    def summarise(self, base: Measurement, adapter: Measurement, prompts: Sequence[Prompt]) -> Evaluation:
        evaluation = summarise(base, adapter, self.quote(prompts), seed=self.seed)
        _log.info("evaluated", **evaluation.without_texts.model_dump(exclude={"gains", "losses"}))
        return evaluation

    def quote(self, prompts: Sequence[Prompt]) -> list[QuotedPrompt]:
        return [prompt.quote(self._tokenizer) for prompt in prompts]


def save_scores(path: Path, scores: Scores) -> None:
    """Save the base model's scores, so that a resumed run does not compute them again."""
    atomic_write(path, scores.model_dump_json())


def load_scores(path: Path, key: str, examples: int) -> Scores | None:
    """Return the saved scores of the run with this key on so many held-out examples, or None."""
    try:
        scores = Scores.model_validate_json(path.read_bytes())
    except (OSError, ValidationError):
        return None
    return scores if scores.key == key and len(scores.held_out) == examples else None
