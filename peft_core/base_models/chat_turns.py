"""Turn a conversation into training examples, so that exactly the learned assistant turns carry loss.

For a learned turn k the template gives two texts: the prompt for it (the messages before it, with the generation prompt: what
the model sees at inference), and the conversation that ends with it. What follows the prompt in the second text is what the
model has to write. Where the same holds in the rendering of a longer conversation, its earlier turns are learned there; a
template that rewrites them (it drops old reasoning, or moves the tools) gives several examples, and each turn is learned in the
one that ends with it or with the next turn that leaves it alone.

Templates drop what they do not know. So two things are checked before a rendering is used. A conversation of the same
shape, in which each message is one unmistakable word, must contain each of these words, and only the answers' words where
it is learned. And the real texts, names and arguments must be in the real rendering.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from types import EllipsisType
from typing import Any, NamedTuple

from peft_core.base_models.chat_messages import (
    REASONING_BEGIN,
    described,
    given_pieces,
    missing_from,
    plain,
    sample_of_shape,
    shape_of,
    significant,
    text_with_reasoning,
    variants,
)
from peft_core.base_models.chat_template import ChatTemplate, TemplateRefusal
from peft_core.schemas.conversation import Conversation
from peft_core.schemas.dataset import Segment

MAX_SHAPES = 20_000  # conversation shapes whose check is remembered
# In all renderings of a conversation, which are in memory together. A template that rewrites earlier turns gives one for each
# answer, so that their size grows with the square of the conversation's.
MAX_CONVERSATION_CHARACTERS = 256_000_000
_EMPTY_REASONING = re.compile(r"\s*<think>\s*</think>\s*")
_LOOKS_LIKE_A_MARK = r"<[|/]?[^<>\s]{1,64}>|\[/?[A-Z_]{1,64}\]"
_MAX_MARK = 256  # characters of a token that is matched as a whole
# Characters that stand for special tokens in given texts: private-use ones of the last plane, which no text has.
_FIRST_PLACEHOLDER, _MAX_PLACEHOLDERS = 0x10_FF00, 0xF0
_COMPARED_PROMPTS = 16  # per rendering
_ANCHOR = 32  # characters before a turn that tell it from another one with the same text
_PROBE = "Zqxprobe"

Check = Callable[[Conversation, "Rendering"], None]


class Span(NamedTuple):
    """Where a turn is learned in a text, in characters."""

    start: int
    end: int


class Rendering(NamedTuple):
    """One example: a conversation up to the end of a learned turn."""

    text: str
    turns: tuple[int, ...]  # the messages that are learned; the text ends with the last of them
    spans: tuple[Span, ...]  # one for each of them


class _Turn(NamedTuple):
    """A learned turn as the template writes it at the end of a conversation."""

    text: str  # the conversation up to the turn's end-of-turn token
    start: int  # where what is learned begins


@dataclass
class TurnRenderer:
    """Renders conversations with one chat template."""

    template: ChatTemplate
    marks: frozenset[str] = frozenset()  # the tokens that are matched in a text as a whole
    special_marks: frozenset[str] = frozenset()  # those of them that a given text must not turn into
    _shapes: dict[object, str | None] = field(default_factory=dict)  # why conversations of a shape are refused
    _usual_variant: int = 0

    def render(self, conversation: Conversation) -> tuple[tuple[Segment, ...], ...]:
        """Return the segments of each example, in the order of the turns that they end with.

        Special tokens in the given texts stay text: they become literal segments.

        Raises:
            TemplateRefusal: The template refuses the conversation or does not write all of it. The message says why.
        """
        if not any(conversation.learned):
            raise TemplateRefusal("is given a conversation without an assistant message to learn")
        hidden, names = self._hide_special(conversation)
        shape = shape_of(hidden)
        if shape not in self._shapes:
            if len(self._shapes) >= MAX_SHAPES:
                self._shapes.clear()
            self._shapes[shape] = self._why_refused(hidden)
        if (reason := self._shapes[shape]) is not None:
            raise TemplateRefusal(reason)
        return tuple(_segments(rendering, names) for rendering in self._renderings(hidden, _require_all_texts))

    def render_prompt(self, messages: Sequence[Mapping[str, Any]]) -> tuple[Segment, ...]:
        """Return the segments of a prompt for the next assistant turn. Special tokens in the given texts stay text.

        Raises:
            TemplateRefusal: The template refuses these messages.
        """
        hidden, names = self._hide_special(Conversation(tuple(messages), (False,) * len(messages)))
        text = self.template.render(hidden.messages, add_generation_prompt=True)
        return tuple(_marked(text, names, learn=False))

    def begins_with_special_token(self, text: str) -> bool:
        return self._special_pattern is not None and self._special_pattern.match(text.lstrip()) is not None

    def _renderings(self, conversation: Conversation, check: Check) -> list[Rendering]:
        """Render a conversation in the first of the equivalent forms that the template writes completely."""
        forms = list(variants(conversation))
        reasons: list[TemplateRefusal] = []
        for number in sorted(range(len(forms)), key=lambda number: number != self._usual_variant):
            given = forms[number]
            try:
                renderings = _Writer(self, given).renderings()
                for rendering in renderings:
                    check(given, rendering)
            except TemplateRefusal as refusal:
                reasons.append(refusal)
                continue
            self._usual_variant = number if len(forms) > 1 else self._usual_variant
            return renderings
        raise next((reason for reason in reasons if not reason.is_the_templates), reasons[0])

    def _why_refused(self, conversation: Conversation) -> str | None:
        """Return why conversations of this shape are refused, or None. See the module's docstring."""
        sample, words = sample_of_shape(conversation)
        try:
            self._renderings(sample, partial(_require_words, words))
        except TemplateRefusal as refusal:
            return None if refusal.is_the_templates else str(refusal)  # it may refuse only the words of the sample
        return None

    @cached_property
    def plain_turn(self) -> tuple[str, str] | None:
        """What the template writes before and after the text of a learned turn; None if it refuses the simplest one."""
        messages = ({"role": "user", "content": _PROBE}, {"role": "assistant", "content": _PROBE})
        try:
            turn = _Writer(self, Conversation(messages, (False, True)), plain_turn=None).turn(1)
        except TemplateRefusal:
            return None
        before, _, after = turn.text[turn.start :].partition(_PROBE)
        return before, after

    # Tokens that are matched as a whole.

    @cached_property
    def mark_pattern(self) -> re.Pattern[str]:
        """Tokens that are matched as a whole, and what looks like one: not every tokenizer has those of its template."""
        known = _alternatives(self.marks)
        return re.compile(f"{known.pattern}|{_LOOKS_LIKE_A_MARK}" if known else _LOOKS_LIKE_A_MARK)

    @cached_property
    def _special_pattern(self) -> re.Pattern[str] | None:
        return _alternatives(self.special_marks)

    @cached_property
    def _special_beginnings(self) -> tuple[str, ...]:
        return tuple({mark[:2] for mark in self.special_marks})

    def _hide_special(self, conversation: Conversation) -> tuple[Conversation, dict[str, str]]:
        """Return the conversation with a placeholder for each special token in its texts, and the tokens by placeholder."""
        names: dict[str, str] = {}
        placeholders: dict[str, str] = {}

        def placeholder(match: re.Match[str]) -> str:
            if match[0] not in placeholders:
                if len(placeholders) == _MAX_PLACEHOLDERS:
                    raise TemplateRefusal(f"is given texts with more than {_MAX_PLACEHOLDERS} different special tokens")
                placeholders[match[0]] = chr(_FIRST_PLACEHOLDER + len(placeholders))
                names[placeholders[match[0]]] = match[0]
            return placeholders[match[0]]

        def hide(text: str) -> str:
            pattern = self._special_pattern
            if pattern is None or not any(beginning in text for beginning in self._special_beginnings):
                return text
            return pattern.sub(placeholder, text)

        messages = tuple(
            {key: value if key == "role" else plain(value, hide) for key, value in significant(message)}
            for message in conversation.messages
        )
        tools = tuple(plain(tool, hide) for tool in conversation.tools)
        return Conversation(messages, conversation.learned, tools), names


class _Writer:
    """One form of a conversation, and its renderings, each made once."""

    def __init__(
        self,
        renderer: TurnRenderer,
        conversation: Conversation,
        plain_turn: tuple[str, str] | EllipsisType | None = ...,
    ) -> None:
        self._renderer = renderer
        self._conversation = conversation
        self._plain_turn = renderer.plain_turn if plain_turn is ... else plain_turn
        self._texts: dict[tuple[int, bool], str] = {}
        self._turns: dict[int, _Turn] = {}
        self._size = 0  # of what the template has written, in characters

    def renderings(self) -> list[Rendering]:
        """Return as few renderings as hold every learned turn."""
        remaining = [number for number, learned in enumerate(self._conversation.learned) if learned]
        renderings: list[Rendering] = []
        while remaining:
            last = remaining[-1]
            turn = self.turn(last)
            found: dict[int, Span] = {}
            # In a long conversation, the prompts of some turns are compared; the turns between them must follow each other.
            compared = set(remaining[:: max(1, len(remaining) // _COMPARED_PROMPTS)])
            for number in remaining[:-1]:
                span = None if number in compared else self._next_span(turn.text, number, found)
                span = span or self._span_within(turn.text, number)
                position = max((before.end for before in found.values()), default=0)
                if span is not None and position <= span.start and span.end <= turn.start:
                    found[number] = span
            found[last] = Span(turn.start, len(turn.text))
            renderings.append(Rendering(turn.text, tuple(found), tuple(found.values())))
            remaining = [number for number in remaining if number not in found]
        return renderings[::-1]

    def _next_span(self, text: str, number: int, found: Mapping[int, Span]) -> Span | None:
        """Return where a turn is that follows one that was found, without rendering its prompt; None if that is not certain."""
        messages = self._conversation.messages
        previous = next((n for n in range(number - 1, -1, -1) if messages[n].get("role") == "assistant"), None)
        if previous is None or previous not in found or not self._opening:
            return None
        position = found[previous].end
        opening = text.find(self._opening, position)
        if opening < 0:
            return None
        for message in messages[previous + 1 : number]:
            for piece in given_pieces(message):
                if piece.end_in(text, position, opening) is None:
                    return None
        start = self._start_behind(text[: opening + len(self._opening)], text, messages[number])
        return self._span_from(text, number, start)

    @cached_property
    def _opening(self) -> str:
        """What a prompt adds to a conversation, if it contains a special token: the beginning of each answer."""
        last = max(number for number, learned in enumerate(self._conversation.learned) if learned)
        prompt = self._text(last, prompt=True)
        opening = prompt[_common_length(prompt, self._text(last)) :]
        return opening if self._renderer.mark_pattern.search(opening) else ""

    def turn(self, number: int) -> _Turn:
        """Return a learned turn at the end of its conversation."""
        if number not in self._turns:
            self._turns[number] = self._find_turn(number)
        return self._turns[number]

    def _text(self, count: int, *, prompt: bool = False) -> str:
        """Return the rendering of the first `count` messages."""
        key = (count, prompt)
        if key not in self._texts:
            messages, tools = self._conversation.messages[:count], self._conversation.tools
            text = self._renderer.template.render(messages, tools, add_generation_prompt=prompt)
            self._size += len(text)
            if self._size > MAX_CONVERSATION_CHARACTERS:
                raise TemplateRefusal(
                    f"writes more than {MAX_CONVERSATION_CHARACTERS} characters for this conversation, because it repeats the "
                    "earlier turns before each answer; the conversation must be split into shorter ones"
                )
            self._texts[key] = text
        return self._texts[key]

    def _find_turn(self, number: int) -> _Turn:
        message = self._conversation.messages[number]
        prompt, whole = self._text(number, prompt=True), self._text(number + 1)
        if whole.startswith(prompt):
            start = self._start_behind(prompt, whole, message)
        elif (spelled := self._spelled_out(message, prompt)) is not None:
            return spelled
        else:
            whole, start = self._without_its_prompt(number, prompt, whole)
        if (end := self._plain_end(message, whole, start)) is not None:
            return _Turn(whole[:end], start)
        body_end = start
        for piece in given_pieces(message):
            if (end := piece.end_in(whole, start)) is None:
                if (spelled := self._spelled_out(message, prompt)) is not None:
                    return spelled
                raise TemplateRefusal(f"does not write {described(message, piece)}")
            body_end = max(body_end, end)
        return _Turn(whole[: body_end + self._end_of_turn(number, whole, start, body_end)], start)

    def _start_behind(self, prompt: str, text: str, message: Mapping[str, Any]) -> int:
        """Return where a turn begins that follows its prompt. An empty block of reasoning is the template's, not the user's."""
        start = len(prompt)
        empty = _EMPTY_REASONING.match(text, start)
        given = str(message.get("content") or "").lstrip().startswith(REASONING_BEGIN)
        return start if empty is None or given else empty.end()

    def _plain_end(self, message: Mapping[str, Any], text: str, start: int) -> int | None:
        """Return where a turn ends that is nothing but its text, written in the usual way; None for other turns."""
        content = message.get("content")
        if self._plain_turn is None or not isinstance(content, str) or message.get("tool_calls"):
            return None
        before, after = self._plain_turn
        for body in dict.fromkeys((content, content.rstrip(), content.lstrip(), content.strip())):
            turn = f"{before}{body}{after}"
            if text.startswith(turn, start) and (after.strip() or len(text) == start + len(turn)):
                return start + len(turn)
        return None

    def _spelled_out(self, message: Mapping[str, Any], prompt: str) -> _Turn | None:
        """Return a turn that begins with reasoning as the model has to write it, for templates that cut reasoning off.

        None for other turns. Where the prompt ends with <think>, the turn continues from there.
        """
        text = text_with_reasoning(message)
        if text is None or self._plain_turn is None:
            return None
        text = text.strip()
        if prompt.rstrip().endswith(REASONING_BEGIN):
            text = text.removeprefix(REASONING_BEGIN).lstrip("\n")
        return _Turn(prompt + text + self._plain_turn[1], len(prompt))

    def _without_its_prompt(self, number: int, prompt: str, whole: str) -> tuple[str, int]:
        """Return a turn with its context where the finished conversation does not begin with the prompt.

        Mistral's templates write the system message only into a prompt: the turn is put behind its prompt. DeepSeek-R1's prompt
        ends with <think>, which a finished answer does not have: the turn begins behind what both texts have in common.
        """
        before = self._text(number)
        earliest = _common_length(whole, before)  # before that, there are earlier messages
        for boundary in (*self._after_previous_text(number, prompt), prompt[_common_length(prompt, before) :]):
            found = whole.rfind(boundary) if boundary.strip() else -1
            if found + len(boundary) >= earliest and found >= 0:
                return prompt + whole[found + len(boundary) :], len(prompt)
        common = _common_length(prompt, whole)
        common = min(self._boundary_before(text, common) for text in (prompt, whole))
        if common < _common_length(prompt, before):
            raise TemplateRefusal("does not continue its own prompt, so that answers cannot be separated from the rest")
        return whole, common

    def _after_previous_text(self, number: int, prompt: str) -> Iterator[str]:
        """Yield the end of a prompt, from the last text of the message before it on."""
        pieces = list(given_pieces(self._conversation.messages[number - 1])) if number else []
        closing = self._closing_of_prompt(number) or ""
        before = prompt.removesuffix(closing).rstrip()
        for form in pieces[-1].forms if pieces else ():
            if before.endswith(form.rstrip()):
                yield prompt[len(before) - len(form.rstrip()) :]
            elif not closing and (position := prompt.rfind(form)) >= 0:
                yield prompt[position:]

    def _closing_of_prompt(self, number: int) -> str | None:
        """Return what a prompt has behind its last text, which may itself contain that text; None if this is not certain."""
        messages, tools = self._conversation.messages[:number], self._conversation.tools
        if not messages or not isinstance(messages[-1].get("content"), str):
            return None
        try:
            probe = self._renderer.template.render(
                [*messages[:-1], {**messages[-1], "content": _PROBE}], tools, add_generation_prompt=True
            )
        except TemplateRefusal:
            return None
        _, found, closing = probe.rpartition(_PROBE)
        return closing if found else None

    def _end_of_turn(self, number: int, whole: str, start: int, body_end: int) -> int:
        """Return how many characters behind the given text of a turn end it: its end-of-turn token, if there is one."""
        tail = whole[body_end:]
        marks = list(self._renderer.mark_pattern.finditer(tail))
        goes_on = self._continued(number)
        body = whole[max(0, start - _ANCHOR) : body_end]
        position = goes_on.rfind(body) if goes_on else -1
        shared = _common_length(tail, goes_on[position + len(body) :]) if goes_on and position >= 0 else 0
        if shared == len(tail):
            return len(tail.rstrip())
        if shared_marks := [mark for mark in marks if mark.end() <= shared]:
            return shared_marks[-1].end()
        # No token ends the turn in the middle of a conversation. One may do so at its end, such as gpt-oss's <|return|>.
        return marks[0].end() if marks else len(tail[: tail.rfind("\n", 0, shared) + 1].rstrip())

    def _continued(self, number: int) -> str | None:
        """Return the rendering of a conversation that continues after a turn, to see what belongs to the turn."""
        messages = self._conversation.messages
        following = [messages[number + 1]] if number + 1 < len(messages) else []
        for message in (*following, {"role": "user", "content": _PROBE}):
            try:
                return self._renderer.template.render([*messages[: number + 1], message], self._conversation.tools)
            except TemplateRefusal:
                continue
        return None

    def _boundary_before(self, text: str, position: int) -> int:
        """Return the position, or the beginning of the token that it is inside of."""
        for mark in self._renderer.mark_pattern.finditer(text, max(0, position - _MAX_MARK)):
            if mark.start() < position < mark.end():
                return mark.start()
            if mark.start() >= position:
                break
        return position

    def _span_within(self, text: str, number: int) -> Span | None:
        """Return where a turn is written in a longer conversation exactly as at the end of its own; None if it is not."""
        prompt = self._text(number, prompt=True)
        if not text.startswith(prompt):
            return None
        message = self._conversation.messages[number]
        start = self._start_behind(prompt, text, message)
        if (span := self._span_from(text, number, start)) is not None:
            return span
        turn = self.turn(number)
        own = turn.text[turn.start :]
        return Span(start, start + len(own)) if text.startswith(own, start) else None

    def _span_from(self, text: str, number: int, start: int) -> Span | None:
        """Return where a turn ends that begins at `start`, if it is written and ended as usual; None for other turns."""
        message = self._conversation.messages[number]
        if (end := self._plain_end(message, text, start)) is not None:
            return Span(start, end)
        closing = self._closing if message.get("tool_calls") else ""
        stop = text.find(closing, start) if closing else -1
        if stop < 0:
            return None
        ends = [piece.end_in(text, start, stop) for piece in given_pieces(message)]
        if any(end is None for end in ends):
            return None
        behind = text[max(end for end in ends if end is not None) : stop]
        return None if any(character.isalnum() for character in behind) else Span(start, stop + len(closing))

    @cached_property
    def _closing(self) -> str:
        """What ends a turn with tool calls: from the first token behind its last argument on; "" if there is no such token."""
        learned = zip(self._conversation.messages, self._conversation.learned, strict=True)
        last = max(number for number, (message, learns) in enumerate(learned) if learns and message.get("tool_calls"))
        turn = self.turn(last)
        ends = [
            end
            for piece in given_pieces(self._conversation.messages[last])
            if (end := piece.end_in(turn.text, turn.start)) is not None
        ]
        first = self._renderer.mark_pattern.search(turn.text, max(ends, default=turn.start))
        return "" if first is None else turn.text[first.start() :]


def _require_all_texts(conversation: Conversation, rendering: Rendering) -> None:
    """Check that a rendering contains what its messages give."""
    missing = missing_from(rendering.text, conversation, rendering.turns[-1], rendering.turns)
    if missing is not None:
        raise TemplateRefusal(f"does not write {missing}")


def _require_words(words: Sequence[Sequence[str]], conversation: Conversation, rendering: Rendering) -> None:
    """Check that a rendering contains the words of its messages, and those of the learned turns where it is learned."""
    _require_all_texts(conversation, rendering)
    learned = "".join(rendering.text[start:end] for start, end in rendering.spans)
    for number, own in enumerate(words[: rendering.turns[-1] + 1]):
        if any((word in learned) != (number in rendering.turns) for word in own):
            raise TemplateRefusal("mixes answers with other messages, so that they cannot be separated")


def _segments(rendering: Rendering, names: Mapping[str, str]) -> tuple[Segment, ...]:
    """Return the segments of a rendering, with the special tokens of given texts in segments of their own."""
    segments: list[Segment] = []
    position = 0
    for start, end in rendering.spans:
        segments += _marked(rendering.text[position:start], names, learn=False)
        segments += _marked(rendering.text[start:end], names, learn=True)
        position = end
    return tuple(segments)


def _marked(text: str, names: Mapping[str, str], *, learn: bool) -> Iterator[Segment]:
    """Yield the segments of a text in which placeholders stand for the special tokens of given texts."""
    for part in re.split(f"([{''.join(names)}])", text) if names else (text,):
        if part:
            yield Segment(text=names.get(part, part), learn=learn, literal=part in names)


def _alternatives(marks: frozenset[str]) -> re.Pattern[str] | None:
    longest_first = sorted((mark for mark in marks if mark.strip()), key=lambda mark: (-len(mark), mark))
    return re.compile("|".join(map(re.escape, longest_first))) if longest_first else None


def _common_length(first: str, second: str) -> int:
    """Return how many characters two texts begin with that are the same."""
    low, high = 0, min(len(first), len(second))
    while low < high:
        middle = (low + high + 1) // 2
        if first[low:middle] == second[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low
