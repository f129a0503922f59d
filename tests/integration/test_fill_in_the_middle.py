"""The training worker learns fill-in-the-middle from a base model whose tokenizer has FIM tokens."""

from __future__ import annotations

import json
from pathlib import Path

from peft_core.base_models.resolve import resolve
from peft_core.config import Settings
from peft_core.schemas.events import DatasetPrepared
from peft_core.schemas.task import TrainingTask
from peft_core.schemas.training import TaskMixture, TrainingConfig
from tests.factories import make_request
from tests.integration.test_training_child import SHORT_RUN, run_worker
from tests.tiny_models import write_tiny_base
from tests.unit.data.test_prepare import repository


def test_a_base_model_with_fim_tokens_is_trained_on_fim_examples(tmp_path: Path) -> None:
    base = write_tiny_base(tmp_path / "base")
    tokenizer = base / "tokenizer.json"
    settings = json.loads(tokenizer.read_text())
    vocabulary = settings["model"]["vocab"]
    for character, mark in zip("`~^", ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"), strict=True):
        vocabulary[mark] = vocabulary.pop(character)
        settings["added_tokens"].append({**settings["added_tokens"][0], "id": vocabulary[mark], "content": mark})
    tokenizer.write_text(json.dumps(settings))

    task = TrainingTask(
        job_id="20260101-000000-abcdef",
        project_id="gaps",
        request=make_request(
            source=repository(tmp_path / "code", files=6, functions=8),
            config=TrainingConfig(
                device="cpu", learning_rate=1e-3, mixture=TaskMixture(fill_in_the_middle=1), **SHORT_RUN
            ),
            base=resolve(str(base), Settings()),
        ),
        job_dir=tmp_path / "job",
        base_models_dir=tmp_path / "base_models",
    )
    code, events, err = run_worker(task)
    assert code == 0, err
    told = next(event.dataset.told for event in events if isinstance(event, DatasetPrepared))
    assert told["fill_in_the_middle"] > told.get("plainly", 0)
