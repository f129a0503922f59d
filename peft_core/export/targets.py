"""The forms in which an adapter can be exported, and their formats."""

from __future__ import annotations

from dataclasses import dataclass
from typing import get_args

from peft_core.errors import InvalidArgument
from peft_core.schemas.base_model import ModelShape
from peft_core.schemas.export import ExportTarget

TARGETS: tuple[str, ...] = get_args(ExportTarget)
SMALL_BASE_PARAMETERS = 3_000_000_000  # up to here, a merged model is written in F16 unless another format is requested


@dataclass(frozen=True)
class _Formats:
    allowed: tuple[str, ...]
    default: str


FORMATS: dict[str, _Formats] = {
    "gguf-lora": _Formats(("f32", "f16"), "f32"),
    "merged": _Formats(
        ("f16", "bf16", "f32", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0", "huggingface"), "f16 (q8_0 above 3B parameters)"
    ),
    # lora: a LoRA file beside the base model, where the server takes one, otherwise a merged model
    "ollama": _Formats(
        ("lora", "f16", "bf16", "f32", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0"),
        "lora (up to Ollama 0.34.0), else as merged",
    ),
    "vllm": _Formats(("f32",), "f32"),
    "mlx": _Formats(("f32",), "f32"),
    "hub": _Formats(("as trained",), "as trained"),
    "editors": _Formats(("f32", "f16"), "f32"),
}
_KEEP_MORE = (
    "Or use to='gguf-lora' beside the quantised base model, which keeps more of what was learned: of the gain of a 135M model, "
    "merging into Q4_K_M lost 9 %, merging into Q4_1 59 %, and a LoRA file beside it at most 5 %"
)
_K_QUANTS = ("q2_k", "q3_k", "q4_k", "q5_k", "q6_k", "iq")


def parse_target(to: str) -> ExportTarget:
    """Return the target.

    Raises:
        InvalidArgument: There is no such target.
    """
    for target in get_args(ExportTarget):
        if target == to.strip().lower().replace("_", "-"):
            known: ExportTarget = target
            return known
    raise InvalidArgument("to", to, f"must be one of {', '.join(TARGETS)}")


def parse_format(to: ExportTarget, requested: str | None, shape: ModelShape) -> str:
    """Return the format, or the target's default.

    Raises:
        InvalidArgument: The target has no such format.
    """
    formats = FORMATS[to]
    if requested is None:
        if to in ("merged", "ollama"):
            return "f16" if shape.parameters <= SMALL_BASE_PARAMETERS else "q8_0"
        return formats.default
    name = requested.strip().lower().replace("-", "_")
    name = {"hf": "huggingface", "bfloat16": "bf16", "float16": "f16"}.get(name, name)
    if name in formats.allowed:
        return name
    if to in ("merged", "ollama") and name.startswith(_K_QUANTS):
        raise InvalidArgument(
            "format",
            requested,
            "K-quants and I-quants are made by llama.cpp only; must be one of " + ", ".join(formats.allowed),
            suggestions=[
                f"Export with format='f16', then run `llama-quantize FILE.gguf OUT.gguf {requested.upper()}`",
                _KEEP_MORE,
            ],
        )
    raise InvalidArgument("format", requested, f"for to={to!r} it must be one of {', '.join(formats.allowed)}")
