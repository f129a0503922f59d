"""The base model's tokenizer and chat template. An adapter's own are never read."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from tokenizers import AddedToken, Tokenizer

from peft_core.base_models import fim_tokens
from peft_core.base_models.chat_template import ChatTemplate, TemplateRefusal
from peft_core.base_models.chat_turns import TurnRenderer
from peft_core.base_models.checkpoint_info import TemplateSources, unusable
from peft_core.base_models.huggingface import chat_templates
from peft_core.base_models.tokenizer_files import end_of_text, listed_tokens, special_tokens
from peft_core.errors import BaseCheckpointError, DataError, sanitize
from peft_core.schemas.base_model import Base
from peft_core.schemas.conversation import Conversation
from peft_core.schemas.dataset import FillInTheMiddle, Segment
from peft_core.system.failures import is_out_of_memory

# A private-use character: in no vocabulary, so that it merges with nothing after it.
_SENTINEL = "\ue000"


class Tokens(NamedTuple):
    """The tokens of one segment."""

    ids: list[int]
    offsets: list[tuple[int, int]]  # begin and end of each token in the segment, in characters


@dataclass(frozen=True)
class BaseTokenizer:
    """Turns text into token ids. Hand-written because AutoTokenizer takes 2.2 CPU-seconds to load; this takes 0.14."""

    tokenizer: Tokenizer
    end_of_text: int
    beginning: tuple[int, ...]  # what the tokenizer puts before every text, such as a BOS token; often empty
    turns: TurnRenderer

    @property
    def has_chat_template(self) -> bool:
        sources = self.turns.template.sources
        return sources.default is not None or sources.tool_use is not None

    def count(self, texts: Sequence[str], *, literal: bool = False) -> list[int]:
        """Return the number of tokens of each text as a continuation of other text; `literal` as in `Segment`."""
        marked = list(texts) if self._own_tokens is None else [_SENTINEL + text for text in texts]
        # "fast" omits the offsets of tokens, and is 1.6 times as fast.
        with self._reading(literal=literal):
            encodings = self.tokenizer.encode_batch_fast(marked, add_special_tokens=False)
        return [len(encoding) - (self._own_tokens or 0) for encoding in encodings]

    def render_chat(self, conversation: Conversation) -> tuple[tuple[Segment, ...], ...]:
        """Render a conversation in the base model's format; see `chat_turns.py` for what is learned.

        Returns the segments of each example.

        Raises:
            DataError: no chat template, or it refuses this conversation or does not write all of it.
        """
        self._require_template()
        try:
            return self.turns.render(conversation)
        except TemplateRefusal as refusal:
            raise template_error(refusal) from refusal

    def render_prompt(self, messages: Sequence[Mapping[str, Any]]) -> tuple[Segment, ...]:
        """Render a conversation as a prompt for the next assistant turn. What the messages say is literal.

        Raises:
            DataError: no chat template, or it refuses these messages.
        """
        self._require_template()
        try:
            return self.turns.render_prompt(messages)
        except TemplateRefusal as refusal:
            raise template_error(refusal) from refusal

    def written_prompt(self, prompt: str) -> Segment:
        """Return a prompt that a user wrote. It is literal, like code in training, unless it begins with a special token: it is
        a template written by hand then, such as that of fill-in-the-middle.
        """
        return Segment(text=prompt, literal=not self.turns.begins_with_special_token(prompt))

    def ids(self, *pieces: str | Segment) -> list[int]:
        """Return the tokens of one text, piece by piece, after what the tokenizer puts before every text. A str is literal."""
        segments = [Segment(text=piece, literal=True) if isinstance(piece, str) else piece for piece in pieces]
        ids = [token for tokens in self.encode(segments) for token in tokens.ids]
        return ids if tuple(ids[: len(self.beginning)]) == self.beginning else [*self.beginning, *ids]

    def encode(self, segments: Sequence[Segment]) -> list[Tokens]:
        """Return the tokens of each segment of one text.

        SentencePiece puts a space before a text, and would put one before every segment. Only the first words should have one:
        Code Llama was trained without a space before suffix and middle (Roziere et al., arXiv 2308.12950, section 2.3), and
        Codestral without one before a suffix, which it reads first.
        """
        marks = self.fill_in_the_middle
        encoded: list[Tokens] = []
        begun = False
        for segment in segments:
            encoded.append(
                self._encode_continuation(segment)
                if begun and self._own_tokens is not None
                else self._encode_alone(segment)
            )
            if marks is not None and segment.text in (marks.prefix, marks.suffix) and not segment.literal:
                begun = segment.text == marks.suffix
            else:
                begun = begun or not self._added.issuperset(encoded[-1].ids)  # special tokens are not words
        return encoded

    def text(self, ids: Sequence[int]) -> str:
        """Return the text of tokens, without special tokens."""
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=True))

    def continuation(self, before: Sequence[int], ids: Sequence[int]) -> str:
        """Return the text of tokens that continue `before`: some tokenizers drop the space that a text begins with."""
        tail = before[-8:]
        whole, head = self.text([*tail, *ids]), self.text(tail)
        return whole[len(head) :] if whole.startswith(head) else self.text(ids)

    @cached_property
    def fill_in_the_middle(self) -> FillInTheMiddle | None:
        """The base model's fill-in-the-middle tokens; None if its vocabulary has none."""
        return fim_tokens.find_fim_tokens(lambda token: self.tokenizer.token_to_id(token) is not None)

    @cached_property
    def _own_tokens(self) -> int | None:
        """The number of sentinel tokens if the tokenizer puts something before every text, otherwise None."""
        letter = Segment(text="a")
        alone, behind = self._encode_alone(letter), self._encode_alone(Segment(text=f"{_SENTINEL}a"))
        own = sum(end <= len(_SENTINEL) for _, end in behind.offsets)
        return own if own and behind.ids[own:] != alone.ids else None

    @cached_property
    def _added(self) -> frozenset[int]:
        return frozenset(self.tokenizer.get_added_tokens_decoder())

    def _encode_alone(self, segment: Segment) -> Tokens:
        """Encode a segment as a text of its own."""
        with self._reading(literal=segment.literal):
            encoding = self.tokenizer.encode(segment.text, add_special_tokens=False)
        return Tokens(encoding.ids, encoding.offsets)

    @contextmanager
    def _reading(self, *, literal: bool) -> Iterator[None]:
        self.tokenizer.encode_special_tokens = literal  # a second tokenizer would take 20 MB more
        try:
            yield
        finally:
            self.tokenizer.encode_special_tokens = False

    def _encode_continuation(self, segment: Segment) -> Tokens:
        """Encode a segment as a continuation: after a sentinel, whose tokens are dropped."""
        own = len(_SENTINEL)
        ids, offsets = self._encode_alone(segment.model_copy(update={"text": _SENTINEL + segment.text}))
        kept = [(token, begin, end) for token, (begin, end) in zip(ids, offsets, strict=True) if end > own]
        return Tokens([token for token, _, _ in kept], [(max(0, begin - own), end - own) for _, begin, end in kept])

    def _require_template(self) -> None:
        sources = self.turns.template.sources
        if sources.default is None and sources.tool_use is None:
            raise DataError(
                f"This base model {sources.why_none}: 'messages' cannot be rendered.",
                code="no_chat_template",
                suggestions=["Use plain text ('prompt', and 'completion' to train on), or an instruct base model."],
            )


def template_error(refusal: TemplateRefusal) -> DataError:
    """Return the error for a conversation that the chat template does not write."""
    return DataError(
        f"The base model's chat template {refusal}",
        code="chat_template",
        suggestions=["Change the conversation to what the template allows, or use another base model."],
    )


def load_tokenizer(directory: Path) -> BaseTokenizer:
    """Read `tokenizer.json` and its configuration from a Hugging Face model directory.

    Raises:
        BaseCheckpointError: no usable tokenizer, or no end-of-text token.
    """
    try:
        tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    except Exception as error:  # the library raises bare Exception for a missing or broken file
        if is_out_of_memory(error):
            raise
        raise BaseCheckpointError(
            f"The base model's tokenizer.json cannot be read: {error}",
            suggestions=["Use a base model with a fast tokenizer (a tokenizer.json next to its weights)."],
        ) from error
    config = _json(directory / "tokenizer_config.json")
    special = special_tokens(config)
    _add_listed_tokens(tokenizer, config, directory)
    _make_fim_tokens_special(tokenizer)
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return BaseTokenizer(
        tokenizer=tokenizer,
        end_of_text=_end_of_text(tokenizer, special, directory),
        beginning=_beginning(tokenizer, special),
        turns=_turn_renderer(tokenizer, chat_templates(directory), special),
    )


def _add_listed_tokens(tokenizer: Tokenizer, config: Mapping[str, Any], directory: Path) -> None:
    """Add the tokens that tokenizer_config.json lists and tokenizer.json lacks, as transformers does."""
    known = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
    for number, entry in sorted(listed_tokens(config).items()):
        text = entry["content"]
        if text in known:
            continue
        flags = {name: bool(entry[name]) for name in ("single_word", "lstrip", "rstrip", "normalized") if name in entry}
        token = AddedToken(text, special=bool(entry.get("special")), **flags)
        (tokenizer.add_special_tokens if token.special else tokenizer.add_tokens)([token])
        if (found := tokenizer.token_to_id(text)) != number:
            raise unusable(
                directory,
                f"its tokenizer_config.json lists {sanitize(text)!r} as token {number}, which in tokenizer.json is {found}",
                "Write both with transformers: AutoTokenizer.from_pretrained(DIR).save_pretrained(DIR)",
            )


def _make_fim_tokens_special(tokenizer: Tokenizer) -> None:
    """Make the FIM tokens special where they are not, as in Qwen2.5-Coder: others would be found in literal text, too."""
    family = fim_tokens.find_fim_tokens(lambda token: tokenizer.token_to_id(token) is not None)
    for token in tokenizer.get_added_tokens_decoder().values():
        if family is not None and token.content in family and not token.special:
            token.special = True
            tokenizer.add_special_tokens([token])


def _turn_renderer(tokenizer: Tokenizer, sources: TemplateSources, special: Mapping[str, str]) -> TurnRenderer:
    added = tokenizer.get_added_tokens_decoder().values()
    return TurnRenderer(
        ChatTemplate(sources, special),
        marks=frozenset(token.content for token in added),
        special_marks=frozenset(token.content for token in added if token.special),
    )


def _end_of_text(tokenizer: Tokenizer, special: Mapping[str, str], directory: Path) -> int:
    end = end_of_text(special, *(_json(directory / name) for name in ("generation_config.json", "config.json")))
    token = tokenizer.token_to_id(end.text) if end is not None and end.text is not None else None
    if token is None and end is not None:
        token = end.id
    if token is None:
        raise BaseCheckpointError(
            "The base model defines no end-of-text token.", suggestions=["Set eos_token in its tokenizer_config.json."]
        )
    return int(token)


def require_rows(tokenizer: BaseTokenizer, base: Base) -> None:
    """Check that the embedding has a row for each token of the vocabulary. Tokens that were added to it are checked when the
    base model is resolved.

    Raises:
        BaseCheckpointError: it has not.
    """
    size, rows = tokenizer.tokenizer.get_vocab_size(with_added_tokens=False), base.shape.vocab_size
    if size > rows:
        raise unusable(
            base.path,
            f"the vocabulary in its tokenizer.json has {size} tokens, but its embedding has {rows} rows",
            "Use the tokenizer.json that belongs to these weights",
        )


def _beginning(tokenizer: Tokenizer, special: Mapping[str, str]) -> tuple[int, ...]:
    """Return what the tokenizer puts before an empty text if that is its BOS token (some put EOS after it)."""
    ids = tuple(tokenizer.encode("", add_special_tokens=True).ids[:1])
    return ids if ids and ids == (tokenizer.token_to_id(special.get("bos_token", "")),) else ()


def _json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise BaseCheckpointError(f"The base model's {path.name} cannot be read: {error}") from error
    return value if isinstance(value, dict) else {}
