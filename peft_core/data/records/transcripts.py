"""Turn the session transcripts of coding assistants into conversations: Claude Code and Codex CLI (JSON Lines).

In: the values of a file's lines. Out: records in OpenAI's format, {"messages": […]}, which are parsed as any other. A
transcript is recognised by its lines, not by the name of the file:

- Claude Code (~/.claude/projects/*/*.jsonl): {"type": "user" | "assistant", "message": {…}, "uuid", "sessionId",
  "isSidechain", …} with Anthropic's content blocks; other types (summary, system, file-history-snapshot, …) are for the
  program itself.
- Codex CLI (~/.codex/sessions/**/rollout-*.jsonl): {"type": "response_item", "payload": {…}} with the items of OpenAI's
  Responses API; earlier versions wrote the items without the wrapper.

A session is cut at the user's prompts, so that each answer is learned once. A turn with many tool calls is cut again where
it would not fit into max_length: each piece begins with the prompt and the next answers. The result of a tool that would
take more than a quarter of an example loses its middle, as in the assistants themselves; it is context and not learned.
What is not used is counted: thinking, images, lines that the program wrote, what a session was summarised to.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from peft_core.data.records.checks import Notes, first_present
from peft_core.data.token_counter import BYTES_PER_TOKEN

_CLAUDE_TYPES = ("user", "assistant")
_CODEX_TYPES = ("session_meta", "response_item", "event_msg", "turn_context", "compacted")
_CODEX_ITEMS = (
    "message", "reasoning", "function_call", "function_call_output", "custom_tool_call", "custom_tool_call_output",
    "local_shell_call", "web_search_call",
)  # fmt: skip
# Texts that the programs put into the user's mouth: notices, not prompts.
_INJECTED = (
    "<command-name>", "<command-message>", "<local-command-", "<system-reminder>", "<bash-stdout>", "<bash-input>",
    "Caveat: The messages below", "[Request interrupted", "This session is being continued", "<task-notification>",
    "<environment_context>", "<user_instructions>", "# AGENTS.md instructions", "<turn_aborted>", "<user_shell_command>",
    "<permissions instructions>", "<INSTRUCTIONS>",
)  # fmt: skip
_NOTICES = ("isCompactSummary", "isApiErrorMessage")
_RESULT_SHARE = 4  # a tool's result takes at most 1/4 of an example
_MIN_RESULT = 400  # characters of a tool's result that are kept at least
_MARKUP = 12  # tokens that a template writes around a message, roughly


def is_transcript(values: Sequence[object]) -> bool:
    """Return whether the first values of a file are lines of a transcript."""
    return any(_is_claude(value) or _is_codex(value) for value in values)


def _is_claude(value: object) -> bool:
    if not isinstance(value, Mapping) or not isinstance(value.get("type"), str):
        return False
    if value["type"] in _CLAUDE_TYPES:
        return isinstance(value.get("message"), Mapping) and ("sessionId" in value or "uuid" in value)
    return ("sessionId" in value and "uuid" in value) or (value["type"] == "summary" and "leafUuid" in value)


def _is_codex(value: object) -> bool:
    if not isinstance(value, Mapping):
        return False
    if value.get("type") in _CODEX_TYPES:
        return isinstance(value.get("payload"), Mapping)
    if value.get("type") == "message":
        return value.get("role") in ("user", "assistant") and isinstance(value.get("content"), list)
    return value.get("record_type") == "state" or (value.get("type") in _CODEX_ITEMS and "call_id" in value)


@dataclass(slots=True)
class _Turn:
    """A prompt, and the messages that answer it."""

    name: str
    prompt: dict[str, Any]
    answers: list[dict[str, Any]] = field(default_factory=list)


def conversations_of(
    lines: Iterable[tuple[str, object]], notes: Notes, max_length: int
) -> Iterator[tuple[str, object]]:
    """Yield the conversations of a transcript, named by the line of their prompt. A line that is not JSON is passed on."""
    turns: dict[str, _Turn | None] = {}  # the open turn of the session ("") and of each of its side chains
    budget = max(int(max_length * BYTES_PER_TOKEN), 2 * _MIN_RESULT)
    chain_of: dict[str, str] = {}  # of a Claude Code side chain: its root, by the ids of its lines
    for name, value in lines:
        if not isinstance(value, Mapping):
            yield name, value
            continue
        chain, messages = "", _codex_messages(value, notes)
        if "message" in value or "sessionId" in value:
            chain, messages = _chain(value, chain_of), _claude_messages(value, notes)
        for message in messages:
            turn = turns.get(chain)
            if message["role"] == "user":
                if turn is not None:
                    yield from _cut(turn, budget, notes)
                turns[chain] = _Turn(name, message) if message["content"] else None
            elif turn is None:
                notes.left_out["answer_without_prompt"] += 1
            else:
                _append(turn, message)
    for turn in turns.values():
        if turn is not None:
            yield from _cut(turn, budget, notes)


def _append(turn: _Turn, message: dict[str, Any]) -> None:
    """Add a message to a turn. The programs write what the model says block by block, on lines of their own."""
    last = turn.answers[-1] if turn.answers else None
    if last is None or (last["role"], message["role"]) != ("assistant", "assistant"):
        turn.answers.append(message)
        return
    last["content"] = "\n\n".join(filter(None, (last["content"], message["content"])))
    if calls := message.get("tool_calls"):
        last["tool_calls"] = [*last.get("tool_calls", ()), *calls]


# -- Claude Code ------------------------------------------------------------------------------------------------------------


def _chain(value: Mapping[str, Any], chain_of: dict[str, str]) -> str:
    """Return the side chain that a line belongs to; "" for the session itself."""
    if not value.get("isSidechain"):
        return ""
    own, parent = str(value.get("uuid")), value.get("parentUuid")
    chain = chain_of.get(str(parent), str(value.get("agentId") or own))
    chain_of[own] = chain
    return chain


def _claude_messages(value: Mapping[str, Any], notes: Notes) -> Iterator[dict[str, Any]]:
    kind, message = value.get("type"), value.get("message")
    if kind not in _CLAUDE_TYPES or not isinstance(message, Mapping):
        notes.left_out["summary" if kind == "summary" else "program_line"] += 1
        return
    if any(value.get(mark) for mark in _NOTICES) or message.get("model") == "<synthetic>":
        notes.left_out["program_line"] += 1
        return
    content = message.get("content")
    blocks = [{"type": "text", "text": content}] if isinstance(content, str) else content
    if not isinstance(blocks, Sequence):
        notes.left_out["program_line"] += 1
        return
    texts: list[str] = []
    calls: list[dict[str, Any]] = []
    is_prompt = kind == "user"
    for block in blocks:
        if not isinstance(block, Mapping):
            notes.left_out["unknown_block"] += 1
        elif block.get("type") == "text" and isinstance(block.get("text"), str):
            texts.append(block["text"])
        elif block.get("type") == "tool_use":
            calls.append(_call(block.get("id"), block.get("name"), block.get("input")))
        elif block.get("type") == "tool_result":
            is_prompt = False
            yield _result(block.get("tool_use_id"), _text_of(block.get("content"), notes))
        else:
            notes.left_out[_block_reason(block)] += 1
    yield from _said(str(kind), "\n\n".join(texts), calls, notes, is_prompt=is_prompt)


def _block_reason(block: Mapping[str, Any]) -> str:
    kind = block.get("type")
    if kind in ("thinking", "redacted_thinking", "reasoning"):
        return "thinking"
    return "image" if kind in ("image", "input_image", "image_url") else "unknown_block"


# -- Codex CLI --------------------------------------------------------------------------------------------------------------


def _codex_messages(value: Mapping[str, Any], notes: Notes) -> Iterator[dict[str, Any]]:
    item = value.get("payload") if value.get("type") in _CODEX_TYPES else value
    kind = item.get("type") if isinstance(item, Mapping) else None
    if value.get("type") not in (*_CODEX_ITEMS, "response_item") or not isinstance(item, Mapping):
        notes.left_out["summary" if value.get("type") in ("compacted", "summary") else "program_line"] += 1
    elif kind == "message" and item.get("role") in ("user", "assistant"):
        yield from _said(
            item["role"], _text_of(item.get("content"), notes), [], notes, is_prompt=item["role"] == "user"
        )
    elif kind == "function_call":
        yield _calling(_call(item.get("call_id"), item.get("name"), item.get("arguments")))
    elif kind == "custom_tool_call":
        yield _calling(_call(item.get("call_id"), item.get("name"), {"input": item.get("input")}))
    elif kind == "local_shell_call":
        yield _calling(_call(item.get("call_id"), "local_shell", item.get("action")))
    elif kind in ("function_call_output", "custom_tool_call_output"):
        yield _result(item.get("call_id"), _output(item.get("output"), notes))
    else:
        notes.left_out["thinking" if kind == "reasoning" else "program_line"] += 1


def _output(value: object, notes: Notes) -> str:
    """Return the result of a tool. Codex wraps the output of a command in JSON text: {"output", "metadata"}."""
    if isinstance(value, str) and value.lstrip().startswith('{"output"'):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            return str(value)
    if isinstance(value, Mapping):
        value = first_present(value, ("output", "content"))
    return _text_of(value, notes)


# -- messages ---------------------------------------------------------------------------------------------------------------


def _said(
    role: str, text: str, calls: list[dict[str, Any]], notes: Notes, *, is_prompt: bool
) -> Iterator[dict[str, Any]]:
    """Yield a message, if it says something. A prompt without text, such as an image, has no content: it only ends a turn."""
    if role == "user" and text.lstrip().startswith(_INJECTED):
        notes.left_out["program_line"] += 1
    elif text.strip() or calls:
        yield {"role": role, "content": text} | ({"tool_calls": calls} if calls else {})
    elif is_prompt:
        yield {"role": role, "content": ""}


def _calling(call: dict[str, Any]) -> dict[str, Any]:
    return {"role": "assistant", "content": "", "tool_calls": [call]}


def _call(call_id: object, name: object, arguments: object) -> dict[str, Any]:
    call: dict[str, Any] = {"type": "function", "function": {"name": name, "arguments": arguments}}
    return {"id": call_id, **call} if isinstance(call_id, str) else call


def _result(call_id: object, text: str) -> dict[str, Any]:
    message = {"role": "tool", "content": text}
    return {**message, "tool_call_id": call_id} if isinstance(call_id, str) else message


def _text_of(content: object, notes: Notes) -> str:
    """Return the text of content parts; count those that are not text."""
    if content is None or isinstance(content, str):
        return content or ""
    if not isinstance(content, Sequence):
        return json.dumps(content, ensure_ascii=False)
    texts = []
    for part in content:
        text = part.get("text") if isinstance(part, Mapping) else part
        if isinstance(text, str):
            texts.append(text)
        else:
            notes.left_out[_block_reason(part) if isinstance(part, Mapping) else "unknown_block"] += 1
    return "\n\n".join(texts)


# -- pieces that fit --------------------------------------------------------------------------------------------------------


def _cut(turn: _Turn, budget: int, notes: Notes) -> Iterator[tuple[str, object]]:
    """Yield a turn as one record, or as several that fit: each with the prompt, and with other answers to learn.

    A later piece repeats the answer before it as context, with the results that its first answer refers to.
    """
    pieces: list[list[dict[str, Any]]] = []
    size, before = budget + 1, list[dict[str, Any]]()
    for step in _steps(turn, budget, notes):
        step_size = sum(map(_size, step))
        if size + step_size > budget:
            context = [{**message, "weight": 0} if message["role"] == "assistant" else message for message in before]
            pieces.append([turn.prompt, *context])
            size = sum(map(_size, pieces[-1]))
        pieces[-1] += step
        size += step_size
        before = step
    if not pieces:
        notes.left_out["prompt_without_answer"] += 1
    for number, piece in enumerate(pieces, 1):
        while piece[-1]["role"] == "tool":  # nothing is learned after it, here
            piece.pop()
        yield (
            turn.name if number == 1 else f"{turn.name}, part {number}",
            {
                "messages": piece,
                "file_path": turn.name,  # the pieces of a turn are trained on, or held out, together
            },
        )


def _steps(turn: _Turn, budget: int, notes: Notes) -> Iterator[list[dict[str, Any]]]:
    """Yield each answer with the results of its tool calls, the long ones shortened."""
    longest = max(_MIN_RESULT, budget // _RESULT_SHARE)
    step: list[dict[str, Any]] = []
    for message in turn.answers:
        if message["role"] == "tool":
            if len(message["content"]) > longest:
                notes.left_out["middle_of_a_tool_result"] += 1
                message["content"] = _shorten(message["content"], longest)
            if step:
                step.append(message)
            else:
                notes.left_out["result_without_call"] += 1
            continue
        if step:
            yield step
        step = [message]
    if step:
        yield step


def _shorten(text: str, longest: int) -> str:
    half = longest // 2
    return f"{text[:half]}\n… ({len(text) - 2 * half} characters left out) …\n{text[-half:]}"


def _size(message: Mapping[str, Any]) -> int:
    """Return the size of a message as it will be rendered, in bytes, roughly."""
    calls = json.dumps(message["tool_calls"], ensure_ascii=False) if "tool_calls" in message else ""
    return len(message["content"].encode("utf-8", "replace")) + len(calls) + round(_MARKUP * BYTES_PER_TOKEN)
