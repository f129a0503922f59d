"""What a fingerprint of a base depends on, and what it does not."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from peft_core.bases.checkpoint import read_checkpoint
from peft_core.bases.fingerprint import SAMPLE_BYTES, architecture_hash, fingerprint, sample_offsets
from tests.model_files import CONFIG, SHAPES, safetensors_bytes, write_model


def test_the_type_of_the_weights_is_not_architecture_but_enters_the_sample(tmp_path: Path) -> None:
    single = fingerprint(write_model(tmp_path / "f32"))
    half = fingerprint(write_model(tmp_path / "bf16", dtype="BF16"))
    assert single.architecture == half.architecture
    assert single.sample != half.sample


@pytest.mark.parametrize(
    "change", [{"rope_theta": 1e6}, {"num_attention_heads": 8}, {"rms_norm_eps": 1e-6}, {"model_type": "qwen2"}]
)
def test_a_configuration_that_computes_something_else_is_another_architecture(change: dict[str, object]) -> None:
    assert architecture_hash({**CONFIG, **change}, SHAPES) != architecture_hash(CONFIG, SHAPES)


def test_an_added_layer_is_another_architecture() -> None:
    assert architecture_hash(CONFIG, {**SHAPES, "model.layers.2.mlp.up_proj.weight": (64, 32)}) != architecture_hash(
        CONFIG, SHAPES
    )


def test_both_spellings_of_the_rotary_base_are_one_architecture() -> None:
    new = {name: value for name, value in CONFIG.items() if name != "rope_theta"}
    new["rope_parameters"] = {"rope_type": "default", "rope_theta": 10_000}
    assert architecture_hash(new, SHAPES) == architecture_hash(CONFIG, SHAPES)


def test_a_stored_copy_of_a_tied_head_is_not_part_of_the_architecture(tmp_path: Path) -> None:
    plain, copied = write_model(tmp_path / "plain"), write_model(tmp_path / "copied")
    (copied / "model.safetensors").write_bytes(safetensors_bytes({**SHAPES, "lm_head.weight": (48, 32)}))
    assert fingerprint(plain).architecture == fingerprint(copied).architecture
    assert read_checkpoint(plain).shape == read_checkpoint(copied).shape


def test_one_changed_byte_at_the_end_of_a_tensor_changes_the_sample(tmp_path: Path) -> None:
    first = fingerprint(write_model(tmp_path / "a"))
    weights = write_model(tmp_path / "b") / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\1")
    second = fingerprint(tmp_path / "b")
    assert first.architecture == second.architecture
    assert first.sample != second.sample


@given(st.integers(0, 1 << 40))
def test_samples_lie_in_the_tensor_and_cover_its_ends(size: int) -> None:
    offsets = sample_offsets(size)
    assert all(0 <= offset <= max(0, size - SAMPLE_BYTES) for offset in offsets)
    assert not size or (offsets[0] == 0 and offsets[-1] + SAMPLE_BYTES >= size)
    assert len(offsets) <= 3
