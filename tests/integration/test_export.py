"""Exports of small models in llama.cpp and PEFT: every conversion rule, and that a wrong one is refused."""

from __future__ import annotations

import json
import math
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from peft_core.base_models.families import FAMILIES, LLAMA_CPP
from peft_core.base_models.gguf import read_gguf_header
from peft_core.base_models.resolve import resolve
from peft_core.config import Settings
from peft_core.errors import BaseCheckpointError, ExportError
from peft_core.export.request import ExportRequest
from peft_core.export.worker import run
from peft_core.llamacpp.worker import gguf_lora
from peft_core.llamacpp.worker.hf_gguf import write_hf_gguf
from peft_core.schemas.export import ExportReport
from tests.factories import make_base, record_base
from tests.tiny_models import TEMPLATE, tiny_model, write_byte_level_tokenizer, write_tiny_base

LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "patterns": {"rank_pattern": {"q_proj": 2, "down_proj": 6}, "alpha_pattern": {"k_proj": 3, "up_proj": 20}},
}


def write_adapter(directory: Path, base: Path, architecture: str, **config: Any) -> Path:
    """Write an adapter of large effect on every linear layer."""
    settings = {"r": 4, "lora_alpha": 8, "target_modules": LINEAR, **config}
    model = get_peft_model(tiny_model(architecture), LoraConfig(task_type="CAUSAL_LM", **settings))
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)
    model.save_pretrained(str(directory), save_embedding_layers=False)
    return record_base(directory, resolve(str(base), Settings()))


@pytest.fixture
def make(tmp_path: Path) -> Any:
    """Return a function that exports an adapter of a tiny model."""

    def export(
        architecture: str,
        to: str,
        form: str,
        *,
        base_format: str = "huggingface",
        fill_in_the_middle: bool = False,
        inside: str = ".",
        own_head: bool = False,
        **config: Any,
    ) -> ExportReport:
        root = tmp_path / inside
        base = write_tiny_base(root / "base", architecture)
        if own_head:  # although its configuration says that it is the embedding
            tensors = load_file(base / "model.safetensors")
            tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].flip(0)
            save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
        write_byte_level_tokenizer(base, ["<fim_prefix>", "<fim_suffix>", "<fim_middle>"] if fill_in_the_middle else [])
        if base_format == "gguf":
            write_hf_gguf(resolve(str(base), Settings()), None, root / "base.gguf", "f32")
            base = root / "base.gguf"
        adapter = write_adapter(root / "adapter", base, architecture, **config)
        request = ExportRequest(
            adapter_path=adapter,
            adapter_id="adapter",
            base=resolve(str(base), Settings()),
            base_was_named=False,
            to=to,
            format=form,
            directory=root / "out" / "export",
            overwrite=False,
            token="0123",  # noqa: S106 -- a part of a directory's name
            held_out=None,
            base_models_dir=tmp_path / "bases",
            lock=tmp_path / "exports.lock",
        )
        return run.export(request, lambda *_: None)

    return export


@pytest.mark.parametrize(
    ("architecture", "settings"),
    [
        ("llama", "plain"),
        ("llama", "rslora"),
        ("llama", "patterns"),
        ("qwen2", "patterns"),
        ("qwen3", "rslora"),
        ("gemma", "patterns"),
        ("granite", "plain"),
        ("smollm3", "rslora"),
    ],
)
def test_a_lora_file_computes_in_llama_cpp_what_peft_computes(make: Any, architecture: str, settings: str) -> None:
    report = make(architecture, "gguf-lora", "f32", **SETTINGS[settings])
    verified = report.verification
    assert verified.status == "verified"
    assert verified.positions == 200
    assert verified.mean_difference < 0.01
    assert verified.effect > 0.3
    assert verified.effect_error < 0.02
    assert verified.runtime_gain == pytest.approx(verified.gain, abs=0.01)
    metadata = read_gguf_header(Path(report.files[0].path)).metadata
    assert metadata["adapter.lora.alpha"] == 8.0
    assert metadata["peft_mcp.base.fingerprint.sample"] == report.base_fingerprint["sample"]


def test_files_are_named_as_a_shell_and_a_modelfile_take_them(make: Any) -> None:
    usage = make("llama", "gguf-lora", "f32", base_format="gguf", inside="it's a place, ü").usage
    arguments = shlex.split(usage[0])
    named = re.findall(r"`(?:FROM|ADAPTER) (.*?)`", usage[1])  # Ollama takes single quotes for a part of the name
    assert named == [arguments[2], arguments[4]]
    assert all(Path(name).is_file() for name in named)


@pytest.mark.parametrize("mistake", ["rows of q and k in PEFT's order", "rsLoRA taken for LoRA"])
def test_a_file_that_computes_something_else_is_refused_and_deleted(
    make: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mistake: str
) -> None:
    config = {}
    if mistake == "rsLoRA taken for LoRA":
        config = {"use_rslora": True}
        too_much = math.sqrt(4)  # of the rank
        monkeypatch.setattr(
            "peft_core.llamacpp.worker.lora_pairs.LoraPair.folded",
            lambda pair, remaining=1.0: pair.b_OR * (pair.scale / too_much / remaining),
        )
    else:
        monkeypatch.setattr(gguf_lora, "permuted", lambda rows, *_: rows)
    with pytest.raises(ExportError, match="computes something else") as refused:
        make("llama", "gguf-lora", "f32", **config)
    assert refused.value.code == "export_not_equal"
    assert refused.value.details["effect_error"] > 0.1
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize(
    ("architecture", "base_format", "form", "difference"),
    [
        ("llama", "huggingface", "f16", 0.01),
        ("qwen3", "huggingface", "f32", 0.003),
        ("llama", "gguf", "f32", 0.003),
        ("llama", "gguf", "q8_0", 0.2),
        ("llama", "gguf", "q6_k", 0.2),  # in fact Q8_0: rows of 32 and 48
    ],
)
def test_a_merged_file_computes_in_llama_cpp_what_peft_computes(
    make: Any, architecture: str, base_format: str, form: str, difference: float
) -> None:
    report = make(architecture, "merged", form, base_format=base_format, use_rslora=True)
    verified = report.verification
    assert verified.status == "verified"
    assert verified.mean_difference < difference
    assert verified.kept == pytest.approx(1, abs=0.1)
    header = read_gguf_header(Path(report.files[0].path), arrays=["tokenizer.ggml.tokens"])
    assert header.metadata["tokenizer.ggml.pre"] == "gpt-2"
    assert len(header.metadata["tokenizer.ggml.tokens"]) == 99
    assert header.text("tokenizer.chat_template") == TEMPLATE


def test_a_written_model_begins_and_ends_a_text_as_its_tokenizer_does(tmp_path: Path) -> None:
    base = write_tiny_base(tmp_path / "base")
    write_byte_level_tokenizer(base, begins=True)
    settings = json.loads((base / "tokenizer_config.json").read_text())
    del settings["eos_token"]
    (base / "tokenizer_config.json").write_text(json.dumps(settings))
    (base / "generation_config.json").write_text('{"eos_token_id": 2}')
    write_hf_gguf(resolve(str(base), Settings()), None, tmp_path / "base.gguf", "f32")
    metadata = read_gguf_header(tmp_path / "base.gguf").metadata
    assert metadata["tokenizer.ggml.add_bos_token"] is True
    assert (metadata["tokenizer.ggml.bos_token_id"], metadata["tokenizer.ggml.eos_token_id"]) == (1, 2)


def test_merging_into_4_bits_is_done_if_asked_for_and_the_loss_is_said(make: Any) -> None:
    report = make("llama", "merged", "q4_0", base_format="gguf")
    assert report.verification.status == "verified"
    assert report.verification.limit is None
    assert "verified in F16" in report.summary
    assert [Path(file.path).suffix for file in report.files] == [".gguf"]
    assert any("of the gain of a 135M model, 32 % was lost" in warning for warning in report.warnings)


@pytest.mark.parametrize("to", ["vllm", "mlx", "hub", "merged"])
def test_a_directory_computes_in_peft_what_the_adapter_computes(make: Any, to: str, tmp_path: Path) -> None:
    both = {"use_rslora": True, **SETTINGS["patterns"]}
    report = make("llama", to, "huggingface" if to == "merged" else "f32", **both)
    assert report.verification.status == "verified"
    assert report.verification.mean_difference < 1e-4
    assert report.verification.effect > 0.3
    for file in Path(report.directory).iterdir():
        assert str(tmp_path) not in file.read_bytes().decode("latin-1"), file


def test_a_merged_directory_says_that_its_output_head_is_not_the_embedding(make: Any) -> None:
    report = make("llama", "merged", "huggingface", own_head=True)
    assert report.verification.status == "verified"
    config = json.loads((Path(report.directory) / "config.json").read_text())
    assert config["tie_word_embeddings"] is False, "the file has a head of its own, which vLLM would not load otherwise"


@pytest.mark.parametrize("to", ["vllm", "mlx"])
def test_a_base_that_other_programs_load_without_its_output_head_is_warned_of(make: Any, to: str) -> None:
    assert any(
        'set "tie_word_embeddings": false' in warning for warning in make("llama", to, "f32", own_head=True).warnings
    )


def test_a_normalised_directory_needs_none_of_the_settings_that_servers_ignore(make: Any) -> None:
    report = make("llama", "vllm", "f32", use_rslora=True, **SETTINGS["patterns"])
    config = json.loads((Path(report.directory) / "adapter_config.json").read_text())
    assert config["r"] == config["lora_alpha"] == 6
    assert isinstance(config["lora_alpha"], int)
    assert not any(config[name] for name in ("use_rslora", "rank_pattern", "alpha_pattern"))
    assert sorted(config["target_modules"]) == sorted(LINEAR)
    tensors = load_file(Path(report.directory) / "adapter_model.safetensors")
    assert {tensor.shape[0] for name, tensor in tensors.items() if "lora_A" in name} == {6}
    assert any("--max-lora-rank 8" in line for line in report.usage)


def test_an_adapter_for_mlx_has_its_matrices_transposed(make: Any) -> None:
    report = make("llama", "mlx", "f32")
    tensors = load_file(Path(report.directory) / "adapters.safetensors")
    assert tensors["model.layers.1.mlp.down_proj.lora_a"].shape == (48, 4)
    assert tensors["model.layers.1.mlp.down_proj.lora_b"].shape == (4, 32)
    config = json.loads((Path(report.directory) / "adapter_config.json").read_text())
    assert config["num_layers"] == 2
    assert config["lora_parameters"]["scale"] == 1.0
    assert config["lora_parameters"]["keys"] == sorted(
        f"{'mlp' if name in ('gate_proj', 'up_proj', 'down_proj') else 'self_attn'}.{name}" for name in LINEAR
    )


def test_editors_get_the_address_the_name_and_the_form_of_a_prompt(make: Any) -> None:
    report = make("llama", "editors", "f32", fill_in_the_middle=True)
    assert report.verification.status == "verified"
    directory = Path(report.directory)
    zed = json.loads((directory / "zed.settings.json").read_text())["edit_predictions"]["open_ai_compatible_api"]
    assert zed["api_url"] == "http://127.0.0.1:8012/v1/completions"
    assert zed["prompt_format"] == "star_coder"
    assert zed["model"] == "base-web"
    assert f"--alias {zed['model']}" in report.usage[0]
    vscode = json.loads((directory / "llama.vscode.settings.json").read_text())
    assert vscode == {"llama-vscode.endpoint": "http://127.0.0.1:8012", "llama-vscode.lora_completion": ""}
    assert (
        "<fim_prefix>{{{prefix}}}<fim_suffix>{{{suffix}}}<fim_middle>"
        in (directory / "continue.config.yaml").read_text()
    )


def test_editors_need_a_base_with_fill_in_the_middle_tokens(make: Any) -> None:
    with pytest.raises(ExportError, match="no fill-in-the-middle tokens"):
        make("llama", "editors", "f32")


@pytest.mark.parametrize("architecture", sorted({*FAMILIES} - {"helium", "gpt_neox"}))
def test_every_linear_layer_of_a_family_that_is_trained_has_a_name_in_llama_cpp(architecture: str) -> None:
    with torch.device("meta"):
        model = tiny_model(architecture)
    base = make_base(model_type=architecture)
    modules = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear) and "." in name]
    names = {gguf_lora.gguf_name(module, base, LLAMA_CPP[architecture]) for module in modules}
    assert len(names) == len(modules) > 0


@pytest.mark.parametrize("architecture", ["helium", "gpt_neox"])
def test_a_family_that_llama_cpp_stores_otherwise_is_refused(architecture: str) -> None:
    with pytest.raises(BaseCheckpointError, match="cannot be exported to GGUF"):
        gguf_lora.llama_cpp_format(make_base(model_type=architecture))
