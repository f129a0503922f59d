"""Write a LoRA adapter as a GGUF file, as llama.cpp's `--lora` and Ollama's ADAPTER take it.

llama.cpp computes B @ A * alpha / rank, with one alpha for the file and the rank of each tensor. It knows neither rsLoRA nor
rank and alpha patterns, so what is different in a module is multiplied into its B. Its own script ignores these settings.
"""

from __future__ import annotations

import functools
from pathlib import Path

import gguf
import numpy as np

from peft_core.base_models.families import LLAMA_CPP, LlamaCppFormat
from peft_core.errors import BaseCheckpointError, ExportError, sanitize
from peft_core.llamacpp.worker.gguf_file import GgufTensor, encode, write_gguf
from peft_core.llamacpp.worker.lora_pairs import Array, Lora
from peft_core.schemas.base_model import Base

KINDS = {"f32": gguf.GGMLQuantizationType.F32, "f16": gguf.GGMLQuantizationType.F16}
_FUSED = (
    "phi3",
    "chatglm",
    "glm4",
)  # they store gate and up as one matrix; gguf names it "ffn_up" for every architecture


def write_gguf_lora(lora: Lora, base: Base, path: Path, kind: str = "f32") -> None:
    """Write the adapter to `path`.

    Args:
        lora: The adapter.
        base: Its base model, whose fingerprint is recorded in the file.
        path: The file to write.
        kind: "f32", or "f16" for half the size.

    Raises:
        BaseCheckpointError: llama.cpp does not have this architecture.
        ExportError: A module has no counterpart in llama.cpp, or a weight is too large for 16 bits.
    """
    layout = llama_cpp_format(base)
    alpha = float(lora.settings.alpha)
    tensors, arrays = [], []
    for module, pair in lora.pairs.items():
        name = gguf_name(module, base, layout)
        b_OR = permuted(pair.folded(remaining=alpha / pair.rank), module, base, layout)
        for suffix, array in (("lora_a", pair.a_RI), ("lora_b", b_OR)):
            tensors.append(GgufTensor(f"{name}.weight.{suffix}", tuple(map(int, array.shape)), KINDS[kind]))
            arrays.append([_converted(array, kind, module)])
    with path.open("wb") as stream:
        write_gguf(stream, _metadata(base, layout, alpha, kind), tensors, arrays)


def llama_cpp_format(base: Base) -> LlamaCppFormat:
    """Return how llama.cpp stores this model.

    Raises:
        BaseCheckpointError: llama.cpp does not have this architecture, or it is not known how it stores it.
    """
    if base.model_type not in LLAMA_CPP:
        raise BaseCheckpointError(
            f"{base.name} is of the family {base.model_type!r}, which cannot be exported to GGUF; "
            f"must be one of {', '.join(sorted(LLAMA_CPP))}.",
            code="export_unsupported",
            suggestions=["Convert it with llama.cpp's convert_lora_to_gguf.py, which ignores rsLoRA and patterns"],
        )
    return LLAMA_CPP[base.model_type]


def gguf_name(module: str, base: Base, layout: LlamaCppFormat) -> str:
    """Return the name of a module's matrix in a GGUF file, without ".weight".

    Raises:
        ExportError: There is none.
    """
    name = name_map(layout.architecture, base.shape.layers).get_name(module)
    fused = module.endswith("gate_up_proj") and layout.architecture not in _FUSED
    if name is None or fused or not name.startswith("blk."):
        raise ExportError(
            f"The adapter changes {sanitize(module)}, for which a LoRA file of llama.cpp has no name.",
            code="export_unsupported",
            suggestions=["Export it with to='merged'", "Or train without this target module"],
        )
    return str(name)


@functools.lru_cache(maxsize=2)  # a map is built in 50 ms, and an adapter has hundreds of modules
def name_map(architecture: str, layers: int) -> gguf.TensorNameMap:
    """Return the names that llama.cpp gives to the tensors of a model."""
    return gguf.get_tensor_name_map(_ARCHITECTURES[architecture], layers)


def permuted(rows: Array, module: str, base: Base, layout: LlamaCppFormat) -> Array:
    """Return the rows of a matrix of this module in llama.cpp's order: it interleaves the halves of each head of q and k."""
    projection = module.rpartition(".")[2]
    if not layout.interleaves_heads or projection not in ("q_proj", "k_proj"):
        return rows
    heads = base.shape.heads if projection == "q_proj" else base.shape.kv_heads
    return rows.reshape(heads, 2, len(rows) // heads // 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def _converted(array: Array, kind: str, module: str) -> Array:
    converted = np.ascontiguousarray(array, dtype=np.float16 if kind == "f16" else np.float32)
    if not np.isfinite(converted).all():
        raise ExportError(
            f"A weight of {sanitize(module)} is too large for 16 bits.",
            code="export_overflow",
            suggestions=["Export it with format='f32'"],
        )
    return converted


def _metadata(base: Base, layout: LlamaCppFormat, alpha: float, kind: str) -> dict[str, bytes]:
    file_type = gguf.LlamaFileType.ALL_F32 if kind == "f32" else gguf.LlamaFileType.MOSTLY_F16
    values: dict[str, str | int | float] = {
        "general.architecture": layout.architecture,
        "general.type": "adapter",
        "adapter.type": "lora",
        "adapter.lora.alpha": alpha,  # without it llama.cpp takes the scale 1.0, silently
        "general.name": f"LoRA adapter for {sanitize(base.name)}",
        "general.file_type": file_type.value,
        "general.base_model.count": 1,
        "general.base_model.0.name": sanitize(base.name),
        "peft_mcp.base.fingerprint.architecture": base.fingerprint.architecture,
        "peft_mcp.base.fingerprint.sample": base.fingerprint.sample,
        "peft_mcp.base.fingerprint.family": base.fingerprint.family,
    }
    return {key: encode(value) for key, value in values.items()}


_ARCHITECTURES = {name: architecture for architecture, name in gguf.MODEL_ARCH_NAMES.items()}
