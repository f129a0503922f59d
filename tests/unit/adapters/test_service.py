"""Unit tests of the service: it finds the base model that an adapter was trained on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from peft_core.adapters.registry import Registry
from peft_core.adapters.service import AdapterService
from peft_core.base_models.resolve import resolve
from peft_core.config import Settings
from peft_core.schemas.results import BaseMatch
from tests.factories import record_base
from tests.model_files import write_adapter, write_model


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return write_model(tmp_path / "tiny")


@pytest.fixture
def adapter(tmp_path: Path, base: Path) -> Path:
    return record_base(write_adapter(tmp_path / "adapter"), resolve(str(base), Settings()))


def make_service(data_dir: Path, *, trained_on: str | None = None, **settings: Any) -> AdapterService:
    all_settings = Settings(data_dir=data_dir, **settings)
    return AdapterService(all_settings, Registry(all_settings.paths), lambda _: trained_on)


def test_the_recorded_base_is_found_at_the_path_of_the_training_job(data_dir: Path, base: Path, adapter: Path) -> None:
    result = make_service(data_dir, trained_on=str(base)).verify(str(adapter), None, scan_weights=False)
    assert (result.verdict, result.base_model) == (BaseMatch.SAMPLED, "tiny")


def test_the_default_base_is_used_if_it_is_the_recorded_one(data_dir: Path, base: Path, adapter: Path) -> None:
    service = make_service(data_dir, default_base_model=str(base))
    assert service.verify(str(adapter), None, scan_weights=False).verdict is BaseMatch.SAMPLED


def test_a_base_that_was_replaced_after_training_is_not_used(data_dir: Path, base: Path, adapter: Path) -> None:
    write_model(base, fill=7)
    result = make_service(data_dir, trained_on=str(base)).verify(str(adapter), None, scan_weights=False)
    assert result.verdict is BaseMatch.INCOMPATIBLE
    assert "base_unknown" in [reason.code for reason in result.reasons]
