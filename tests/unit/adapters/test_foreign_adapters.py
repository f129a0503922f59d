"""Unit tests of adapters from other programs: the table of real cases, other prefixes, and the format of mlx-lm."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from peft_core.adapters.config_check import LoraSettings
from peft_core.adapters.files import read_adapter
from peft_core.adapters.info import read_info
from peft_core.adapters.mlx_config import check_mlx_settings
from peft_core.adapters.registry import Registry
from peft_core.adapters.renaming import Renaming, find_renaming
from peft_core.adapters.verify import verify
from peft_core.base_models.resolve import resolve
from peft_core.config import Settings
from peft_core.errors import AdapterNotFound, InvalidArgument
from peft_core.paths import DataPaths
from peft_core.schemas.base_model import Base
from peft_core.schemas.results import BaseMatch, Compatibility, Reason
from tests.model_files import (
    SHAPES,
    adapter_shapes,
    safetensors_bytes,
    weights,
    write_adapter,
    write_cached,
    write_model,
)

WEIGHTS, CONFIG, MLX_WEIGHTS = "adapter_model.safetensors", "adapter_config.json", "adapters.safetensors"
P = "base_model.model."
UNSLOTH = r"(?:.*?(?:language|text).*?(?:q_proj|v_proj))|(?:\bmodel\.layers\.[\d]{1,}\.self_attn\.(?:q_proj|v_proj))"
BIASED = SHAPES | {f"{n.removesuffix('.weight')}.bias": shape[:1] for n, shape in SHAPES.items() if ".self_attn." in n}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Base:
    return resolve(str(write_model(tmp_path_factory.mktemp("base") / "tiny", values=weights())), Settings())


def found(result: Compatibility, severity: str = "error") -> list[str]:
    return [
        reason.code for reason in result.reasons if reason.severity == severity and reason.code != "base_not_recorded"
    ]


def reconfigure(adapter: Path, **changes: Any) -> None:
    config = json.loads((adapter / CONFIG).read_text())
    (adapter / CONFIG).write_text(json.dumps(config | changes))


def rename(adapter: Path, change: Callable[[str], str]) -> Path:
    shapes = {change(name): shape for name, shape in adapter_shapes().items()}
    (adapter / WEIGHTS).write_bytes(safetensors_bytes(shapes, fill=1))
    return adapter


# -- configurations ----------------------------------------------------------------------------------------------------

FITS: dict[str, tuple[dict[str, Any], list[str]]] = {
    "unsloth-auto-mapping": ({"auto_mapping": {"parent_library": "x", "unsloth_fixed": True}, "task_type": "CAUSAL_LM"}, []),
    "peft-without-task-type": ({"auto_mapping": {"base_model_class": "LlamaForCausalLM"}, "task_type": None}, []),
    "task-of-another-kind": ({"task_type": "SEQ_2_SEQ_LM"}, ["task_type"]),
    "targets-as-regex": ({"target_modules": UNSLOTH}, ["targets_from_weights"]),
    "targets-as-simple-regex": ({"target_modules": r".*\.self_attn\.(q_proj|v_proj)"}, ["targets_from_weights"]),
    "all-linear": ({"target_modules": "all-linear"}, ["targets_from_weights"]),
    "targets-of-many-families": ({"target_modules": ["q_proj", "v_proj", "c_attn", "Wqkv"]}, ["target_not_in_base"]),
    "ranks-as-regex": ({"rank_pattern": {".*q_proj": 4}}, []),
    "alpha-of-no-module": ({"alpha_pattern": {"c_attn": 4}}, ["pattern_not_in_base"]),
    "biases-that-the-base-lacks": ({"bias": "all"}, []),
    "ms-swift": ({"lora_dtype": None, "lorap_lr_ratio": None, "lorap_emb_lr": 1e-06}, []),
    "converted-corda": ({"corda_config": {"corda_method": "kpm"}, "init_lora_weights": True}, []),
    "loftq-block-unused": ({"loftq_config": {"loftq_bits": 4}, "init_lora_weights": True}, []),
}  # fmt: skip


@pytest.mark.parametrize(("config", "warnings"), FITS.values(), ids=FITS.keys())
def test_plain_lora_weights_fit_whatever_stands_beside_them(
    config: dict[str, Any], warnings: list[str], tmp_path: Path, base: Base
) -> None:
    adapter = write_adapter(tmp_path)
    reconfigure(adapter, **config)
    result = verify(adapter, base, scan_weights=True)
    assert (found(result), found(result, "warning")) == ([], warnings)
    assert result.verdict is BaseMatch.SHAPE_ONLY
    assert result.scanned


def test_the_warning_about_an_expression_names_the_modules(tmp_path: Path, base: Base) -> None:
    adapter = write_adapter(tmp_path)
    reconfigure(adapter, target_modules=UNSLOTH)
    (reason,) = [r for r in verify(adapter, base).reasons if r.code == "targets_from_weights"]
    assert "self_attn.q_proj, self_attn.v_proj" in reason.message
    assert "never run" in reason.message
    assert len(reason.message) < 400


def test_an_expression_may_choose_layers(tmp_path: Path, base: Base) -> None:
    adapter = write_adapter(tmp_path)
    shapes = {name: shape for name, shape in adapter_shapes().items() if "layers.0." in name}
    (adapter / WEIGHTS).write_bytes(safetensors_bytes(shapes, fill=1))
    assert found(verify(adapter, base)) == ["layer_count"]
    reconfigure(adapter, target_modules=r"model\.layers\.0\..*")
    assert found(verify(adapter, base)) == []


def test_a_scale_by_an_expression_is_refused_with_the_modules(tmp_path: Path, base: Base) -> None:
    adapter = write_adapter(tmp_path)
    reconfigure(adapter, alpha_pattern={".*q_proj": 64})
    (reason,) = [r for r in verify(adapter, base).reasons if r.severity == "error"]
    assert (reason.code, reason.where) == ("targets_not_literal", "alpha_pattern")
    assert "self_attn.q_proj" in reason.message


@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_trained_biases_are_refused_where_the_base_has_some(bias: str, tmp_path: Path) -> None:
    biased = resolve(str(write_model(tmp_path / "base", shapes=BIASED, attention_bias=True)), Settings())
    adapter = write_adapter(tmp_path / "adapter", bias=bias)
    (reason,) = [r for r in verify(adapter, biased).reasons if r.severity == "error"]
    assert "model.layers.0.self_attn.q_proj.bias" in reason.message


def test_targets_that_match_fused_experts_need_no_weights(tmp_path: Path) -> None:
    """Since transformers 5, experts are no modules of their own, but the file of the base model has one matrix for each."""
    experts = {
        f"model.layers.{i}.mlp.experts.{n}.{part}.weight": shape
        for i in range(2) for n in range(2) for part, shape in {"up_proj": (16, 32), "down_proj": (32, 16)}.items()
    }  # fmt: skip
    moe = resolve(str(write_model(tmp_path / "base", shapes=SHAPES | experts, model_type="mixtral")), Settings())
    adapter = write_adapter(tmp_path / "adapter", targets=["q_proj", "down_proj"])
    assert found(verify(adapter, moe)) == []
    adapted = write_adapter(tmp_path / "adapted", targets=["down_proj"])
    single = adapter_shapes(["down_proj"], shapes=SHAPES | experts)
    (adapted / WEIGHTS).write_bytes(safetensors_bytes(single, fill=1))
    assert (found(verify(adapted, moe)), found(verify(adapted, moe), "warning")) == ([], ["experts"])


def test_a_byte_order_mark_before_the_configuration_is_skipped(tmp_path: Path, base: Base) -> None:
    adapter = write_adapter(tmp_path)
    (adapter / CONFIG).write_text((adapter / CONFIG).read_text(), encoding="utf-8-sig")
    assert found(verify(adapter, base)) == []


def test_a_linked_file_is_told_how_to_copy(tmp_path: Path, base: Base) -> None:
    adapter = write_adapter(tmp_path / "adapter")
    (adapter / WEIGHTS).rename(tmp_path / "elsewhere")
    (adapter / WEIGHTS).symlink_to(tmp_path / "elsewhere")
    (reason,) = [r for r in verify(adapter, base).reasons if r.code == "bad_file"]
    assert "cp -rL" in (reason.fix or "")


def test_an_adapted_head_needs_a_base_with_a_head_of_its_own(tmp_path: Path, base: Base) -> None:
    head = {f"{P}lm_head.lora_A.weight": (4, 32), f"{P}lm_head.lora_B.weight": (48, 4)}
    adapter = write_adapter(tmp_path / "adapter", targets=["q_proj", "v_proj", "lm_head"])
    assert found(verify(adapter, base)) == []  # without weights for it
    (adapter / WEIGHTS).write_bytes(safetensors_bytes(adapter_shapes() | head, fill=1))
    assert found(verify(adapter, base)) == ["tied_head"]
    shapes = SHAPES | {"lm_head.weight": (48, 32)}
    untied = resolve(str(write_model(tmp_path / "base", shapes=shapes, tie_word_embeddings=False)), Settings())
    assert found(verify(adapter, untied)) == []


def test_dora_is_one_reason(tmp_path: Path, base: Base) -> None:
    adapter = write_adapter(tmp_path, use_dora=True)
    magnitudes = {f"{P}model.layers.0.self_attn.q_proj.lora_magnitude_vector": (32,)}
    (adapter / WEIGHTS).write_bytes(safetensors_bytes(adapter_shapes() | magnitudes, fill=1))
    assert found(verify(adapter, base)) == ["unsupported_setting"]


@pytest.mark.parametrize("method", ["IA3", "ADALORA"])
def test_another_method_is_one_reason_whatever_its_weights(method: str, tmp_path: Path, base: Base) -> None:
    adapter = write_adapter(tmp_path)
    reconfigure(adapter, peft_type=method, target_r=8, feedforward_modules=["down_proj"])
    (adapter / WEIGHTS).write_bytes(safetensors_bytes({f"{P}model.layers.0.mlp.down_proj.ia3_l": (64,)}, fill=1))
    assert found(verify(adapter, base)) == ["not_lora"]


# -- directories -------------------------------------------------------------------------------------------------------


def only_error(directory: Path, base: Base) -> Reason:
    (reason,) = [r for r in verify(directory, base).reasons if r.severity == "error"]
    assert reason.fix is not None
    assert len(reason.message) - len(str(directory)) < 400
    assert len(reason.fix) < 400
    return reason


def test_a_directory_of_checkpoints_names_those_with_an_adapter(tmp_path: Path, base: Base) -> None:
    for step in (100, 20, 1000):
        write_adapter(tmp_path / f"checkpoint-{step}")
    (tmp_path / "runs").mkdir()
    (tmp_path / "trainer_state.json").write_text("{}")
    reason = only_error(tmp_path, base)
    assert reason.code == "missing_file"
    assert "checkpoint-20, checkpoint-100, checkpoint-1000" in reason.message
    assert reason.fix == f"Give the path of one of them, such as {tmp_path / 'checkpoint-1000'}"
    with pytest.raises(AdapterNotFound, match="checkpoint-1000"):
        read_info(tmp_path)


def test_a_whole_model_is_told_from_an_adapter(tmp_path: Path, base: Base) -> None:
    reason = only_error(write_model(tmp_path), base)
    assert "whole model" in reason.message


@pytest.mark.parametrize(
    ("files", "code", "words"),
    [
        (["adapter_config.json", "adapter_model-00001-of-00002.safetensors"], "sharded", "adapter_model-*.safetensors"),
        (["adapter_config.json", "adapter_model.bin"], "pickle", "weights_only=True"),
        (["adapter_config.json", "adapter_0.pt"], "pickle", "torch.load('adapter_0.pt'"),
        (["adapter_config.json", "adapter';reboot;'.bin"], "pickle", "Save the adapter again"),
        (["adapter_config.json", "lora.safetensors"], "missing_file", "rename it to adapter_model.safetensors"),
        (["adapter_config.json", "lora.gguf"], "missing_file", "original"),
        (["adapter_config.json", "0000100_adapters.safetensors"], "missing_file", "Copy the one to use"),
        (["adapters.npz"], "missing_file", "mx.save_safetensors"),
        (["adapter.zip"], "missing_file", "Unpack it"),
        (["adapter_model.safetensors"], "missing_file", "Give the path of an adapter's directory"),
        ([], "missing_file", "Give the path of an adapter's directory"),
    ],
)
def test_weights_in_another_form_are_told_with_the_next_step(
    files: list[str], code: str, words: str, tmp_path: Path, base: Base
) -> None:
    for name in files:
        (tmp_path / name).write_bytes(safetensors_bytes(adapter_shapes()) if name.endswith(".safetensors") else b"")
    if CONFIG in files:
        (tmp_path / CONFIG).write_text(
            json.dumps({"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"]})
        )
    reason = only_error(tmp_path, base)
    assert reason.code == code
    assert words in (reason.fix or "")


@pytest.mark.slow
def test_the_command_for_shards_joins_them(tmp_path: Path, base: Base) -> None:
    adapter = write_adapter(tmp_path)
    names = sorted(adapter_shapes())
    for number in range(2):
        part = {name: adapter_shapes()[name] for name in names[number::2]}
        (adapter / f"adapter_model-0000{number + 1}-of-00002.safetensors").write_bytes(safetensors_bytes(part, fill=1))
    (adapter / WEIGHTS).unlink()
    arguments = shlex.split((only_error(adapter, base).fix or "").split("`")[1])
    subprocess.run([sys.executable, *arguments[1:]], cwd=adapter, check=True)
    assert found(verify(adapter, base, scan_weights=True)) == []


def test_an_archive_is_to_be_unpacked(tmp_path: Path) -> None:
    archive = tmp_path / "adapter.zip"
    archive.write_bytes(b"PK")
    with pytest.raises(AdapterNotFound) as caught:
        Registry(DataPaths(tmp_path)).resolve_adapter(str(archive))
    assert "Unpack" in caught.value.suggestions[0]


def cached_adapter(cache: Path, commit: str = "a" * 40) -> Path:
    """Put an adapter into a Hugging Face cache as the repository org/adapter."""
    return write_cached(cache, "org/adapter", commit, write_adapter(cache.parent / "uploaded"))


def test_an_adapter_in_the_cache_is_read_by_its_snapshot_and_by_its_hub_id(
    tmp_path: Path, base: Base, monkeypatch: pytest.MonkeyPatch
) -> None:
    snapshot = cached_adapter(tmp_path / "hub")
    assert (snapshot / WEIGHTS).is_symlink()
    assert found(verify(snapshot, base, scan_weights=True)) == []
    assert read_info(snapshot, trained_here=False).adapter_bytes > 0
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    registry = Registry(DataPaths(tmp_path / "data"))
    assert registry.resolve_adapter("org/adapter") == snapshot
    with pytest.raises(AdapterNotFound) as caught:
        registry.resolve_adapter("org/other")
    assert "hf download org/other" in caught.value.suggestions[0]
    with pytest.raises(InvalidArgument):
        Registry(DataPaths(tmp_path / "data"), [tmp_path / "elsewhere"]).resolve_adapter("org/adapter")


@pytest.mark.parametrize(
    "target", ["/etc/passwd", "../../../secret", "../../blobs/../../../secret", "../../blobs/x", "../secret"]
)
def test_a_link_out_of_the_cache_is_not_followed(target: str, tmp_path: Path, base: Base) -> None:
    snapshot = cached_adapter(tmp_path / "hub")
    (snapshot / CONFIG).unlink()
    (snapshot / CONFIG).symlink_to(target)
    assert found(verify(snapshot, base)) == ["bad_file"]


def test_a_link_to_a_blob_is_followed_only_in_a_snapshot(tmp_path: Path, base: Base) -> None:
    snapshot = cached_adapter(tmp_path / "hub")
    copy = tmp_path / "copy" / "snapshots" / "main"
    copy.mkdir(parents=True)
    for file in snapshot.iterdir():
        (copy / file.name).symlink_to(file.readlink())
    (tmp_path / "copy" / "blobs").symlink_to(tmp_path / "hub" / "models--org--adapter" / "blobs")
    assert found(verify(copy, base)) == ["bad_file", "bad_file"]


# -- what get_adapter_info says ----------------------------------------------------------------------------------------


def test_the_description_of_an_mlx_adapter_has_its_rank_scale_and_modules(tmp_path: Path) -> None:
    info = read_info(write_mlx(tmp_path), trained_here=False)
    assert (info.rank, info.alpha, info.target_modules) == (4, 80.0, ["q_proj", "v_proj"])
    assert info.adapter_bytes == (tmp_path / MLX_WEIGHTS).stat().st_size


def test_the_description_names_the_modules_where_the_configuration_has_an_expression(tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path)
    reconfigure(adapter, target_modules=UNSLOTH)
    assert read_info(adapter, trained_here=False).target_modules == ["q_proj", "v_proj"]


# -- prefixes ----------------------------------------------------------------------------------------------------------

PREFIXES = {
    "language-model-inside": (f"{P}model.", f"{P}model.language_model."),
    "language-model-outside": (f"{P}model.", f"{P}language_model.model."),
    "compiled": (f"{P}model.", f"{P}_orig_mod.model."),
    "distributed": (f"{P}model.", f"{P}module.model."),
    "peft-twice": (f"{P}model.", f"{P}{P}model."),
    "model-twice": (f"{P}model.", f"{P}model.model."),
    "model-missing": (f"{P}model.", f"{P}"),
    "another-name": (f"{P}model.", f"{P}transformer."),
    "wrapped-outside": (f"{P}", f"module.{P}"),
    "no-prefix": (f"{P}", ""),
    "one-prefix": (f"{P}", "model."),
}


@pytest.mark.parametrize(("right", "wrong"), PREFIXES.values(), ids=PREFIXES.keys())
def test_another_prefix_is_one_reason_with_a_command_that_repairs_it(
    right: str, wrong: str, tmp_path: Path, base: Base
) -> None:
    adapter = rename(write_adapter(tmp_path), lambda name: wrong + name.removeprefix(right))
    result = verify(adapter, base)
    (reason,) = [r for r in result.reasons if r.severity == "error"]
    assert reason.code in ("other_prefix", "prefix_stripped")
    assert result.verdict is BaseMatch.INCOMPATIBLE
    assert reason.fix is not None
    assert len(reason.message) < 400
    assert len(reason.fix) < 400
    renaming = Renaming(reason.found or "", reason.expected or "", applies_to_all=True)
    rename(adapter, lambda name: renaming(wrong + name.removeprefix(right)))
    assert found(verify(adapter, base)) == []


@pytest.mark.slow
def test_the_command_of_the_fix_renames_the_tensors(tmp_path: Path, base: Base) -> None:
    adapter = rename(write_adapter(tmp_path), lambda name: name.replace("model.layers", "model.language_model.layers"))
    (reason,) = [r for r in verify(adapter, base).reasons if r.severity == "error"]
    arguments = shlex.split((reason.fix or "").split("`")[1])
    subprocess.run([sys.executable, *arguments[1:]], cwd=adapter, check=True)
    assert found(verify(adapter, base, scan_weights=True)) == []


def test_names_of_the_other_prefix_in_the_configuration_are_part_of_the_fix(tmp_path: Path, base: Base) -> None:
    adapter = rename(write_adapter(tmp_path), lambda name: name.replace("model.layers", "model.text.layers"))
    targets = [f"model.text.layers.{i}.self_attn.{name}" for i in range(2) for name in ("q_proj", "v_proj")]
    reconfigure(adapter, target_modules=targets)
    (reason,) = [r for r in verify(adapter, base).reasons if r.severity == "error"]
    assert "replace 'model.text.' by 'model.' in adapter_config.json" in (reason.fix or "")


def test_a_prefix_is_named_only_if_every_module_and_size_fits(tmp_path: Path, base: Base) -> None:
    adapter = write_adapter(tmp_path)
    vision = {f"{P}model.visual.blocks.0.attn.q_proj.lora_A.weight": (4, 32)}
    shapes = {name.replace("model.layers", "model.text.layers"): shape for name, shape in adapter_shapes().items()}
    (adapter / WEIGHTS).write_bytes(safetensors_bytes(shapes | vision, fill=1))
    assert "other_prefix" not in found(verify(adapter, base))
    wider = {name: (4, 64) if "lora_A" in name else shape for name, shape in shapes.items()}
    (adapter / WEIGHTS).write_bytes(safetensors_bytes(wider, fill=1))
    assert "other_prefix" not in found(verify(adapter, base))


def test_a_prefix_that_a_shell_would_interpret_is_not_put_into_a_command(tmp_path: Path, base: Base) -> None:
    adapter = rename(write_adapter(tmp_path), lambda name: f"$(touch x)'\"{name}")
    assert all("touch" not in (reason.fix or "") for reason in verify(adapter, base).reasons)


def test_names_with_many_dots_are_not_searched() -> None:
    assert find_renaming({"a." * 200_000 + "q_proj"}, {"q_proj"}) is None


NAME = st.lists(st.sampled_from(["model", "layers", "0", "1", "q_proj", "x"]), min_size=1, max_size=5).map(".".join)


@given(known=st.sets(NAME, min_size=1, max_size=8), prefix=NAME)
def test_a_prefix_that_was_put_before_every_name_is_found(known: set[str], prefix: str) -> None:
    paths = {f"{prefix}.{name}" for name in known}
    renaming = find_renaming(paths, known)
    if paths != known and renaming is not None:
        assert {renaming(path) for path in paths} <= known


# -- mlx-lm ------------------------------------------------------------------------------------------------------------

PARAMETERS = {"rank": 4, "scale": 20.0, "dropout": 0.0}


def write_mlx(
    directory: Path, shapes: dict[str, tuple[int, ...]] | None = None, dtype: str = "F32", **config: Any
) -> Path:
    """Write what mlx-lm writes: transposed matrices, and all arguments of the training as the configuration."""
    directory.mkdir(parents=True, exist_ok=True)
    shapes = adapter_shapes() if shapes is None else shapes
    named = {
        name.removeprefix(P).replace("lora_A.weight", "lora_a").replace("lora_B.weight", "lora_b"): shape[::-1]
        for name, shape in shapes.items()
    }
    (directory / MLX_WEIGHTS).write_bytes(safetensors_bytes(named, dtype, fill=1))
    arguments = {
        "model": "mlx-community/tiny-4bit", "fine_tune_type": "lora", "num_layers": 16, "lora_parameters": PARAMETERS,
        "optimizer": "adam", "iters": 1000, "trust_remote_code": True, "train": True, "lr_schedule": None,
    }  # fmt: skip
    (directory / CONFIG).write_text(json.dumps(arguments | config))
    return directory


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
def test_an_mlx_adapter_fits(dtype: str, tmp_path: Path, base: Base) -> None:
    adapter = write_mlx(tmp_path, dtype=dtype)
    result = verify(adapter, base, scan_weights=True)
    assert (found(result), found(result, "warning"), result.verdict) == ([], [], BaseMatch.SHAPE_ONLY)
    settings = read_adapter(adapter).settings
    assert settings is not None
    assert settings.scale_of("any", settings.rank) == 20.0
    assert "mlx-community/tiny-4bit" in result.reasons[-1].message


@pytest.mark.parametrize(("fill", "code"), [(0xFF, "not_finite"), (0, "b_all_zero")])
def test_the_values_of_an_mlx_adapter_are_scanned(fill: int, code: str, tmp_path: Path, base: Base) -> None:
    adapter = write_mlx(tmp_path)
    shapes = {name: tensor.shape for name, tensor in (read_adapter(adapter).tensors or {}).items()}
    (adapter / MLX_WEIGHTS).write_bytes(safetensors_bytes(shapes, fill=fill))
    assert found(verify(adapter, base, scan_weights=True)) == [code]


def test_a_configuration_of_peft_beside_the_file_of_mlx_is_told(tmp_path: Path, base: Base) -> None:
    adapter = write_adapter(tmp_path)
    (adapter / WEIGHTS).rename(adapter / MLX_WEIGHTS)
    reason = next(r for r in verify(adapter, base).reasons if r.where == "lora_parameters")
    assert f"rename {MLX_WEIGHTS} to {WEIGHTS}" in (reason.fix or "")


MLX_CASES: dict[str, tuple[dict[str, Any], list[str]]] = {
    "old-name-of-the-layers": ({"num_layers": None, "lora_layers": 16}, []),
    "no-fine-tune-type": ({"fine_tune_type": None}, []),
    "keys": ({"lora_parameters": PARAMETERS | {"keys": ["self_attn.q_proj"]}}, []),
    "dora": ({"fine_tune_type": "dora"}, ["not_lora"]),
    "old-dora": ({"fine_tune_type": None, "use_dora": True}, ["not_lora"]),
    "full": ({"fine_tune_type": "full"}, ["not_lora"]),
    "alpha-without-scale": ({"lora_parameters": {"rank": 4, "alpha": 8}}, ["config_value"]),
    "infinite-scale": ({"lora_parameters": PARAMETERS | {"scale": float("inf")}}, ["config_value"]),
    "huge-rank": ({"lora_parameters": PARAMETERS | {"rank": 10**9}}, ["config_value"]),
    "no-parameters": ({"lora_parameters": None}, ["config_value"]),
    "unknown-parameter": ({"lora_parameters": PARAMETERS | {"of_the_future": 1}}, ["unsupported_setting"]),
    "another-rank": ({"lora_parameters": PARAMETERS | {"rank": 8}}, ["rank"]),
}  # fmt: skip


@pytest.mark.parametrize(("config", "codes"), MLX_CASES.values(), ids=MLX_CASES.keys())
def test_the_configuration_of_mlx_is_checked(
    config: dict[str, Any], codes: list[str], tmp_path: Path, base: Base
) -> None:
    assert found(verify(write_mlx(tmp_path, **config), base)) == codes


def test_an_alpha_beside_the_scale_is_a_warning(tmp_path: Path, base: Base) -> None:
    adapter = write_mlx(tmp_path, lora_parameters={"rank": 4, "alpha": 16, "scale": 10.0, "dropout": 0.0})
    (reason,) = [r for r in verify(adapter, base).reasons if r.code == "mlx_alpha"]
    assert (reason.severity, reason.found) == ("warning", "scale 10, alpha 16")
    assert "40" in reason.message


def test_the_tensors_of_mlx_are_checked(tmp_path: Path, base: Base) -> None:
    q = f"{P}model.layers.1.self_attn.q_proj"
    assert found(verify(write_mlx(tmp_path / "a", {f"{q}.lora_A.weight": (4, 32)}), base)) == ["unpaired"]
    wide = {f"{q}.lora_A.weight": (4, 64), f"{q}.lora_B.weight": (32, 4)}
    assert found(verify(write_mlx(tmp_path / "b", wide), base)) == ["shape"]
    magnitude = adapter_shapes() | {f"{P}model.layers.1.self_attn.q_proj.m": (32,)}
    assert found(verify(write_mlx(tmp_path / "c", magnitude), base)) == ["dora_weights"]
    first_layer = {name: shape for name, shape in adapter_shapes().items() if "layers.0." in name}
    assert found(verify(write_mlx(tmp_path / "d", first_layer), base)) == [
        "layer_count"
    ]  # mlx-lm adapts the last layers
    last_layer = {name: shape for name, shape in adapter_shapes().items() if "layers.1." in name}
    assert found(verify(write_mlx(tmp_path / "e", last_layer), base)) == []
    wrapped = {name.replace("model.layers", "language_model.model.layers"): s for name, s in adapter_shapes().items()}
    (reason, _) = verify(write_mlx(tmp_path / "f", wrapped), base).reasons
    assert (reason.code, reason.found, reason.expected) == ("other_prefix", "language_model.", "")
    assert "adapters.safetensors" in (reason.fix or "")


def test_peft_names_in_the_file_of_mlx_are_told(tmp_path: Path, base: Base) -> None:
    adapter = write_mlx(tmp_path)
    (adapter / MLX_WEIGHTS).write_bytes(safetensors_bytes(adapter_shapes(), fill=1))
    (reason,) = [r for r in verify(adapter, base).reasons if r.code == "peft_names"]
    assert WEIGHTS in (reason.fix or "")


def test_the_weights_of_peft_are_read_where_both_files_exist(tmp_path: Path, base: Base) -> None:
    adapter = write_adapter(tmp_path)
    (adapter / MLX_WEIGHTS).write_bytes(b"")
    assert found(verify(adapter, base)) == []


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from([*PARAMETERS, "alpha", "x"]), inner, max_size=4)
    ),
    max_leaves=8,
)


@given(st.dictionaries(st.sampled_from(["fine_tune_type", "lora_parameters", "use_dora"]), JSON))
def test_no_json_object_makes_the_check_of_mlx_raise(config: dict[str, Any]) -> None:
    settings, reasons = check_mlx_settings(config)
    assert (settings is None) == any(reason.severity == "error" for reason in reasons)
    assert all(reason.message.isprintable() and len(reason.message) < 400 for reason in reasons)
    assert settings is None or isinstance(settings, LoraSettings)
