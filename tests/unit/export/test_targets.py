from __future__ import annotations

import pytest

from peft_core.errors import InvalidArgument
from peft_core.export.targets import FORMATS, TARGETS, parse_format, parse_target
from peft_core.llamacpp import runtime
from tests.factories import SMOLLM2_SHAPE

LARGE = SMOLLM2_SHAPE.model_copy(update={"parameters": 7_000_000_000})


def test_every_target_has_formats() -> None:
    assert set(FORMATS) == set(TARGETS)


@pytest.mark.parametrize("name", ["gguf-lora", "GGUF_LoRA", " gguf-lora "])
def test_a_target_is_recognised_in_other_spellings(name: str) -> None:
    assert parse_target(name) == "gguf-lora"


@pytest.mark.parametrize("name", ["", "gguf", "../gguf-lora", "gguf-lora\n;rm", "x" * 10_000])
def test_an_unknown_target_is_refused_with_those_that_there_are(name: str) -> None:
    with pytest.raises(InvalidArgument, match="must be one of gguf-lora, merged") as refused:
        parse_target(name)
    assert len(str(refused.value)) < 400


def test_a_small_merged_model_is_not_quantised_by_default_and_a_large_one_to_8_bits() -> None:
    assert parse_format("merged", None, SMOLLM2_SHAPE) == "f16"
    assert parse_format("merged", None, LARGE) == "q8_0"


@pytest.mark.parametrize(
    ("name", "expected"), [("F16", "f16"), ("hf", "huggingface"), ("Q8_0", "q8_0"), ("q4-1", "q4_1")]
)
def test_a_format_is_recognised_in_other_spellings(name: str, expected: str) -> None:
    assert parse_format("merged", name, SMOLLM2_SHAPE) == expected


@pytest.mark.parametrize(
    ("name", "expected"), [("Q4_K_M", "q4_k_m"), ("q4_k", "q4_k_m"), ("Q5_K", "q5_k_m"), ("q6_k", "q6_k")]
)
def test_a_k_quant_needs_llama_cpp(name: str, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime, "is_installed", lambda: True)
    assert parse_format("merged", name, SMOLLM2_SHAPE) == parse_format("ollama", name, SMOLLM2_SHAPE) == expected
    monkeypatch.setattr(runtime, "is_installed", lambda: False)
    with pytest.raises(InvalidArgument, match=r"pip install 'peft-mcp\[llamacpp\]'") as refused:
        parse_format("merged", name, SMOLLM2_SHAPE)
    assert refused.value.code == "llamacpp_not_installed"
    assert len(str(refused.value)) < 400


@pytest.mark.parametrize("name", ["Q2_K", "q3_k_m", "Q4_K_S", "IQ4_XS"])
def test_a_format_that_only_llama_quantize_makes_is_refused_with_the_command(name: str) -> None:
    with pytest.raises(InvalidArgument, match=f"llama-quantize FILE.gguf OUT.gguf {name.upper()}") as refused:
        parse_format("merged", name, SMOLLM2_SHAPE)
    assert len(str(refused.value)) < 500


def test_a_format_of_another_target_is_refused() -> None:
    with pytest.raises(InvalidArgument, match="for to='gguf-lora' it must be one of f32, f16"):
        parse_format("gguf-lora", "q8_0", SMOLLM2_SHAPE)
