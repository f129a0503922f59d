"""The end of a training: base against adapter on text that neither was trained on."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path

import structlog
from accelerate import Accelerator
from pydantic import ValidationError
from transformers import PreTrainedModel

from peft_core.evaluation.stdlib_code import general_examples
from peft_core.evaluation.summary import Completion, PairedScore, Score, evaluate
from peft_core.evaluation.worker.completions import Prompt, choose_prompts, write
from peft_core.evaluation.worker.scoring import HeldOutExample, held_out_examples_of, measure
from peft_core.modeling.objective import Objective
from peft_core.modeling.tokenizer import BaseTokenizer
from peft_core.schemas.evaluation import Evaluation
from peft_core.schemas.frozen import FrozenModel
from peft_core.system.cancellation import StopFlag
from peft_core.system.files import atomic_write

MAX_PROMPTS = 48
# Writing from prompts may cost a tenth of what training did: two models, and a trained token costs three that are read.
_SHARE = 0.1 * 3 / 2
WRITING_TOKENS = (1200, 12_000)  # of one model; fewer show nothing, more change nothing

_log = structlog.get_logger(__name__)


def writing_budget(trained_tokens: int) -> int:
    """Tokens that each model may read and write from prompts."""
    least, most = WRITING_TOKENS
    return round(min(most, max(least, _SHARE * trained_tokens)))


class Scores(FrozenModel):
    """One model on everything that is measured."""

    key: str  # of the run
    held_out: tuple[Score, ...]
    general: tuple[Score, ...]


class Evaluator:
    """Everything to measure on, and the way to do it."""

    def __init__(
        self,
        held_out: Sequence[HeldOutExample],
        tokenizer: BaseTokenizer,
        max_length: int,
        *,
        seed: int,
    ) -> None:
        self.held_out = held_out
        self._general = held_out_examples_of(general_examples(), tokenizer, max_length)
        self._tokenizer = tokenizer
        self._seed = seed

    def score(self, objective: Objective, accelerator: Accelerator, stop: StopFlag, *, key: str = "") -> Scores:
        """The model as it is now."""
        trials = [*self.held_out, *self._general]
        scores = measure(objective, trials, self._tokenizer, accelerator, stop)
        border = len(self.held_out)
        return Scores(key=key, held_out=tuple(scores[:border]), general=tuple(scores[border:]))

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
        """Let both write, and sum up. The adapter is on; the model computes plainly (`make_plain`)."""
        began = time.monotonic()
        prompts = choose_prompts(self.held_out, MAX_PROMPTS, budget, self._seed, self._tokenizer)
        by_adapter = write(causal, prompts, self._tokenizer, stop)
        with without_adapter():
            by_base = write(causal, prompts, self._tokenizer, stop)
        texts = zip(prompts, by_base, by_adapter, strict=True)
        written = [self._written(prompt, base_text, adapter_text) for prompt, base_text, adapter_text in texts]
        seconds = time.monotonic() - began
        evaluation = evaluate(
            _measured(self.held_out, base.held_out, adapter.held_out),
            _measured(self._general, base.general, adapter.general),
            written,
            seed=self._seed,
        ).model_copy(update={"seconds": round(seconds, 1)})
        _log.info("evaluated", **evaluation.in_figures.model_dump(exclude={"gains", "losses"}))
        return evaluation

    def _written(self, prompt: Prompt, base_text: str, adapter_text: str) -> Completion:
        before, indentation = prompt.shown(self._tokenizer)
        return Completion(
            file=prompt.trial.example.path,
            line=prompt.line,
            prompt=before,
            expected=prompt.cut.expected,
            base=indentation + base_text,
            adapter=indentation + adapter_text,
        )


def keep_scores(path: Path, scores: Scores) -> None:
    """For a run that is resumed: the base is measured once."""
    atomic_write(path, scores.model_dump_json())


def kept_scores(path: Path, key: str, examples: int) -> Scores | None:
    """Those of this very run, where there are any."""
    try:
        scores = Scores.model_validate_json(path.read_bytes())
    except (OSError, ValidationError):
        return None
    return scores if scores.key == key and len(scores.held_out) == examples else None


def _measured(trials: Sequence[HeldOutExample], base: Sequence[Score], adapter: Sequence[Score]) -> list[PairedScore]:
    return [
        PairedScore(trial.example.path, trial.document.targets, len(trial.lines), one, other)
        for trial, one, other in zip(trials, base, adapter, strict=True)
    ]
