"""Codebase Gardener's names for settings, and the limits of its training pipeline."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from peft_core.config import Settings
from peft_core.errors import DataError, InvalidArgument
from peft_core.gardener.names import parse_names
from peft_core.manager import PEFTManager
from peft_core.schemas.training import TrainingConfig

RECORDS = [{"text": f"def function_{n}(argument_{n}):\n    return argument_{n} * {n}\n" * 3} for n in range(200)]


def test_its_names_mean_ours() -> None:
    config, options = parse_names(
        {
            "lora_rank": 8,
            "lora_alpha": 32,
            "lora_dropout": 0.1,
            "training_batch_size": 2,
            "max_training_steps": 100,
            "training_timeout_minutes": 30,
            "memory_limit_gb": 4.0,
            "max_training_chunks": 5000,
            "progress_update_interval": 5.0,
            "seed": 7,
        }
    )
    assert config == TrainingConfig(
        rank=8, alpha=32, dropout=0.1, batch_size=2, max_steps=100, max_minutes=30, max_memory_mb=4000, seed=7
    )
    assert (options.max_training_chunks, options.progress_update_interval) == (5000, 5.0)


@pytest.mark.parametrize("config", [None, {}, TrainingConfig(rank=8), {"rank": 8}])
def test_our_own_names_are_as_before(config: Any) -> None:
    expected = TrainingConfig(rank=8) if config else TrainingConfig()
    assert parse_names(config)[0] == expected


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"rank": 8, "lora_rank": 16}, r"config.lora_rank = 16 .*config.rank and config.lora_rank mean the same"),
        ({"lora_rank": 8, "rank": 8}, "config.rank = 8 .*mean the same; one of them must be given"),
        ({"memory_limit_gb": 4, "memory_limit_mb": 4000}, "memory_limit_gb and config.memory_limit_mb mean the same"),
        ({"lora_rank": 1000}, r"config.rank = 1000 cannot be used: must be an integer from 1 to 512"),
        ({"memory_limit_gb": "much"}, r"config.max_memory_mb = 'much' cannot be used"),
        ({"min_training_chunks": 0}, r"config.min_training_chunks = 0 cannot be used"),
        ({"training_data_quality_threshold": 0.5}, r"units are not scored here.*Omit it"),
        ({"lora_ranks": 8}, r"config.lora_ranks = 8 cannot be used: there is no such field"),
    ],
)
def test_one_clear_error_says_what_cannot_be_used(config: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidArgument, match=message) as caught:
        parse_names(config)
    assert len(str(caught.value)) < 400


async def test_the_number_of_chunks_is_limited_on_both_sides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manager = PEFTManager(Settings(data_dir=tmp_path / "data"))
    monkeypatch.setattr(manager._jobs, "queue_runs", lambda _project, drafts, _data: drafts[0])
    with pytest.raises(DataError, match="at least 201 are needed") as caught:
        await manager.train_adapter("web", RECORDS, {"min_training_chunks": 201})
    assert "lower config.min_training_chunks" in caught.value.suggestions[-1]
    draft: Any = await manager.train_adapter("web", RECORDS, {"min_training_chunks": 200, "max_training_chunks": 5000})
    assert draft.config.max_steps is None
    draft = await manager.train_adapter("web", RECORDS, {"max_training_chunks": 41})
    assert (draft.config.max_steps, draft.config.batch_size, draft.estimate.steps) == (10, 4, 10)
    assert draft.estimate.chosen.startswith("10 steps, by config.max_training_chunks = 41. ")
    draft = await manager.train_adapter("web", RECORDS[:20], {"min_training_chunks": 20})
    assert draft.found.examples == 20


async def test_an_option_that_has_no_effect_is_refused(tmp_path: Path) -> None:
    manager = PEFTManager(Settings(data_dir=tmp_path / "data"))
    with pytest.raises(InvalidArgument, match="it belongs to start_training"):
        await manager.train_adapter("web", RECORDS, {"progress_update_interval": 5})
    with pytest.raises(InvalidArgument, match=r"max_training_chunks = 5 .*it belongs to start_training"):
        await manager.inspect_training_data(RECORDS, {"max_training_chunks": 5})


async def test_its_settings_are_defaults_of_a_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"LORA_RANK": 8, "LORA_ALPHA": 24, "TRAINING_BATCH_SIZE": 2, "MAX_TRAINING_STEPS": 30}.items():
        monkeypatch.setenv(f"CODEBASE_GARDENER_{name}", str(value))
    manager = PEFTManager(Settings(data_dir=tmp_path / "data"))
    report = await manager.inspect_training_data(RECORDS)
    config = report.config
    assert (config.rank, config.alpha, config.batch_size, config.max_steps) == (8, 24, 2, 30)
    assert "30 steps, by the setting max_training_steps" in report.estimate.chosen
    report = await manager.inspect_training_data(RECORDS, {"rank": 4, "batch_size": 8, "num_epochs": 3})
    config = report.config
    assert (config.rank, config.alpha, config.batch_size, config.max_steps) == (4, 24, 8, None)
