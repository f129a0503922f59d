"""Tests of what a base model's fingerprint depends on, and what it does not depend on."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from peft_core.base_models.checkpoint import read_checkpoint
from peft_core.base_models.fingerprint import SAMPLE_BYTES, architecture_hash, content_hash, fingerprint, sample_offsets
from peft_core.schemas.base_model import Fingerprint
from tests.model_files import (
    CONFIG,
    GGUF_SHAPES,
    SHAPES,
    gguf_bytes,
    safetensors_bytes,
    weights,
    write_cached,
    write_model,
)

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def test_the_number_format_changes_the_sample_but_not_the_architecture(tmp_path: Path) -> None:
    single = fingerprint(write_model(tmp_path / "f32"))
    half = fingerprint(write_model(tmp_path / "bf16", dtype="BF16"))
    assert single.architecture == half.architecture
    assert single.sample != half.sample


@pytest.mark.parametrize(
    "change", [{"rope_theta": 1e6}, {"num_attention_heads": 8}, {"rms_norm_eps": 1e-6}, {"model_type": "qwen2"}]
)
def test_a_setting_that_affects_computations_changes_the_architecture(change: dict[str, object]) -> None:
    assert architecture_hash({**CONFIG, **change}, SHAPES) != architecture_hash(CONFIG, SHAPES)


def test_an_added_layer_changes_the_architecture() -> None:
    assert architecture_hash(CONFIG, {**SHAPES, "model.layers.2.mlp.up_proj.weight": (64, 32)}) != architecture_hash(
        CONFIG, SHAPES
    )


def test_both_notations_of_the_rotary_base_give_the_same_architecture() -> None:
    new = {name: value for name, value in CONFIG.items() if name != "rope_theta"}
    new["rope_parameters"] = {"rope_type": "default", "rope_theta": 10_000}
    assert architecture_hash(new, SHAPES) == architecture_hash(CONFIG, SHAPES)


def test_a_stored_copy_of_a_tied_head_does_not_change_the_architecture(tmp_path: Path) -> None:
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
def test_samples_are_inside_the_tensor_and_cover_its_ends(size: int) -> None:
    offsets = sample_offsets(size)
    assert all(0 <= offset <= max(0, size - SAMPLE_BYTES) for offset in offsets)
    assert not size or (offsets[0] == 0 and offsets[-1] + SAMPLE_BYTES >= size)
    assert len(offsets) <= 3


def family(path: Path) -> str:
    return fingerprint(path).family


def write_gguf(path: Path, **options: object) -> Path:
    path.write_bytes(gguf_bytes(**options))  # type: ignore[arg-type]
    return path


def test_all_formats_of_a_model_have_the_same_family_and_list_their_number_formats(tmp_path: Path) -> None:
    formats = {
        "F32 20": write_model(tmp_path / "f32", values=weights()),
        "BF16 20": write_model(tmp_path / "bf16", dtype="BF16", values=weights()),
        "F16 20": write_model(tmp_path / "f16", dtype="F16", values=weights(), shards=3),
        "F32 5, Q8_0 15": write_gguf(tmp_path / "tiny.gguf", values=weights(), quantised=True),
    }
    fingerprints = {storage: fingerprint(path) for storage, path in formats.items()}
    assert {storage: each.storage for storage, each in fingerprints.items()} == {
        storage: storage for storage in formats
    }
    assert len({each.family for each in fingerprints.values()}) == 1
    assert len({each.architecture for each in fingerprints.values()}) == 1
    assert len({each.sample for each in fingerprints.values()}) == 4


def test_another_model_of_the_same_shape_has_another_family(tmp_path: Path) -> None:
    first = fingerprint(write_model(tmp_path / "a", values=weights()))
    second = fingerprint(write_model(tmp_path / "b", values=weights(norms=1)))
    frozen = fingerprint(write_model(tmp_path / "c", values=weights(seed=1)))
    assert first.architecture == second.architecture == frozen.architecture
    assert second.family != first.family == frozen.family != ""
    assert first.sample != frozen.sample


def test_a_stored_copy_of_a_tied_head_does_not_change_the_family(tmp_path: Path) -> None:
    shapes = {**SHAPES, "lm_head.weight": (48, 32)}
    copied = write_model(tmp_path / "copied", shapes=shapes, values=weights(shapes=shapes))
    assert family(copied) == family(write_model(tmp_path / "plain", values=weights()))
    assert fingerprint(copied).storage == "F32 21"


def test_the_family_is_empty_if_norms_are_absent_or_not_floats(tmp_path: Path) -> None:
    without_norms = {name: shape for name, shape in SHAPES.items() if len(shape) == 2}
    model = write_model(tmp_path / "model", shapes=without_norms, model_type="olmo")
    assert family(model) == ""
    write_model(tmp_path / "model")
    (model / "model.safetensors").write_bytes(safetensors_bytes(SHAPES, "F64"))
    assert family(model) == ""


def test_the_storage_of_a_gguf_file_lists_its_number_formats(tmp_path: Path) -> None:
    assert fingerprint(write_gguf(tmp_path / "x.gguf")).storage == f"F32 {len(GGUF_SHAPES)}"


@pytest.mark.parametrize("shards", [1, 3])
def test_the_content_of_a_cached_model_follows_from_its_blob_names(tmp_path: Path, shards: int) -> None:
    model = write_model(tmp_path / "tiny", values=weights(), shards=shards)
    snapshot = write_cached(tmp_path / "hub", "org/tiny", COMMIT, model)
    assert fingerprint(model).content is None
    assert fingerprint(snapshot).content == content_hash(model) == content_hash(snapshot)


def test_the_content_of_a_cached_gguf_file_follows_from_its_blob_name(tmp_path: Path) -> None:
    (tmp_path / "m").mkdir()
    path = write_gguf(tmp_path / "m" / "tiny.gguf", values=weights())
    snapshot = write_cached(tmp_path / "hub", "org/tiny", COMMIT, tmp_path / "m")
    assert fingerprint(snapshot / "tiny.gguf").content == content_hash(path)


def test_the_content_is_unknown_for_files_that_are_not_links_to_blobs(tmp_path: Path) -> None:
    model = write_model(tmp_path / "tiny", values=weights())
    snapshot = write_cached(tmp_path / "hub", "org/tiny", COMMIT, model)
    weights_file = snapshot / "model.safetensors"
    weights_file.unlink()
    weights_file.symlink_to(model / "model.safetensors")
    assert fingerprint(snapshot).content is None
    weights_file.unlink()
    weights_file.write_bytes((model / "model.safetensors").read_bytes())
    assert fingerprint(snapshot).content is None


def test_the_content_hash_is_recomputed_if_a_file_changes(tmp_path: Path) -> None:
    first = content_hash(write_model(tmp_path / "m", values=weights()))
    assert content_hash(write_model(tmp_path / "copy", values=weights())) == first
    assert content_hash(write_model(tmp_path / "m", values=weights(), dtype="BF16")) != first


def test_a_fingerprint_without_the_newer_fields_still_matches_the_same_weights(tmp_path: Path) -> None:
    new = fingerprint(write_model(tmp_path / "m", values=weights()))
    old = Fingerprint(architecture=new.architecture, sample=new.sample)
    assert old != new
    assert old.same_weights(new)
    assert not old.same_weights(new.model_copy(update={"sample": "0" * 64}))
