"""Parse conversations: the messages of OpenAI's format and of ShareGPT's, their tool calls, and the tools beside them.

Every key of a message is used, harmless, or a reason to refuse the record; a `Conversation` comes out, in the form in
which chat templates take messages. What is made alike on the way:

- `developer` becomes `system`, `function` and `ipython` become `tool`, ShareGPT's human, gpt, observation and
  function_call become `user`, `assistant`, `tool` and a tool call.
- Content that is a list of text parts becomes one text, the parts on lines of their own (as in vLLM).
- A legacy `function_call` becomes `tool_calls`. Arguments that are given as JSON text become an object, as transformers
  asks for.
- `refusal` is what the assistant said, so it becomes the content. `reasoning` and `thinking` become `reasoning_content`.
- `weight` (OpenAI, Mistral), `train`, `training`, `trainable` (axolotl) and `loss` (XTuner, ms-swift) say whether an
  answer is learned. Other weights than 0 and 1 are refused: there is no such loss here.
- What follows the last answer that is learned has no effect on a causal language model: it is dropped, and noted.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from peft_core.data.records.checks import (
    Place,
    SkipReason,
    check_keys,
    first_present,
    parse_json,
    present,
    require_json,
    require_list,
    require_text,
    type_in_words,
)
from peft_core.errors import sanitize
from peft_core.schemas.conversation import Conversation

_ROLES = {
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("user", "human", "prompter"), "user"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "bard", "bing", "model", "bot", "chatbot", "ai"), "assistant"),
    **dict.fromkeys(("tool", "function", "ipython", "observation", "function_response", "tool_response"), "tool"),
    **dict.fromkeys(("function_call", "tool_call"), "function_call"),
}
_SHOWN_ROLES = (
    "system, developer, user, assistant, tool, function (or ShareGPT's human, gpt, observation, function_call)"
)
_WEIGHT, *_FLAGS = LEARNED_KEYS = ("weight", "train", "training", "trainable", "loss")
_REASONING = ("reasoning_content", "reasoning", "thinking")
_ASSISTANT_KEYS = ("tool_calls", "function_call", "refusal", *_REASONING)
_MESSAGE_KEYS = frozenset({"role", "from", "content", "value", "name", "tool_call_id", *LEARNED_KEYS, *_ASSISTANT_KEYS})
_TEXT_PARTS = ("text", "input_text", "output_text")
_MAX_NAME = 200  # characters of a tool's name


def parse_conversation(
    value: object, key: str, place: Place, *, system: object = None, tools: object = None, context: int = 0
) -> Conversation:
    """Return the conversation that a list of messages holds.

    Args:
        value: The messages.
        key: What errors call them.
        place: Where they are.
        system: The content of the system message, if it is given beside the messages.
        tools: The tool schemas that are given beside the messages, or None.
        context: The first so many messages are context: their answers are not learned.

    Raises:
        DataError: a message that cannot be used, or no answer that is learned.
    """
    given = require_list(value, key, place)
    if not given:
        raise place.refuse(f"{key!r} is an empty list; it must hold at least one message")
    messages: list[dict[str, Any]] = []
    learned: list[bool] = []
    inside = place.part(f".{key}[]")
    for number, each in enumerate(given, 1):
        message, learn = _message(each, f"message {number} of {key!r}", inside)
        messages.append(message)
        learned.append(learn and number > context)
    if words := _content(system, {"role": "system"}, "the system message", place).strip():
        if any(message["role"] == "system" for message in messages):
            raise place.refuse(f"it has a system message beside {key!r} and another one in it; one must be removed")
        messages.insert(0, {"role": "system", "content": words})
        learned.insert(0, False)
    if not any(learned):
        raise _nothing_learned(messages, key, place, context)
    last = max(index for index, learn in enumerate(learned) if learn) + 1
    if last < len(messages):
        place.notes.unused[f"messages after the last answer that is learned, in {key}"] += 1
    return Conversation(tuple(messages[:last]), tuple(learned[:last]), _tools(tools, place))


def _nothing_learned(messages: Sequence[Mapping[str, Any]], key: str, place: Place, context: int) -> Exception:
    answers = sum(message["role"] == "assistant" for message in messages[context:])
    rule = "no message has the role 'assistant'; at least one must, because answers are what is learned"
    if answers:
        rule = f"no answer in {key!r} is learned: all are marked as context; at least one must not be"
    return place.refuse(rule, reason=SkipReason.NOTHING_LEARNED)


def _message(value: object, name: str, place: Place) -> tuple[dict[str, Any], bool]:
    """Return a message as templates take it, and whether it is learned."""
    if not isinstance(value, Mapping):
        raise place.refuse(
            f"{name} is {type_in_words(value)}; it must be an object such as {{'role': …, 'content': …}}"
        )
    check_keys(value, _MESSAGE_KEYS, place, what="a message")
    for keys in (("role", "from"), ("content", "value"), _REASONING):
        if len(given := present(value, keys)) > 1:
            raise place.refuse(f"{name} has {' and '.join(given)}, which mean the same; it must have one of them")
    given_role = first_present(value, ("role", "from"))
    role = _ROLES.get(given_role.lower()) if isinstance(given_role, str) else None
    if role is None:
        raise place.refuse(f"the role of {name} is {sanitize(repr(given_role))}; it must be one of {_SHOWN_ROLES}")
    message: dict[str, Any] = {"role": role}
    content = first_present(value, ("content", "value"))
    if role == "function_call":
        message = {"role": "assistant", "content": "", "tool_calls": _sharegpt_calls(content, name, place)}
    else:
        message["content"] = _content(content, message, name, place)
    _add_names(value, message, name, place)
    if message["role"] == "assistant":
        _add_assistant_keys(value, message, name, place)
    elif unfitting := present(value, _ASSISTANT_KEYS):
        raise place.refuse(
            f"{name} has {unfitting[0]!r} and the role {given_role!r}; only an assistant's message may have it"
        )
    _require_content(message, name, place)
    return message, _is_learned(value, message["role"], name, place)


def _content(content: object, message: dict[str, Any], name: str, place: Place) -> str:
    """Return the text of a message. Parts that hold reasoning go into `message`."""
    if content is None:
        return ""
    if message["role"] == "tool" and not isinstance(content, str) and not _is_parts(content):
        return json.dumps(require_json(content, f"content of {name}", place), ensure_ascii=False)
    if not isinstance(content, (str, Sequence)):
        raise place.refuse(
            f"the content of {name} is {type_in_words(content)}; it must be text or a list of text parts"
        )
    if isinstance(content, str):
        return require_text(content, f"content of {name}", place, may_be_blank=True)
    texts = []
    for part in content:
        if isinstance(part, str):
            texts.append(require_text(part, f"content of {name}", place, may_be_blank=True))
            continue
        kind = part.get("type") if isinstance(part, Mapping) else None
        has_only_text = isinstance(part, Mapping) and present(part, part) == ["text"]  # Bedrock names no type
        if kind in _TEXT_PARTS or has_only_text:
            check_keys(part, ("type", "text"), place.part(".content[]"), what="a text part")
            texts.append(require_text(part.get("text"), f"text of a part of {name}", place, may_be_blank=True))
        elif kind == "refusal":
            check_keys(part, ("type", "refusal"), place.part(".content[]"), what="a refusal part")
            texts.append(require_text(part.get("refusal"), f"refusal of a part of {name}", place))
        elif kind == "thinking" and "reasoning_content" not in message:
            check_keys(
                part, ("type", "thinking"), place.part(".content[]"), harmless=("signature",), what="a thinking part"
            )
            message["reasoning_content"] = require_text(part.get("thinking"), f"thinking of a part of {name}", place)
        else:
            raise place.refuse(
                f"the content of {name} has a part of the type {sanitize(repr(kind))}; only parts of the type 'text' can be "
                "learned, because base models here read text alone",
                "Remove the part, or the record",
                reason=SkipReason.NOT_TEXT,
            )
    return "\n".join(texts)


def _is_parts(content: object) -> bool:
    return (
        isinstance(content, Sequence)
        and len(content) > 0
        and all(isinstance(part, Mapping) and isinstance(part.get("type"), str) for part in content)
    )


def _add_names(value: Mapping[str, Any], message: dict[str, Any], name: str, place: Place) -> None:
    for key in ("name", "tool_call_id"):
        if (text := value.get(key)) is not None:
            message[key] = require_text(text, f"{key} of {name}", place)
    if "tool_call_id" in message and message["role"] != "tool":
        raise place.refuse(f"{name} has 'tool_call_id'; only a message of the role 'tool' may have it")


def _add_assistant_keys(value: Mapping[str, Any], message: dict[str, Any], name: str, place: Place) -> None:
    for key in present(value, _REASONING):
        if "reasoning_content" in message:
            raise place.refuse(f"{name} has its reasoning twice: as {key!r} and as a part of its content")
        if text := require_text(value[key], f"{key} of {name}", place, may_be_blank=True):
            message["reasoning_content"] = text
    if (refusal := value.get("refusal")) is not None:
        text = require_text(refusal, f"refusal of {name}", place)
        if message["content"]:
            raise place.refuse(f"{name} has both 'content' and 'refusal'; it must have one of them")
        message["content"] = text
    calls = _calls(value.get("tool_calls"), name, place)
    if (legacy := value.get("function_call")) is not None:
        calls = [*calls, _call(legacy, f"function_call of {name}", place.part(".function_call"))]
    if calls and "tool_calls" in message:
        raise place.refuse(f"{name} is a function_call and has 'tool_calls' as well; it must have one of them")
    if calls:
        message["tool_calls"] = calls


def _require_content(message: Mapping[str, Any], name: str, place: Place) -> None:
    """Check that a message says something. A tool may return nothing, and a system message may be empty on purpose."""
    if message["role"] in ("tool", "system") or message.get("tool_calls") or message["content"].strip():
        return
    calls = " or tool_calls" if message["role"] == "assistant" else ""
    raise place.refuse(f"'content' of {name} is missing or blank; it must hold some text{calls}")


def _is_learned(value: Mapping[str, Any], role: str, name: str, place: Place) -> bool:
    marks: dict[str, bool] = {}
    for key in present(value, LEARNED_KEYS):
        mark = value[key]
        allowed = (0, 1) if key == _WEIGHT else (True, False)
        if not isinstance(mark, (int, float)) or mark not in allowed:
            words = "0 (context) or 1 (learned)" if key == _WEIGHT else "true or false"
            raise place.refuse(f"{key!r} of {name} is {sanitize(repr(mark))}; it must be {words}")
        marks[key] = bool(mark)
    if len(set(marks.values())) > 1:
        raise place.refuse(f"{name} is marked as learned and as context: {sanitize(marks)}")
    learn = all(marks.values())
    if marks and learn and role != "assistant":
        raise place.refuse(
            f"{name} has the role {role!r} and is marked as learned ({', '.join(marks)}); only "
            "answers of the assistant are learned",
            "Remove the mark, or set it to 0 or false",
        )
    return learn and role == "assistant"


# -- tools ------------------------------------------------------------------------------------------------------------------


def _calls(value: object, name: str, place: Place) -> list[dict[str, Any]]:
    if value is None:
        return []
    calls = require_list(value, f"tool_calls of {name}", place)
    return [
        _call(call, f"tool call {number} of {name}", place.part(".tool_calls[]"))
        for number, call in enumerate(calls, 1)
    ]


def _sharegpt_calls(content: object, name: str, place: Place) -> list[dict[str, Any]]:
    """Return the calls that the text of a ShareGPT function_call holds: {"name", "arguments"}, or a list of them."""
    value = parse_json(content, f"value of {name}", place) if isinstance(content, str) else content
    calls = value if isinstance(value, Sequence) and value else [value]
    return [_call(call, f"tool call {number} of {name}", place) for number, call in enumerate(calls, 1)]


def _call(value: object, name: str, place: Place) -> dict[str, Any]:
    """Return a tool call in OpenAI's form. {"name", "arguments"} without the wrapper `function` is understood."""
    if not isinstance(value, Mapping):
        raise place.refuse(f"{name} is {type_in_words(value)}; it must be an object with 'function'")
    call: dict[str, Any] = {"type": "function"}
    function = value
    if value.get("function") is not None:
        check_keys(value, ("type", "id", "function"), place, harmless=("index",), what="a tool call")
        function = value["function"]
        if not isinstance(function, Mapping):
            raise place.refuse(f"'function' of {name} is {type_in_words(function)}; it must be an object")
    if value.get("type", "function") not in ("function", None):
        raise place.refuse(f"{name} has the type {sanitize(repr(value['type']))}; it must be 'function'")
    own = {key: each for key, each in function.items() if function is not value or key not in ("type", "id")}
    check_keys(own, ("name", "arguments"), place.part(".function"), what="a tool call's function")
    if value.get("id") is not None:
        call["id"] = require_text(value["id"], f"id of {name}", place)
    tool = require_text(function.get("name"), f"name of {name}", place)
    if len(tool) > _MAX_NAME:
        raise place.refuse(f"the name of {name} has {len(tool)} characters; it must have at most {_MAX_NAME}")
    call["function"] = {"name": tool, "arguments": _arguments(function.get("arguments"), name, place)}
    return call


def _arguments(value: object, name: str, place: Place) -> dict[str, Any]:
    key = f"arguments of {name}"
    if isinstance(value, str):
        value = parse_json(value, key, place) if value.strip() else {}
    value = require_json({} if value is None else value, key, place)
    if not isinstance(value, dict):
        raise place.refuse(f"{key!r} is {type_in_words(value)}; it must be an object, or JSON text that holds one")
    return value


def _tools(value: object, place: Place) -> tuple[Mapping[str, Any], ...]:
    """Return tool schemas in the form {"type": "function", "function": {…}}, whole."""
    if value is None or (isinstance(value, str) and not value.strip()):
        return ()
    tools = []
    for number, each in enumerate(require_list(value, "tools", place), 1):
        given = parse_json(each, f"tool {number}", place) if isinstance(each, str) else each
        tool = require_json(given, f"tool {number}", place)
        if isinstance(tool, dict) and tool.get("function") is None:
            kind = tool.get("type")
            tool = {
                "type": kind,
                "function": {key: each for key, each in tool.items() if key not in ("type", "function")},
            }
        function = tool.get("function") if isinstance(tool, dict) else None
        if not isinstance(function, dict) or tool.get("type") not in ("function", None):
            raise place.refuse(f"tool {number} must be an object {{'type': 'function', 'function': {{'name': …}}}}")
        require_text(function.get("name"), f"name of tool {number}", place)
        tools.append({**tool, "type": "function"})
    return tuple(tools)
