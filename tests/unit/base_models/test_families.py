"""Tests of the table of base-model families, and of the error messages that list them."""

from __future__ import annotations

from pathlib import Path

import pytest

from peft_core.base_models.families import (
    FAMILIES,
    FULLY_SUPPORTED,
    GGUF_ARCHITECTURES,
    gguf_format,
    has_fused_blocks,
    has_head_norms,
)
from peft_core.base_models.gguf_model import read_gguf_model
from peft_core.errors import BaseCheckpointError
from tests.model_files import GGUF_METADATA, TEXT, gguf_bytes


def test_an_unlisted_family_has_no_special_support() -> None:
    assert not has_fused_blocks("gemma2")
    assert not has_head_norms("gemma2")
    assert gguf_format("gemma2") is None
    assert gguf_format(None) is None


def test_head_norms_and_gguf_files_occur_only_in_families_with_fused_blocks() -> None:
    for family in FAMILIES.values():
        assert family.fused_blocks or not (family.head_norms or family.gguf)


def test_an_unknown_gguf_architecture_is_rejected_with_the_families_of_the_table(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(gguf_bytes({**GGUF_METADATA, "general.architecture": (TEXT, "mamba")}))
    with pytest.raises(BaseCheckpointError, match=f"'mamba'; must be one of {GGUF_ARCHITECTURES}\\.") as caught:
        read_gguf_model(path)
    assert FULLY_SUPPORTED in str(caught.value)
