"""Describe a base model by its headers, independent of the file format."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from peft_core.base_models.families import FULLY_SUPPORTED
from peft_core.errors import BaseCheckpointError
from peft_core.schemas.base_model import ModelShape


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """A tensor as a header describes it. `start` and `size` are in bytes; `start` counts from the beginning of the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    size: int


@dataclass(frozen=True, slots=True)
class TemplateSources:
    """The chat templates of a base model, as text."""

    default: str | None = None
    tool_use: str | None = None  # for conversations with tools, where it is a template of its own
    names: tuple[str, ...] = ()  # of all templates

    @classmethod
    def of(cls, named: Mapping[str, str]) -> TemplateSources:
        return cls(named.get("default"), named.get("tool_use"), tuple(sorted(named)))

    @property
    def why_none(self) -> str:
        """What a base model without a default template has instead, as a predicate."""
        if not self.names:
            return "has no chat template"
        return f"has no chat template called 'default', only named ones ({join_some(self.names, 8)})"


@dataclass(frozen=True)
class GgufVocabulary:
    """What a GGUF file says, or means by what it leaves out, about its tokenizer."""

    split_rule: str | None  # a key of SPLIT_RULES; None: a SentencePiece vocabulary, which needs none
    adds_bos: bool  # a BOS token begins every text
    end_of_turn: int | None  # the token that ends a turn of a chat, if the file names one
    adds_space: bool = True  # a SentencePiece vocabulary puts a space before every text


@dataclass(frozen=True)
class Checkpoint:
    """Weights and configuration of a base model, read from headers only.

    Both formats use Hugging Face's names in `config` and `shapes`; `shapes` omits an output head that is tied to the embedding.
    `stored` locates each tensor, under its name in the file.
    """

    path: Path
    format: Literal["huggingface", "gguf"]
    config: Mapping[str, Any]
    shape: ModelShape
    shapes: Mapping[str, tuple[int, ...]]
    stored: tuple[tuple[Path, TensorInfo], ...]
    size_bytes: int
    chat_templates: TemplateSources
    title: str | None = None  # the model's name, from the file's metadata
    vocabulary: GgufVocabulary | None = None  # None: it is in tokenizer.json

    @property
    def has_chat_template(self) -> bool:
        return self.chat_templates.default is not None


# These limits are far above every real model; a configuration beyond them would only exhaust memory.
MAX_SHAPE = {
    "hidden_size": 1 << 17,
    "intermediate_size": 1 << 20,
    "num_hidden_layers": 1 << 10,
    "num_attention_heads": 1 << 12,
    "num_key_value_heads": 1 << 12,
    "vocab_size": 1 << 22,
    "max_position_embeddings": 1 << 30,
}
_NUMBERED = re.compile(r"\.(\d{1,6})\.", re.ASCII)


def unusable(path: Path, reason: str, *suggestions: str) -> BaseCheckpointError:
    """Return the error for a base model that exists but cannot be used."""
    return BaseCheckpointError(
        f"The base model {path} cannot be used: {reason.rstrip('.')}.",
        code="base_model_unusable",
        suggestions=suggestions,
        details={"path": str(path)},
    )


def model_shape(path: Path, config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> ModelShape:
    """Return the dimensions that compute and memory depend on.

    Raises:
        BaseCheckpointError: The configuration lacks one of them or has an implausible value.
    """
    heads = config.get("num_attention_heads")
    numbers = {
        "hidden_size": config.get("hidden_size"),
        "intermediate_size": config.get("intermediate_size"),
        "num_hidden_layers": config.get("num_hidden_layers"),
        "num_attention_heads": heads,
        "num_key_value_heads": heads if config.get("num_key_value_heads") is None else config["num_key_value_heads"],
        "vocab_size": config.get("vocab_size"),
        "max_position_embeddings": config.get("max_position_embeddings"),
    }
    invalid = [name for name, value in numbers.items() if type(value) is not int or not 1 <= value <= MAX_SHAPE[name]]
    if invalid:
        raise unusable(
            path,
            f"its configuration has no usable {', '.join(invalid)}",
            f"Use a model of one of the families {FULLY_SUPPORTED}, or a similar decoder model",
        )
    head_size, usual_head_size = config.get("head_dim"), config["hidden_size"] // config["num_attention_heads"]
    layers = 1 + max((int(match[1]) for name in shapes if (match := _NUMBERED.search(name))), default=-1)
    if config["num_hidden_layers"] > layers:
        raise unusable(
            path,
            f"its configuration has {numbers['num_hidden_layers']} layers, but its weights have {layers}",
            "Download it again",
        )
    return ModelShape(
        parameters=sum(math.prod(shape) for shape in shapes.values()),
        hidden_size=numbers["hidden_size"],
        intermediate_size=numbers["intermediate_size"],
        layers=numbers["num_hidden_layers"],
        heads=numbers["num_attention_heads"],
        kv_heads=numbers["num_key_value_heads"],
        vocab_size=numbers["vocab_size"],
        context_length=numbers["max_position_embeddings"],
        head_size=head_size
        if type(head_size) is int and 1 <= head_size <= MAX_SHAPE["hidden_size"]
        else usual_head_size,
        linear_features=sum(
            sum(shape)
            for name, shape in shapes.items()
            if len(shape) == 2 and name.endswith(".weight") and _NUMBERED.search(name)
        )
        or None,
    )


def join_some(names: Iterable[str], limit: int = 3) -> str:
    """Format a list of names as 'a, b, c and 4 more'."""
    listed = list(names)
    rest = len(listed) - limit
    return ", ".join(listed[:limit]) + (f" and {rest} more" if rest > 0 else "")
