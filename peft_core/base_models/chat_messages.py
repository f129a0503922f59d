"""What the messages of a conversation give, in which forms templates write it, and whether a rendering contains it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import product
from typing import Any, NamedTuple

from peft_core.schemas.conversation import Conversation

REASONING_BEGIN, REASONING_END = "<think>", "</think>"
NOUNS = {"user": "user messages", "system": "system messages", "assistant": "answers", "tool": "tool results"}
_ID_LENGTH = 9  # Mistral's templates refuse a tool call's id of another length
Message = Mapping[str, Any]


class Piece(NamedTuple):
    """What a message gives: a text, or a value among the arguments of a tool call."""

    name: str  # for people: "content", "tool call"
    value: object

    @property
    def forms(self) -> Iterator[str]:
        """The forms in which templates write it, the usual one first; the others take longer to make than to find that one."""
        if not isinstance(self.value, str):
            yield from (json.dumps(self.value), str(self.value))
            return
        yield self.value
        escaped = json.dumps(self.value, ensure_ascii=False)[1:-1]
        yield from (escaped, json.dumps(self.value)[1:-1], json.dumps(escaped, ensure_ascii=False)[1:-1])
        yield repr(self.value)[1:-1]

    def end_in(self, text: str, start: int, stop: int | None = None) -> int | None:
        """Return where the piece ends in text[start:stop], whatever the template did to white space; None if it is absent."""
        stop = len(text) if stop is None else stop
        for form in self.forms:
            if (position := text.find(form, start, stop)) >= 0:
                return position + len(form)
        dense = [index for index in range(start, stop) if not text[index].isspace()]
        squeezed = "".join(text[index] for index in dense)
        for form in self.forms:
            wanted = squeeze(form)
            if (position := squeezed.find(wanted)) >= 0:
                return dense[position + len(wanted) - 1] + 1
        return None


def given_pieces(message: Message, *, with_reasoning: bool = True) -> Iterator[Piece]:
    """Yield what a message gives. Blank texts give nothing; reasoning is in a field of its own or inside the content."""
    reasoning, content = message.get("reasoning_content"), message.get("content")
    if isinstance(content, str) and REASONING_END in content and message.get("role") == "assistant":
        inside, _, content = content.rpartition(REASONING_END)
        reasoning = inside.replace(REASONING_BEGIN, "", 1)
    if with_reasoning and isinstance(reasoning, str):
        yield from _piece("reasoning", reasoning)
    if isinstance(content, str):
        yield from _piece("content", content)
    for call in message.get("tool_calls") or ():
        function = call.get("function", call)
        yield from _piece("tool calls", function.get("name"))
        for key, value in _leaves(function.get("arguments")):
            yield from _piece("arguments of tool calls", key)
            yield from _piece("arguments of tool calls", value)


def tool_names(tools: Sequence[Message]) -> Iterator[Piece]:
    for tool in tools:
        function = tool.get("function", tool)
        yield from _piece("tools", function.get("name") if isinstance(function, Mapping) else None)


def missing_from(text: str, conversation: Conversation, last: int, learned: Sequence[int]) -> str | None:
    """Return what a rendering up to the message `last` lacks, in words; None if everything is there.

    Reasoning of turns that are not learned there may be missing: templates drop it on purpose.
    """
    squeezed = ""
    for position, message in enumerate(conversation.messages[: last + 1]):
        for piece in given_pieces(message, with_reasoning=position in learned):
            if not any(form in text for form in piece.forms):
                squeezed = squeezed or squeeze(text)
                if not any(squeeze(form) in squeezed for form in piece.forms):
                    return described(message, piece)
    for piece in tool_names(conversation.tools):
        if not any(form in text for form in piece.forms):
            return "tools"
    return None


def described(message: Message, piece: Piece) -> str:
    """Return what a template does not write, in words."""
    if piece.name != "content":
        return piece.name
    if message.get("tool_calls"):
        return "words beside a tool call"
    return NOUNS.get(str(message.get("role")), f"messages of the role {str(message.get('role'))[:40]!r}")


def squeeze(text: str) -> str:
    """Return a text without white space."""
    return "".join(text.split())


def _piece(name: str, value: object) -> Iterator[Piece]:
    value = value.strip() if isinstance(value, str) else value
    if value is not None and value != "":
        yield Piece(name, value)


def _leaves(value: object) -> Iterator[tuple[object, object]]:
    """Yield (key, value) for what is in nested arguments; the key is None inside a list, the value None for a container."""
    if isinstance(value, str):
        try:
            parsed = json.loads(value)
        except ValueError:
            parsed = None
        if isinstance(parsed, dict | list):
            yield from _leaves(parsed)
        else:
            yield None, value
        return
    items: Iterable[tuple[object, object]] = ()
    if isinstance(value, Mapping):
        items = value.items()
    elif isinstance(value, list | tuple):
        items = ((None, item) for item in value)
    for key, item in items:
        if isinstance(item, Mapping | list | tuple):
            yield key, None
            yield from _leaves(item)
        else:
            yield key, item


def text_with_reasoning(message: Message) -> str | None:
    """Return reasoning and answer as a model writes them; None for a turn without reasoning, or with tool calls."""
    content, reasoning = message.get("content"), message.get("reasoning_content")
    if message.get("tool_calls") or not isinstance(content, str):
        return None
    if isinstance(reasoning, str) and reasoning.strip():
        return f"{REASONING_BEGIN}\n{reasoning.strip()}\n{REASONING_END}\n\n{content.lstrip()}"
    return content if REASONING_END in content else None


def significant(message: Message) -> Iterator[tuple[str, Any]]:
    """Yield the fields of a message that say something: templates ask whether `tool_calls` is there, not whether it is null."""
    for key, value in message.items():
        if key == "content" or (value is not None and not (key == "tool_calls" and not value)):
            yield key, value


def plain(value: Any, change: Callable[[str], str] = lambda text: text) -> Any:
    """Return a copy of JSON-like data, with every text in it changed, the names of fields too."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {change(key): plain(item, change) for key, item in value.items()}
    return [plain(item, change) for item in value] if isinstance(value, list | tuple) else value


# Equivalent forms of one conversation: templates differ in how they want calls to be given.


def variants(conversation: Conversation) -> Iterator[Conversation]:
    """Yield the forms of a conversation: arguments as objects or as text, no content as "" or null, ids long or short."""
    if not any(message.get("tool_calls") or message.get("role") == "tool" for message in conversation.messages):
        yield conversation
        return
    for as_text, no_content, short_ids in product((False, True), ("", None), (False, True)):
        messages = tuple(
            _variant(message, as_text=as_text, no_content=no_content, short_ids=short_ids)
            for message in conversation.messages
        )
        yield replace(conversation, messages=messages)


def _variant(message: Message, *, as_text: bool, no_content: str | None, short_ids: bool) -> dict[str, Any]:
    changed = dict(message)
    if message.get("tool_calls"):
        changed["tool_calls"] = [
            _call_variant(call, as_text=as_text, short_ids=short_ids) for call in message["tool_calls"]
        ]
        if not message.get("content"):
            changed["content"] = no_content
    if short_ids and isinstance(message.get("tool_call_id"), str):
        changed["tool_call_id"] = _short_id(message["tool_call_id"])
    return changed


def _call_variant(call: Message, *, as_text: bool, short_ids: bool) -> dict[str, Any]:
    changed = dict(call)
    function = call.get("function")
    if as_text and isinstance(function, Mapping) and isinstance(function.get("arguments"), Mapping):
        arguments = json.dumps(function["arguments"], ensure_ascii=False)
        changed["function"] = {**function, "arguments": arguments}
    if short_ids:
        changed["id"] = _short_id(str(call.get("id", "")))
    return changed


def _short_id(given: str) -> str:
    if len(given) == _ID_LENGTH and given.isalnum():
        return given
    return hashlib.sha256(given.encode()).hexdigest()[:_ID_LENGTH]


# Conversations of one shape: what a template does with one, it does with the others.


def shape_of(conversation: Conversation) -> tuple[object, ...]:
    """Return what the check of a sample depends on: roles, which fields are there, and which messages are learned."""
    messages = (
        (
            message.get("role"),
            learned,
            tuple(sorted(message)),
            *(piece.name for piece in given_pieces(message) if piece.name != "arguments of tool calls"),
        )
        for message, learned in zip(conversation.messages, conversation.learned, strict=True)
    )
    return (bool(conversation.tools), *messages)


def sample_of_shape(conversation: Conversation) -> tuple[Conversation, list[tuple[str, ...]]]:
    """Return a conversation of the same shape whose texts are unmistakable words, and the words of each message.

    Reasoning is left out of the words: templates drop it on purpose.
    """
    messages: list[Message] = []
    words: list[tuple[str, ...]] = []
    for number, message in enumerate(conversation.messages):
        own: list[str] = []

        def word(label: str, number: int = number, own: list[str] = own) -> str:
            own.append(f"Zq{label}{number:05}x")
            return own[-1]

        sample = dict(message)
        content = message.get("content")
        if isinstance(content, str) and content.strip():
            has_reasoning = REASONING_END in content and message.get("role") == "assistant"
            reasoning = f"{REASONING_BEGIN}\nZqr{number:05}x\n{REASONING_END}\n\n" if has_reasoning else ""
            has_answer = not has_reasoning or bool(content.rpartition(REASONING_END)[2].strip())
            sample["content"] = reasoning + (word("c") if has_answer else "")
        if message.get("tool_calls"):
            sample["tool_calls"] = [
                _sample_call(call, word(f"n{index}"), word(f"a{index}"))
                for index, call in enumerate(message["tool_calls"])
            ]
        messages.append(sample)
        words.append(tuple(own))
    return replace(conversation, messages=tuple(messages)), words


def _sample_call(call: Message, name: str, argument: str) -> dict[str, Any]:
    return {**call, "function": {"name": name, "arguments": {"value": argument}}}
