"""The token counter of a base model, for processes without torch. The server does not import this: a child process does."""

from __future__ import annotations

from collections.abc import Sequence

from tokenizers import Tokenizer, models, pre_tokenizers

from peft_core.base_models.chat_template import ChatTemplate, TemplateRefusal
from peft_core.base_models.chat_turns import TurnRenderer
from peft_core.base_models.checkpoint import read_checkpoint
from peft_core.base_models.gguf import GgufHeader, read_gguf_header
from peft_core.base_models.tokenizer import load_tokenizer, template_error
from peft_core.data.token_counter import EstimatedTokenCounter, TokenCounter
from peft_core.schemas.base_model import Base
from peft_core.schemas.conversation import Conversation
from peft_core.schemas.dataset import Segment

_CONTROL, _USER_DEFINED = 3, 4  # types of a GGUF file's tokens that are matched in a text as a whole
_TOKENS, _TYPES, _MERGES = "tokenizer.ggml.tokens", "tokenizer.ggml.token_type", "tokenizer.ggml.merges"


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

    Without `exact`, tokens are estimated. For a GGUF file, whose tokenizer is only made when it is converted, they are counted
    with its vocabulary if that is a BPE one.

    Raises:
        BaseCheckpointError, HeaderError: the base model's files cannot be read.
    """
    if base.format == "gguf":
        header = read_gguf_header(base.path, arrays=(_TOKENS, _TYPES, _MERGES))
        return _GgufCounter(_turns_of_gguf(base, header), header)
    tokenizer = load_tokenizer(base.path)
    return tokenizer if exact else EstimateWithTemplate(tokenizer.turns)


class _GgufCounter(EstimateWithTemplate):
    """Counts with the vocabulary of a GGUF file, if it is a BPE one; a tokenizer's split rule changes counts by little."""

    def __init__(self, turns: TurnRenderer, header: GgufHeader) -> None:
        super().__init__(turns)
        tokens, merges = header.metadata.get(_TOKENS), header.metadata.get(_MERGES)
        self._tokenizer: Tokenizer | None = None
        if isinstance(tokens, tuple) and isinstance(merges, tuple) and header.text("tokenizer.ggml.model") == "gpt2":
            vocabulary = {str(token): number for number, token in enumerate(tokens)}
            pairs = [(first, second) for first, _, second in (str(merge).partition(" ") for merge in merges)]
            try:
                self._tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=pairs))
            except Exception:  # noqa: BLE001 - the library raises bare Exception; the conversion reports what is wrong
                return
            self._tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
            self._tokenizer.add_special_tokens(sorted(turns.marks))

    def count(self, texts: Sequence[str]) -> list[int]:
        if self._tokenizer is None:
            return super().count(texts)
        return [len(encoding) for encoding in self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)]


def _turns_of_gguf(base: Base, header: GgufHeader) -> TurnRenderer:
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
