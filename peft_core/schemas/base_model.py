"""A base model: where its frozen weights are stored, its shape, and the fingerprint that identifies it."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from peft_core.schemas.frozen import FrozenModel


class ModelShape(FrozenModel):
    """The sizes that determine how much work and memory a model takes."""

    parameters: int
    hidden_size: int
    intermediate_size: int
    layers: int
    heads: int
    kv_heads: int
    vocab_size: int
    context_length: int
    head_size: int | None = None  # features per head; None: hidden_size / heads
    linear_features: int | None = None
    """The sum of inputs and outputs over all linear layers: an adapter of rank r on all of them has r times as many weights.
    None: as in a Llama-like block."""

    @property
    def query_size(self) -> int:
        """Features of all query heads."""
        return self.heads * self.features_of_head

    @property
    def kv_size(self) -> int:
        """Features of all key heads, and of all value heads."""
        return self.kv_heads * self.features_of_head

    @property
    def features_of_head(self) -> int:
        return self.hidden_size // self.heads if self.head_size is None else self.head_size


class Fingerprint(FrozenModel):
    """Identifies a base model at several levels, from its architecture to its exact bytes. Each is a hexadecimal SHA-256."""

    architecture: str  # of configuration, tensor names and shapes
    sample: str  # of some bytes of every tensor, as stored
    family: str = ""  # of the norm weights, which quantisation does not change; empty: unknown
    storage: str = ""  # not a hash: the number formats with their tensor counts, "BF16 272"
    content: str | None = None  # of every byte of the weights; None: never computed

    def same_weights(self, other: Fingerprint) -> bool:
        """Return whether architecture and sampled bytes are equal."""
        return (self.architecture, self.sample) == (other.architecture, other.sample)


BUNDLED = "bundled"  # the base model that is installed as a Python package


class Base(FrozenModel):
    """A base model: the frozen weights, where they are stored, and what they are."""

    ref: str  # as requested: a path, a hub id, or "bundled"
    name: str  # for people: "SmolLM2-135M-Instruct"; never a local path
    format: Literal["huggingface", "gguf"]
    path: Path  # model directory, or the .gguf file
    revision: str | None = None  # commit of a hub snapshot
    model_type: str  # "llama", "qwen2", ...
    shape: ModelShape
    size_bytes: int
    has_chat_template: bool
    fingerprint: Fingerprint

    @property
    def reference(self) -> str:
        """What a later request gives to find the same base model again: a path, or a name that does not depend on one."""
        return self.ref if self.ref == BUNDLED or self.ref.startswith("ollama:") else str(self.path)
