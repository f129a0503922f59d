"""The forms in which an adapter can be exported, and their formats."""

from __future__ import annotations

from dataclasses import dataclass
from typing import get_args

from peft_core.errors import InvalidArgument
from peft_core.llamacpp import runtime
from peft_core.schemas.base_model import ModelShape
from peft_core.schemas.export import ExportTarget
from peft_core.system.packages import install_extra

TARGETS: tuple[str, ...] = get_args(ExportTarget)
K_QUANTS = ("q6_k", "q5_k_m", "q4_k_m")  # made by llama.cpp
SMALL_BASE_PARAMETERS = 3_000_000_000  # up to here, a merged model is written in F16 unless another format is requested


@dataclass(frozen=True)
class _Formats:
    allowed: tuple[str, ...]
    default: str


FORMATS: dict[str, _Formats] = {
    "gguf-lora": _Formats(("f32", "f16"), "f32"),
    "merged": _Formats(
        ("f16", "bf16", "f32", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0", *K_QUANTS, "huggingface"),
        "f16 (q8_0 above 3B parameters)",
    ),
    # lora: a LoRA file beside the base model, where the server takes one, otherwise a merged model
    "ollama": _Formats(
        ("lora", "f16", "bf16", "f32", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0", *K_QUANTS),
        "lora (up to Ollama 0.34.0), else as merged",
    ),
    "vllm": _Formats(("f32",), "f32"),
    "mlx": _Formats(("f32",), "f32"),
    "hub": _Formats(("as trained",), "as trained"),
    "editors": _Formats(("f32", "f16"), "f32"),
}
_KEEP_MORE = (
    "Or use to='gguf-lora' beside the quantised base model: of the gain of a 135M model, merging into Q4_K_M lost 9 %, a LoRA "
    "file beside it 5 %"
)
_OTHER_NAMES = {
    "hf": "huggingface",
    "bfloat16": "bf16",
    "float16": "f16",
    "q4_k": "q4_k_m",
    "q5_k": "q5_k_m",
}
_OTHER_QUANTS = ("q2_k", "q3_k", "q4_k", "q5_k", "iq", "tq")  # that llama-quantize makes


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
        InvalidArgument: The target has no such format, or llama.cpp, which makes it, is not installed.
    """
    formats = FORMATS[to]
    if requested is None:
        if to in ("merged", "ollama"):
            return "f16" if shape.parameters <= SMALL_BASE_PARAMETERS else "q8_0"
        return formats.default
    name = requested.strip().lower().replace("-", "_")
    name = _OTHER_NAMES.get(name, name)
    if name in K_QUANTS and name in formats.allowed and not runtime.is_installed():
        raise InvalidArgument(
            "format",
            requested,
            "K-quants are made by llama.cpp, which is not installed here",
            suggestions=[f"Install it: {install_extra('llamacpp')}", _KEEP_MORE],
            code="llamacpp_not_installed",
        )
    if name in formats.allowed:
        return name
    suggestions: list[str] = []
    if to in ("merged", "ollama") and name.startswith(_OTHER_QUANTS):
        command = f"llama-quantize FILE.gguf OUT.gguf {name[:12].upper()}"
        suggestions = [f"Export with format='f16', then run `{command}`", _KEEP_MORE]
    allowed = f"for to={to!r} it must be one of {', '.join(formats.allowed)}"
    raise InvalidArgument("format", requested, allowed, suggestions=suggestions)
