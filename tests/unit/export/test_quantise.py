"""The types of a GGUF file's tensors, against what llama-quantize chooses, and ggml's rows against the package `gguf`."""

from __future__ import annotations

import numpy as np
import pytest
from gguf import GGMLQuantizationType
from gguf.quants import dequantize, quantize

from peft_core.errors import ExportError
from peft_core.llamacpp.worker import quantise
from peft_core.llamacpp.worker.quantise import converted, kinds_of

Q = GGMLQuantizationType
LAYERS = 16
WIDE = 512


def kinds(kind: str, columns: int = WIDE, *, head: bool = False) -> dict[str, str]:
    names = ["token_embd.weight", *(["output.weight"] if head else [])]
    names += [f"blk.{n}.{part}.weight" for n in range(LAYERS) for part in ("attn_q", "attn_v", "attn_qkv", "ffn_down")]
    tensors = [(name, (8, columns)) for name in names] + [("blk.0.attn_norm.weight", (columns,))]
    return {name: kind.name for (name, _), kind in zip(tensors, kinds_of(tensors, kind), strict=True)}


def test_values_and_down_projections_of_half_of_the_layers_get_more_bits() -> None:
    chosen = kinds("q4_k_m")
    more = [n for n in range(LAYERS) if chosen[f"blk.{n}.attn_v.weight"] == "Q6_K"]
    assert more == [0, 1, 4, 7, 10, 13, 14, 15]  # use_more_bits() of llama-quant.cpp
    assert more == [n for n in range(LAYERS) if chosen[f"blk.{n}.ffn_down.weight"] == "Q6_K"]
    assert {chosen[f"blk.{n}.attn_q.weight"] for n in range(LAYERS)} == {"Q4_K"}
    assert chosen["blk.3.attn_qkv.weight"] == "Q5_K"
    assert chosen["blk.0.attn_norm.weight"] == "F32"


def test_the_head_gets_six_bits_and_the_embedding_only_if_it_is_the_head() -> None:
    tied, untied = kinds("q5_k_m"), kinds("q5_k_m", head=True)
    embedding, head = "token_embd.weight", "output.weight"
    assert (tied[embedding], untied[embedding], untied[head]) == ("Q6_K", "Q5_K", "Q6_K")


@pytest.mark.parametrize(
    ("kind", "columns", "expected"),
    [
        ("q4_k_m", 576, "Q5_0"),
        ("q5_k_m", 576, "Q5_1"),
        ("q6_k", 576, "Q8_0"),
        ("q4_k_m", 40, "F16"),
        ("q8_0", 40, "F16"),
        ("q4_0", 576, "Q4_0"),
    ],
)
def test_rows_that_are_no_multiple_of_the_block_get_a_type_that_fits(kind: str, columns: int, expected: str) -> None:
    assert kinds(kind, columns)["blk.3.attn_q.weight"] == expected


@pytest.mark.parametrize(("kind", "error"), [(Q.Q4_K, 0.08), (Q.Q5_K, 0.04), (Q.Q6_K, 0.02)])
def test_rows_in_k_quants_are_read_back_by_another_implementation(kind: GGMLQuantizationType, error: float) -> None:
    pytest.importorskip("xllamacpp")
    rows = np.random.default_rng(0).normal(size=(37, WIDE)).astype(np.float32)
    again = dequantize(converted(rows, kind, "blk.0.attn_q.weight"), kind)
    assert np.sqrt(np.mean((again - rows) ** 2)) < error
    assert np.array_equal(converted(rows, Q.Q8_0, "x"), quantize(rows, Q.Q8_0))


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e6])
def test_a_weight_that_is_too_large_is_refused_before_it_is_quantised(value: float) -> None:
    rows = np.full((1, WIDE), value, np.float32)
    with pytest.raises(ExportError, match="too large for Q4_K"):
        converted(rows, Q.Q4_K, "blk.0.attn_q.weight")


def test_a_build_of_llama_cpp_without_the_function_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("xllamacpp")
    monkeypatch.setattr(quantise.ctypes, "CDLL", lambda _: object())
    quantise._ggml_quantize_chunk.cache_clear()
    with pytest.raises(ExportError, match="quantiser cannot be called") as refused:
        converted(np.zeros((1, WIDE), np.float32), Q.Q6_K, "x")
    assert refused.value.code == "llamacpp_not_installed"
    quantise._ggml_quantize_chunk.cache_clear()
