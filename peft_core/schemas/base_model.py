"""A base model: where its frozen weights come from, its shape, and the fingerprint that identifies it."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from peft_core.schemas.frozen import FrozenModel


class ModelShape(FrozenModel):
    """What the size of a model's work and memory depends on."""

    parameters: int
    hidden_size: int
    intermediate_size: int
    layers: int
    heads: int
    kv_heads: int
    vocab_size: int
    context_length: int
    head_size: int | None = None  # features of one head; None: hidden_size / heads
    linear_features: int | None = None
    """Inputs and outputs of all linear layers together: an adapter of rank r on all of them has r times as many weights. None:
    those of a Llama-like block."""

    @property
    def query_size(self) -> int:
        """Features of all query heads together."""
        return self.heads * self.features_of_head

    @property
    def kv_size(self) -> int:
        """Features of all key heads together; as many have the values."""
        return self.kv_heads * self.features_of_head

    @property
    def features_of_head(self) -> int:
        return self.hidden_size // self.heads if self.head_size is None else self.head_size


class Fingerprint(FrozenModel):
    """Which base this is, from what every copy of a model shares to the very bytes. Hexadecimal sha256 each."""

    architecture: str  # configuration, names and shapes
    sample: str  # some bytes of every tensor, as stored
    family: str = ""  # the norm weights, which quantisation leaves alone; empty where it was not recorded
    storage: str = ""  # number formats and how many tensors have each: "BF16 272"
    content: str | None = None  # every byte of the weights; known where somebody has read them all

    def same_weights(self, other: Fingerprint) -> bool:
        """As far as both know: older records lack the later fields."""
        return (self.architecture, self.sample) == (other.architecture, other.sample)


BUNDLED = "bundled"  # the base that comes as a Python package


class Base(FrozenModel):
    """Where frozen weights come from."""

    ref: str  # as asked for: a path, a hub id, or "bundled"
    name: str  # for reports: "SmolLM2-135M-Instruct"; never a local path
    format: Literal["huggingface", "gguf"]
    path: Path  # model directory, or the .gguf file
    revision: str | None = None  # commit of a hub snapshot
    model_type: str  # "llama", "qwen2", ...
    shape: ModelShape
    size_bytes: int
    has_chat_template: bool
    fingerprint: Fingerprint
