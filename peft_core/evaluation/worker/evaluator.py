"""The evaluation at the end of a training, or of any adapter: base model against adapter on text that neither has seen."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path

import structlog
from accelerate import Accelerator
from pydantic import ValidationError
from transformers import PreTrainedModel

from peft_core.evaluation.catch_up import loss_change
from peft_core.evaluation.columns import summarise_columns
from peft_core.evaluation.stdlib_code import stdlib_examples
from peft_core.evaluation.summary import Measurement, QuotedPrompt, Scores, summarise
from peft_core.evaluation.worker.completions import complete
from peft_core.evaluation.worker.names import invents_name, project_names
from peft_core.evaluation.worker.prompts import Prompt, choose_file_prompts, choose_prompts
from peft_core.evaluation.worker.retrieved import POSITION_TOKENS, Positions, choose_positions
from peft_core.evaluation.worker.scoring import make_held_out_examples, score_examples
from peft_core.evaluation.worker.setup import RunData
from peft_core.evaluation.worker.windows import WINDOW_TOKENS, Window, choose_windows, score_windows
from peft_core.modeling.objective import Objective
from peft_core.planning.evaluation_budget import EvaluationBudget
from peft_core.schemas.evaluation import Evaluation
from peft_core.system.cancellation import StopFlag
from peft_core.system.files import atomic_write

MAX_PROMPTS = 16
_MIN_WINDOW_TOKENS, _LEAST_WINDOWS = 256, 6  # a short evaluation has smaller windows rather than few files

_log = structlog.get_logger(__name__)


class Evaluator:
    """Scores models on held-out examples, in whole held-out files and on general code, and compares base model and adapter."""

    def __init__(self, data: RunData, max_length: int, *, seed: int) -> None:
        self._data = data
        self._held_out = data.held_out
        self._max_length = max_length
        self._general = make_held_out_examples(stdlib_examples(), data.tokenizer, max_length)
        self._tokenizer = data.tokenizer
        self._windows: list[Window] = []
        self._positions = Positions()
        self.seed = seed

    def choose_windows(self, objective: Objective, tokens: int) -> None:
        """Choose the windows of whole files that every model reads. Without this call, none are read."""
        limits = (WINDOW_TOKENS, 2 * self._max_length, max(_MIN_WINDOW_TOKENS, tokens // _LEAST_WINDOWS))
        context = objective.context_tokens
        self._windows = choose_windows(
            self._data.held_out_files,
            project_names(self._data.names),
            self._tokenizer,
            length=min(limits) if context is None else min(*limits, context),
            budget=tokens,
            seed=self.seed,
        )

    def choose_positions(self, objective: Objective, tokens: int, training_code: Sequence[Path]) -> None:
        """Choose the positions at which retrieved code is compared with the adapter. Without this call, nothing is compared.

        `training_code`: the files of training examples that are searched.
        """
        limits = (POSITION_TOKENS, 2 * self._max_length, objective.context_tokens or POSITION_TOKENS)
        self._positions = choose_positions(
            self._data.held_out_files,
            training_code,
            self._tokenizer,
            length=min(limits),
            budget=tokens,
            seed=self.seed,
        )

    def work_after_training(self, budget: EvaluationBudget) -> float:
        """Return the work of scoring and comparing the adapter in tokens of training, each of which costs three of reading."""
        documents = [each.document for each in (*self._held_out, *self._general, *self._data.held_out_items)]
        documents += [window.document for window in self._windows]
        read = sum(map(len, documents)) + self._positions.tokens + 2 * budget.completions
        return read / 3 + budget.memorisation_work

    def score(
        self, objective: Objective, accelerator: Accelerator, stop: StopFlag, *, key: str = "", more: bool = True
    ) -> Scores:
        """Score the model in its present state. `more`: not only on the held-out examples."""
        examples = [*self._held_out, *(self._general if more else ())]
        scores = score_examples(objective, examples, self._tokenizer, accelerator, stop)
        border = len(self._held_out)
        windows, positions = (self._windows, self._positions) if more else ((), Positions())
        at_positions = [*positions.plain, *positions.retrieved]
        columns = score_examples(objective, at_positions, self._tokenizer, accelerator, stop) if at_positions else []
        items = self._data.held_out_items if more else []
        return Scores(
            key=key,
            held_out=tuple(scores[:border]),
            general=tuple(scores[border:]),
            in_file=tuple(score_windows(objective, windows, self._tokenizer, accelerator, stop)),
            plain=tuple(columns[: len(positions.plain)]),
            retrieved=tuple(columns[len(positions.plain) :]),
            items=tuple(score_examples(objective, items, self._tokenizer, accelerator, stop) if items else ()),
        )

    def are_comparable(self, scores: Scores, *, more: bool = True) -> bool:
        """Return whether scores are of the same size as those that `score` returns."""
        windows = self._windows if more else ()
        in_windows = sum(len(target.metrics) for window in windows for target in window.targets)
        return (
            len(scores.held_out) == len(self._held_out)
            and in_windows == sum(score.positions for score in scores.in_file)
            and len(scores.plain) == (len(self._positions.plain) if more else 0)
            and len(scores.items) == (len(self._data.held_out_items) if more else 0)
        )

    def choose_prompts(self, tokens: int) -> list[Prompt]:
        """Choose the prompts that every model completes."""
        if files := self._data.held_out_files:
            return choose_file_prompts(files, MAX_PROMPTS, tokens, self.seed, self._tokenizer)
        return choose_prompts(self._held_out, MAX_PROMPTS, tokens, self.seed, self._tokenizer)

    def measure(
        self, scores: Scores, prompts: Sequence[Prompt], causal: PreTrainedModel, stop: StopFlag
    ) -> Measurement:
        """Complete the prompts with the model in its present state, of which these are the scores.

        Fusion must have been undone (`undo_fusion`).
        """
        began = time.monotonic()
        completions = complete(causal, prompts, self._tokenizer, stop)
        if known := self._data.names.used:
            completions = [
                replace(written, invents=invents_name(written.text, self._tokenizer.text(prompt.ids), known))
                for prompt, written in zip(prompts, completions, strict=True)
            ]
        return Measurement(scores, completions, time.monotonic() - began)

    def compare(
        self,
        base: Scores,
        adapter: Scores,
        causal: PreTrainedModel,
        without_adapter: Callable[[], AbstractContextManager[object]],
        *,
        completion_tokens: int,
        stop: StopFlag,
    ) -> Evaluation:
        """Let both models complete prompts, and summarise everything. The adapter must be active; else as for `measure`."""
        prompts = self.choose_prompts(completion_tokens)
        with_adapter = self.measure(adapter, prompts, causal, stop)
        with without_adapter():
            return self.summarise(self.measure(base, prompts, causal, stop), with_adapter, prompts)

    def summarise(self, base: Measurement, adapter: Measurement, prompts: Sequence[Prompt]) -> Evaluation:
        evaluation = summarise(base, adapter, self.quote(prompts), seed=self.seed)
        columns = summarise_columns(base.scores, adapter.scores, note=self._positions.note, seed=self.seed)
        study = loss_change(base.scores.items, adapter.scores.items)
        evaluation = evaluation.model_copy(update={"columns": columns, "study": study})
        _log.info("evaluated", **evaluation.without_texts.model_dump(exclude={"gains", "losses"}))
        return evaluation

    def quote(self, prompts: Sequence[Prompt]) -> list[QuotedPrompt]:
        return [prompt.quoted for prompt in prompts]


def save_scores(path: Path, scores: Scores) -> None:
    """Save the base model's scores, so that a resumed run does not compute them again."""
    atomic_write(path, scores.model_dump_json())


def load_scores(path: Path, key: str, evaluator: Evaluator, *, more: bool = True) -> Scores | None:
    """Return the saved scores of the run with this key, or None if `evaluator.score` would return others."""
    try:
        scores = Scores.model_validate_json(path.read_bytes())
    except (OSError, ValidationError):
        return None
    return scores if scores.key == key and evaluator.are_comparable(scores, more=more) else None
