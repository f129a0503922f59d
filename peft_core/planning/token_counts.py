"""The token counter of a base model, for processes without torch. The server does not import this: a child process does."""

from __future__ import annotations

from peft_core.base_models.chat_template import ChatTemplate, TemplateRefusal
from peft_core.base_models.chat_turns import TurnRenderer
from peft_core.base_models.checkpoint import read_checkpoint
from peft_core.base_models.gguf import read_gguf_header
from peft_core.base_models.tokenizer import load_tokenizer, template_error
from peft_core.data.token_counter import EstimatedTokenCounter, TokenCounter
from peft_core.schemas.base_model import Base
from peft_core.schemas.conversation import Conversation
from peft_core.schemas.dataset import Segment

_CONTROL, _USER_DEFINED = 3, 4  # types of a GGUF file's tokens that are matched in a text as a whole
_TOKENS, _TYPES = "tokenizer.ggml.tokens", "tokenizer.ggml.token_type"


class EstimateWithTemplate(EstimatedTokenCounter):
    """Estimates tokens from bytes, and renders conversations in the base model's chat template."""

    def __init__(self, turns: TurnRenderer) -> None:
        self._turns = turns
        self.has_chat_template = turns.template.sources.default is not None

    def render_chat(self, conversation: Conversation) -> tuple[tuple[Segment, ...], ...]:
        try:
            return self._turns.render(conversation)
        except TemplateRefusal as refusal:
            raise template_error(refusal) from refusal


def token_counter_of(base: Base, *, exact: bool = True) -> TokenCounter:
    """Return what counts and renders as the training worker does.

    Without `exact`, and for a GGUF file, whose tokenizer is only made when it is converted, tokens are estimated.

    Raises:
        BaseCheckpointError, HeaderError: the base model's files cannot be read.
    """
    if base.format == "gguf":
        return EstimateWithTemplate(_turns_of_gguf(base))
    tokenizer = load_tokenizer(base.path)
    return tokenizer if exact else EstimateWithTemplate(tokenizer.turns)


def _turns_of_gguf(base: Base) -> TurnRenderer:
    header = read_gguf_header(base.path, arrays=(_TOKENS, _TYPES))
    tokens, types = header.metadata.get(_TOKENS), header.metadata.get(_TYPES)
    texts = [str(token) for token in tokens] if isinstance(tokens, tuple) else []
    kinds = list(types) if isinstance(types, tuple) else []
    special = {}
    for name in ("bos", "eos", "unknown", "padding"):
        token = header.integer(f"tokenizer.ggml.{name}_token_id")
        if token is not None and 0 <= token < len(texts):
            special[{"unknown": "unk", "padding": "pad"}.get(name, name) + "_token"] = texts[token]
    marks = [(text, kind) for text, kind in zip(texts, kinds, strict=False) if kind in (_CONTROL, _USER_DEFINED)]
    return TurnRenderer(
        ChatTemplate(read_checkpoint(base.path).chat_templates, special),
        marks=frozenset(text for text, _ in marks),
        special_marks=frozenset(text for text, kind in marks if kind == _CONTROL),
    )
