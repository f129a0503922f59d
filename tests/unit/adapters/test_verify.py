"""Unit tests of verify: it reports every mismatch that PEFT accepts without a warning, and returns the verdict."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from peft_core.adapters.tensor_check import linear_modules
from peft_core.adapters.verify import verify
from peft_core.base_models.resolve import resolve
from peft_core.config import Settings
from peft_core.schemas.base_model import Base
from peft_core.schemas.results import BaseMatch, Compatibility
from tests.factories import record_base
from tests.model_files import (
    SHAPES,
    Shapes,
    adapter_shapes,
    gguf_bytes,
    model_shapes,
    safetensors_bytes,
    weights,
    write_adapter,
    write_model,
)

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
PREFIX = "base_model.model."
Q0 = f"{PREFIX}model.layers.0.self_attn.q_proj"
ALL_LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
Change = Callable[[Path], None]


@pytest.fixture(scope="module", params=["huggingface", "gguf"])
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Base:
    directory = tmp_path_factory.mktemp("base")
    if request.param == "huggingface":
        return resolve(str(write_model(directory / "tiny", values=weights())), Settings())
    (directory / "tiny.gguf").write_bytes(gguf_bytes(values=weights()))
    return resolve(str(directory / "tiny.gguf"), Settings())


def errors(result: Compatibility) -> list[str]:
    return [reason.code for reason in result.reasons if reason.severity == "error"]


def tensors(shapes: Shapes, dtype: str = "F32") -> Change:
    return lambda directory: (directory / WEIGHTS).write_bytes(safetensors_bytes(shapes, dtype, fill=1)) and None


def added(changes: dict[str, tuple[int, ...] | None]) -> Change:
    """Write the usual tensors with changes: added tensors, other shapes, or (None) removed tensors."""
    return tensors({n: s for n, s in {**adapter_shapes(), **changes}.items() if s is not None})


def renamed(change: Callable[[str], str], *, transposed: bool = False) -> Change:
    return tensors({change(n): s[::-1] if transposed else s for n, s in adapter_shapes().items()})


def configured(**settings: Any) -> Change:
    def change(directory: Path) -> None:
        config = json.loads((directory / CONFIG).read_text())
        (directory / CONFIG).write_text(json.dumps({**config, **settings}))

    return change


def both(*changes: Change) -> Change:
    def change(directory: Path) -> None:
        for apply_change in changes:
            apply_change(directory)

    return change


@dataclass(frozen=True)
class Mismatch:
    name: str
    change: Change
    codes: list[str]


MISMATCHES = [
    Mismatch("the base has fewer layers", tensors(adapter_shapes(shapes=model_shapes(layers=4))), ["layer_count"]),
    Mismatch("the base has more layers", tensors(adapter_shapes(shapes=model_shapes(layers=1))), ["layer_count"]),
    Mismatch(
        "layers_to_transform beyond the base",
        both(
            configured(layers_to_transform=[2, 3]),
            tensors({n: s for n, s in adapter_shapes(shapes=model_shapes(layers=4)).items() if "2." in n or "3." in n}),
        ),
        ["layer_count"],
    ),
    Mismatch(
        "another layer than the base has",
        renamed(lambda name: name.replace("layers.1.", "layers.7.")),
        ["module_not_in_base", "weights_missing"],
    ),
    Mismatch(
        "no target matches", configured(target_modules=["query_key_value"]), ["not_targeted", "target_not_in_base"]
    ),
    Mismatch(
        "one target does not match, and weights lack their target",
        configured(target_modules=["q_proj", "c_attn"]),
        ["not_targeted", "target_not_in_base"],
    ),
    Mismatch(
        "a target without weights", configured(target_modules=["q_proj", "v_proj", "k_proj"]), ["weights_missing"]
    ),
    Mismatch("weights without a target", configured(target_modules=["q_proj"]), ["not_targeted"]),
    Mismatch("layers_to_transform excludes weights", configured(layers_to_transform=[0]), ["not_targeted"]),
    Mismatch("prefix stripped", renamed(lambda name: name.removeprefix(PREFIX)), ["prefix_stripped"]),
    Mismatch(
        "adapter's name in the keys",
        renamed(lambda name: name.replace(".weight", ".default.weight")),
        ["adapter_name_in_keys"],
    ),
    Mismatch(
        "MLX names",
        renamed(
            lambda name: (
                name.removeprefix(PREFIX).replace("lora_A.weight", "lora_a").replace("lora_B.weight", "lora_b")
            ),
            transposed=True,
        ),
        ["mlx_names"],
    ),
    Mismatch("foreign tensor", added({f"{PREFIX}model.layers.0.mlp.evil.weight": (2,)}), ["foreign_tensor"]),
    Mismatch("only foreign tensors", tensors({"x": (1,)}), ["foreign_tensor", "no_weights", "weights_missing"]),
    Mismatch("no tensors", tensors({}), ["no_weights", "weights_missing"]),
    Mismatch("hidden size", tensors(adapter_shapes(shapes=model_shapes(hidden=64))), ["shape"]),
    Mismatch("key and value heads", tensors(adapter_shapes(shapes=model_shapes(kv_rows=32))), ["shape"]),
    Mismatch("rank of config and weights differ", configured(r=8), ["rank"]),
    Mismatch("rank_pattern dropped", added({f"{Q0}.lora_A.weight": (2, 32), f"{Q0}.lora_B.weight": (32, 2)}), ["rank"]),
    Mismatch("A and B of different rank", added({f"{Q0}.lora_B.weight": (32, 8)}), ["rank"]),
    Mismatch("one-dimensional A", added({f"{Q0}.lora_A.weight": (128,)}), ["rank"]),
    Mismatch("rank of zero", added({f"{Q0}.lora_A.weight": (0, 32), f"{Q0}.lora_B.weight": (32, 0)}), ["rank"]),
    Mismatch(
        "embedding of a larger vocabulary",
        added({f"{PREFIX}model.embed_tokens.weight": (52, 32)}),
        ["vocabulary_resized"],
    ),
    Mismatch("head of a larger vocabulary", added({f"{PREFIX}lm_head.weight": (52, 32)}), ["vocabulary_resized"]),
    Mismatch("alpha is not a number", configured(lora_alpha=float("nan")), ["config_value"]),
    Mismatch("int8 weights", tensors(adapter_shapes(), "I8"), ["dtype"]),
    Mismatch("initialisation that changes the base", configured(init_lora_weights="pissa"), ["unsupported_setting"]),
    Mismatch("base weight", added({f"{PREFIX}model.layers.0.mlp.up_proj.weight": (64, 32)}), ["overwrites_base"]),
    Mismatch("base weight without prefix", added({"model.layers.0.mlp.up_proj.weight": (64, 32)}), ["overwrites_base"]),
    Mismatch("norm weight of the base", added({f"{PREFIX}model.norm.weight": (32,)}), ["overwrites_base"]),
    Mismatch("wrapped base weight", added({f"{Q0}.base_layer.weight": (32, 32)}), ["overwrites_base"]),
    Mismatch("modules_to_save dropped", added({f"{PREFIX}lm_head.weight": (48, 32)}), ["overwrites_base"]),
    Mismatch("DoRA flag dropped", added({f"{Q0}.lora_magnitude_vector": (32,)}), ["dora_weights"]),
    Mismatch(
        "LoRA on the embedding",
        both(
            configured(target_modules=["q_proj", "v_proj", "embed_tokens"]),
            added({f"{PREFIX}model.embed_tokens.lora_embedding_A": (4, 48)}),
        ),
        ["embedding_lora", "embedding_lora"],
    ),
    Mismatch("only one of A and B", added({f"{Q0}.lora_A.weight": None}), ["unpaired"]),
    Mismatch("rank below one", configured(r=-1), ["config_value"]),
    Mismatch("scale by an expression", configured(alpha_pattern={".*q_proj": 4}), ["targets_not_literal"]),
    Mismatch(
        "truncated", lambda d: (d / WEIGHTS).write_bytes((d / WEIGHTS).read_bytes()[:-100]) and None, ["bad_file"]
    ),
    Mismatch("no config", lambda d: (d / CONFIG).unlink(), ["missing_file"]),
    Mismatch("no weights", lambda d: (d / WEIGHTS).unlink(), ["missing_file"]),
    Mismatch(
        "git LFS pointer",
        lambda d: (
            (d / WEIGHTS).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:abc\nsize 1\n") and None
        ),
        ["git_lfs_pointer"],
    ),
]


@pytest.mark.parametrize("mismatch", MISMATCHES, ids=lambda mismatch: mismatch.name)
def test_each_mismatch_is_reported_with_its_code(tmp_path: Path, base: Base, mismatch: Mismatch) -> None:
    adapter = write_adapter(tmp_path)
    mismatch.change(adapter)
    result = verify(adapter, base)
    assert errors(result) == mismatch.codes
    assert (result.verdict, result.compatible) == (BaseMatch.INCOMPATIBLE, False)
    for reason in result.reasons:
        assert reason.fix
        assert len(reason.message) < 600
    assert result.next.startswith("Do not load it.")


@pytest.mark.parametrize(
    ("change", "found", "expected"),
    [
        (tensors(adapter_shapes(shapes=model_shapes(layers=4))), "layers 0-3", "layers 0-1"),
        (tensors(adapter_shapes(shapes=model_shapes(layers=1))), "layer 0", "layers 0-1"),
        (tensors(adapter_shapes(shapes=model_shapes(hidden=64))), "hidden size 64", "hidden size 32"),
        (tensors(adapter_shapes(shapes=model_shapes(kv_rows=32))), "4 key and value heads", "2 key and value heads"),
        (configured(r=8), "rank 4", "rank 8"),
    ],
)
def test_a_wrong_size_is_explained_by_the_dimension_that_differs(
    tmp_path: Path, base: Base, change: Change, found: str, expected: str
) -> None:
    adapter = write_adapter(tmp_path)
    change(adapter)
    reason = verify(adapter, base).reasons[0]
    assert (reason.found, reason.expected) == (found, expected)


def test_a_head_for_a_larger_vocabulary_is_reported_as_resized(tmp_path: Path) -> None:
    shapes = {**SHAPES, "lm_head.weight": (48, 32)}
    untied = resolve(str(write_model(tmp_path / "m", shapes=shapes, tie_word_embeddings=False)), Settings())
    adapter = write_adapter(tmp_path / "a", targets=["lm_head"])
    larger = {"lm_head.weight": (52, 32)}
    tensors(adapter_shapes(["lm_head"], shapes=larger))(adapter)
    (reason, _) = verify(adapter, untied).reasons
    assert (reason.code, reason.found, reason.expected) == ("vocabulary_resized", "52", "48")


@pytest.mark.parametrize(
    "change", [configured(lora_alpha=80), configured(use_rslora=True), configured(alpha_pattern={})]
)
def test_an_edited_configuration_is_detected_by_its_hash(tmp_path: Path, base: Base, change: Change) -> None:
    adapter = record_base(write_adapter(tmp_path, alpha_pattern={"v_proj": 64}), base)
    assert verify(adapter, base).compatible
    change(adapter)
    result = verify(adapter, base)
    assert errors(result) == ["altered"]
    assert result.reasons[0].where == CONFIG


def test_replaced_weights_are_detected_by_their_hash_when_they_are_scanned(tmp_path: Path, base: Base) -> None:
    adapter = record_base(write_adapter(tmp_path), base)
    (adapter / WEIGHTS).write_bytes(safetensors_bytes(adapter_shapes(), fill=2))
    assert verify(adapter, base).verdict is BaseMatch.SAMPLED
    result = verify(adapter, base, scan_weights=True)
    assert (errors(result), result.reasons[0].where, result.scanned) == (["altered"], WEIGHTS, True)


@pytest.mark.parametrize(("fill", "code"), [(0xFF, "not_finite"), (0, "b_all_zero")])
def test_invalid_values_are_detected_only_when_the_weights_are_scanned(
    tmp_path: Path, base: Base, fill: int, code: str
) -> None:
    adapter = write_adapter(tmp_path)
    (adapter / WEIGHTS).write_bytes(safetensors_bytes(adapter_shapes(), fill=fill))
    assert errors(verify(adapter, base)) == []
    assert errors(verify(adapter, base, scan_weights=True)) == [code]


def test_all_problems_are_reported_together_with_one_error_of_each_kind(tmp_path: Path, base: Base) -> None:
    adapter = record_base(write_adapter(tmp_path), base)
    configured(r=0, use_dora=True)(adapter)
    foreign = {f"strange.{number}": (1,) for number in range(100)}
    added({**foreign, f"{Q0}.lora_A.weight": (4, 64), f"{Q0}.base_layer.weight": (32, 32)})(adapter)
    assert errors(verify(adapter, base, scan_weights=True)) == [
        "altered", "config_value", "unsupported_setting", "altered", "overwrites_base", "foreign_tensor", "shape",
    ]  # fmt: skip
    (adapter / WEIGHTS).write_bytes((adapter / WEIGHTS).read_bytes()[:-1])
    reasons = verify(adapter, base).reasons
    assert [reason.code for reason in reasons] == ["altered", "config_value", "unsupported_setting", "bad_file"]


def test_long_lists_of_long_names_are_shortened(tmp_path: Path, base: Base) -> None:
    adapter = write_adapter(tmp_path)
    added({f"{'x' * 500}.{number}": (1,) for number in range(100)})(adapter)
    reason = verify(adapter, base).reasons[0]
    assert "and 97 more" in reason.message
    assert len(reason.message) < 600


def test_valid_adapters_of_every_kind_are_accepted(tmp_path: Path, base: Base) -> None:
    adapters = [
        write_adapter(tmp_path / "two"),
        write_adapter(tmp_path / "all", targets=ALL_LINEAR, rank=16, use_rslora=True),
        write_adapter(tmp_path / "alpha", alpha_pattern={"layers.0.self_attn.q_proj": 64}),
    ]
    full_names = [f"model.layers.{i}.self_attn.{name}" for i in range(2) for name in ("q_proj", "v_proj")]
    adapters.append(write_adapter(tmp_path / "full_names"))
    configured(target_modules=full_names)(adapters[-1])
    adapters.append(write_adapter(tmp_path / "pattern"))
    configured(r=8, rank_pattern={"q_proj": 4, "layers.0.self_attn.v_proj": 4, "v_proj": 4})(adapters[-1])
    adapters.append(write_adapter(tmp_path / "layer", layers_to_transform=[1]))
    tensors({name: shape for name, shape in adapter_shapes().items() if "layers.1." in name})(adapters[-1])
    for adapter in adapters:
        result = verify(record_base(adapter, base), base, scan_weights=True)
        assert (result.reasons, result.verdict, result.scanned) == ([], BaseMatch.SAMPLED, True)


def test_half_precision_weights_are_accepted(tmp_path: Path, base: Base) -> None:
    for dtype in ("F16", "BF16"):
        adapter = write_adapter(tmp_path / dtype)
        tensors(adapter_shapes(), dtype)(adapter)
        assert errors(verify(adapter, base, scan_weights=True)) == []


def test_the_files_are_checked_even_without_a_base(tmp_path: Path, base: Base) -> None:
    adapter = record_base(write_adapter(tmp_path), base)
    result = verify(adapter, None)
    assert (errors(result), result.base_model, result.verdict) == (["base_unknown"], None, BaseMatch.INCOMPATIBLE)
    assert base.name in result.reasons[0].message
    configured(target_modules=["q_proj", "k_proj"])(adapter)
    added({"x": (1,), f"{Q0}.lora_A.weight": (8, 32)})(adapter)
    assert errors(verify(adapter, None)) == [
        "altered", "foreign_tensor", "rank", "not_targeted", "weights_missing", "base_unknown",
    ]  # fmt: skip


def test_the_result_names_adapter_and_base_and_suggests_the_next_call(tmp_path: Path, base: Base) -> None:
    adapter = record_base(write_adapter(tmp_path), base)
    result = verify(adapter, base)
    assert (result.adapter_path, result.base_model) == (str(adapter), base.name)
    assert 0 < result.elapsed_ms < 1000
    assert result.next == f"Call load_adapter(adapter_path={str(adapter)!r})."


def test_embeddings_and_norms_are_not_linear_modules() -> None:
    modules = linear_modules(SHAPES)
    assert len(modules) == 14
    assert modules["model.layers.0.self_attn.k_proj"] == (16, 32)
