"""What a fingerprint of a base depends on, and what it does not."""

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


def family(path: Path) -> str:
    return fingerprint(path).family


def write_gguf(path: Path, **options: object) -> Path:
    path.write_bytes(gguf_bytes(**options))  # type: ignore[arg-type]
    return path


def test_every_form_of_a_model_has_one_family_and_names_its_number_formats(tmp_path: Path) -> None:
    forms = {
        "F32 20": write_model(tmp_path / "f32", values=weights()),
        "BF16 20": write_model(tmp_path / "bf16", dtype="BF16", values=weights()),
        "F16 20": write_model(tmp_path / "f16", dtype="F16", values=weights(), shards=3),
        "F32 5, Q8_0 15": write_gguf(tmp_path / "tiny.gguf", values=weights(), quantised=True),
    }
    found = {storage: fingerprint(path) for storage, path in forms.items()}
    assert {storage: each.storage for storage, each in found.items()} == {storage: storage for storage in forms}
    assert len({each.family for each in found.values()}) == 1
    assert len({each.architecture for each in found.values()}) == 1
    assert len({each.sample for each in found.values()}) == 4


def test_another_model_of_the_same_shape_is_another_family(tmp_path: Path) -> None:
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


def test_where_norms_are_no_floats_or_absent_no_family_is_claimed(tmp_path: Path) -> None:
    integers = write_model(tmp_path / "ints", shapes={n: s for n, s in SHAPES.items() if len(s) == 2})
    assert family(integers) == ""
    (integers / "model.safetensors").write_bytes(safetensors_bytes(SHAPES, "F64"))
    assert family(integers) == ""


def test_the_number_format_of_a_tensor_is_told_for_gguf_too(tmp_path: Path) -> None:
    assert fingerprint(write_gguf(tmp_path / "x.gguf")).storage == f"F32 {len(GGUF_SHAPES)}"


@pytest.mark.parametrize("shards", [1, 3])
def test_the_content_of_a_cached_model_is_known_from_the_names_of_its_blobs(tmp_path: Path, shards: int) -> None:
    model = write_model(tmp_path / "tiny", values=weights(), shards=shards)
    snapshot = write_cached(tmp_path / "hub", "org/tiny", COMMIT, model)
    assert fingerprint(model).content is None
    assert fingerprint(snapshot).content == content_hash(model) == content_hash(snapshot)


def test_a_gguf_file_in_the_cache_is_known_by_its_blob_too(tmp_path: Path) -> None:
    (tmp_path / "m").mkdir()
    path = write_gguf(tmp_path / "m" / "tiny.gguf", values=weights())
    snapshot = write_cached(tmp_path / "hub", "org/tiny", COMMIT, tmp_path / "m")
    assert fingerprint(snapshot / "tiny.gguf").content == content_hash(path)


def test_files_that_are_no_links_to_blobs_promise_nothing_of_their_content(tmp_path: Path) -> None:
    model = write_model(tmp_path / "tiny", values=weights())
    snapshot = write_cached(tmp_path / "hub", "org/tiny", COMMIT, model)
    weights_file = snapshot / "model.safetensors"
    weights_file.unlink()
    weights_file.symlink_to(model / "model.safetensors")
    assert fingerprint(snapshot).content is None
    weights_file.unlink()
    weights_file.write_bytes((model / "model.safetensors").read_bytes())
    assert fingerprint(snapshot).content is None


def test_the_content_is_read_again_when_a_file_changes(tmp_path: Path) -> None:
    first = content_hash(write_model(tmp_path / "m", values=weights()))
    assert content_hash(write_model(tmp_path / "copy", values=weights())) == first
    assert content_hash(write_model(tmp_path / "m", values=weights(), dtype="BF16")) != first


def test_a_fingerprint_from_before_the_later_fields_is_still_of_the_same_weights(tmp_path: Path) -> None:
    now = fingerprint(write_model(tmp_path / "m", values=weights()))
    old = Fingerprint(architecture=now.architecture, sample=now.sample)
    assert old != now
    assert old.same_weights(now)
    assert not old.same_weights(now.model_copy(update={"sample": "0" * 64}))
