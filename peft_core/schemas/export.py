"""An export: an adapter in the form that another runtime takes, and the comparison that proves it."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from peft_core.schemas.frozen import FrozenModel
from peft_core.schemas.results import NextStep

ExportTarget = Literal["gguf-lora", "merged", "ollama", "vllm", "mlx", "hub", "editors"]


class ExportOptions(FrozenModel):
    """How an adapter is exported. The fields are arguments of the tool `export_adapter`."""

    output_path: Annotated[
        str | None, Field(description="Absolute path of the directory to create. Omit to use the project's exports.")
    ] = None
    format: Annotated[
        str | None,
        Field(
            description="gguf-lora: f32, f16. merged, ollama: f16, q8_0, q6_k, q5_k_m, q4_k_m, ...; merged: huggingface. "
            "Omit to use the default."
        ),
    ] = None
    base_model: Annotated[
        str | None, Field(description="As in load_adapter. Omit to use the one that the adapter was trained on.")
    ] = None
    overwrite: Annotated[bool, Field(description="Replace an earlier export.")] = False
    model_name: Annotated[
        str | None, Field(description="Of the model in Ollama or vLLM. Omit to name it after the project.")
    ] = None
    vllm_address: Annotated[
        str | None, Field(description="Of a running vLLM on this machine, which is to load the adapter (to=vllm).")
    ] = None


class Verification(FrozenModel):
    """The written file in a runtime, compared with PEFT in float32 at the same positions of held-out code.

    Differences are means of |log p - log p|, in nats, over the runtime's most likely tokens of each position.
    """

    status: Literal["verified", "not_verified"]
    runtime: str = Field("", description="What loaded the written file.")
    positions: int = 0
    text: str = Field("", description="The text that was compared on.")
    mean_difference: float | None = Field(None, description="With the adapter.")
    max_difference: float | None = None
    base_difference: float | None = Field(None, description="Without the adapter: what the number format costs.")
    limit: float | None = Field(None, description="Largest mean_difference that counts as equal; null below 8 bits.")
    effect: float | None = Field(None, description="By how much the adapter itself changes log-probabilities.")
    effect_error: float | None = Field(None, description="Part of that effect that differs in the runtime.")
    gain: float | None = Field(None, description="Held-out loss without minus with the adapter, in PEFT.")
    runtime_gain: float | None = Field(None, description="The same in the runtime.")
    kept: float | None = Field(None, description="runtime_gain / gain.")
    reason: str = Field("", description="Why it was not verified, and how to do it.")


class LoadedInVllm(FrozenModel):
    """The exported adapter in a running vLLM, compared with PEFT in float32 at the same positions."""

    address: str
    model: str = Field(description="Its name there.")
    loaded: bool
    version: str = ""
    base_model: str = Field("", description="vLLM's name of the base model.")
    positions: int = 0
    mean_difference: float | None = Field(None, description="Of a next token's log-probability, in nats.")
    base_difference: float | None = Field(None, description="The same without the adapter.")
    reason: str = Field("", description="Why it is not loaded, was not compared, or must not be used.")

    @property
    def is_wrong(self) -> bool:
        """Whether it computes something else, and is loaded all the same: a reason beside the figures."""
        return self.loaded and self.mean_difference is not None and bool(self.reason)


class ExportedFile(FrozenModel):
    path: str
    bytes: int
    sha256: str


class ExportReport(FrozenModel):
    """What was written, where, how it compares with the adapter, and how to use it. Also the content of export.json."""

    summary: str
    to: str
    format: str
    directory: str
    files: list[ExportedFile]
    adapter_path: str
    adapter_id: str
    base_model: str
    base_fingerprint: dict[str, Any]
    verification: Verification
    usage: list[str] = Field(description="How to use it: commands, or what to set.")
    warnings: list[str] = Field([])
    ollama_model: str | None = Field(None, description="Name of the model that was created in Ollama.")
    vllm: LoadedInVllm | None = None
    created_at: str
    elapsed_s: float
    next: str = ""
    next_step: NextStep | None = None
