"""What a data set is given and learns from files as people have them, from the file to what the chat template receives."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from peft_core.data.prepare import prepare
from peft_core.data.summarise import summarise_source
from peft_core.data.token_counter import EstimatedTokenCounter
from peft_core.schemas.conversation import Conversation
from peft_core.schemas.dataset import DatasetSpec, Segment

COUNT = 16
TOOL = {"type": "function", "function": {"name": "look", "parameters": {"type": "object", "properties": {}}}}


class Spy(EstimatedTokenCounter):
    """Keeps the conversations that a chat template would receive."""

    def __init__(self) -> None:
        self.conversations: list[Conversation] = []

    def render_chat(self, conversation: Conversation) -> tuple[tuple[Segment, ...], ...]:
        self.conversations.append(conversation)
        return super().render_chat(conversation)


def alpaca(n: int) -> dict[str, Any]:
    return {"instruction": f"ask {n}", "input": "", "output": f"answer {n}"}


def tool_call(n: int) -> dict[str, Any]:
    call = {"id": f"c{n}", "type": "function", "function": {"name": "look", "arguments": f'{{"n": {n}}}'}}
    return {
        "messages": [
            {"role": "user", "content": f"ask {n}"},
            {"role": "assistant", "content": "I look.", "tool_calls": [call]},
            {"role": "tool", "tool_call_id": f"c{n}", "content": "seen"},
            {"role": "assistant", "content": f"answer {n}"},
        ],
        "tools": [TOOL],
    }


def weights(n: int) -> dict[str, Any]:
    return {
        "messages": [
            {"role": "user", "content": f"ask {n}"},
            {"role": "assistant", "content": "BAD", "weight": 0},
            {"role": "user", "content": "No."},
            {"role": "assistant", "content": f"answer {n}", "weight": 1},
        ]
    }


def chat(n: int) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": f"ask {n}"}, {"role": "assistant", "content": f"answer {n}"}]}


def as_lines(records: list[dict[str, Any]]) -> bytes:
    return "\n".join(json.dumps(record) for record in records).encode()


def as_csv(records: list[dict[str, Any]]) -> bytes:
    cells = [json.dumps(record["messages"]).replace('"', '""') for record in records]
    return ("messages\r\n" + "".join(f'"{cell}"\r\n' for cell in cells)).encode()


@pytest.mark.parametrize(
    ("make", "name", "write", "learned"),
    [
        pytest.param(alpaca, "a.jsonl", as_lines, ["answer {n}"], id="01-alpaca-instruction"),
        pytest.param(tool_call, "a.jsonl", as_lines, ["I look.", "answer {n}"], id="02-openai-tool-calls"),
        pytest.param(weights, "a.jsonl", as_lines, ["answer {n}"], id="03-message-weight-zero"),
        pytest.param(chat, "a.json", lambda rows: json.dumps(rows).encode(), ["answer {n}"], id="json-array"),
        pytest.param(
            chat, "a.json", lambda rows: json.dumps(rows, indent=2).encode(), ["answer {n}"], id="pretty-printed"
        ),
        pytest.param(chat, "a.csv", as_csv, ["answer {n}"], id="csv"),
        pytest.param(chat, "a.jsonl.gz", lambda rows: gzip.compress(as_lines(rows)), ["answer {n}"], id="jsonl-gz"),
        pytest.param(
            chat,
            "a.jsonl",
            lambda rows: as_lines(rows).decode().encode("utf-16"),
            ["answer {n}"],
            id="utf-16-of-powershell",
        ),
    ],
)
def test_files_as_people_have_them_teach_what_they_say(
    tmp_path: Path,
    make: Callable[[int], dict[str, Any]],
    name: str,
    write: Callable[[list[dict[str, Any]]], bytes],
    learned: list[str],
):
    path = tmp_path / name
    path.write_bytes(write([make(n) for n in range(COUNT)]))
    summary = summarise_source(str(path))
    spec = DatasetSpec(source=path, source_kind=summary.kind, max_length=256, held_out_fraction=0.2, seed=0)
    spy = Spy()
    prepared = prepare(spec, directory=tmp_path / "dataset", token_counter=spy, report=lambda _detail: None)
    assert prepared.summary.train_examples + prepared.summary.held_out_examples == COUNT
    assert len(spy.conversations) == COUNT
    for n, conversation in enumerate(spy.conversations):
        turns = list(zip(conversation.messages, conversation.learned, strict=True))
        assert [message["content"] for message, learn in turns if learn] == [text.format(n=n) for text in learned]
        assert turns[0] == ({"role": "user", "content": f"ask {n}"}, False)
        if make is tool_call:
            assert conversation.tools == (TOOL,)
            assert turns[1][0]["tool_calls"][0]["function"] == {"name": "look", "arguments": {"n": n}}
            assert turns[2][0] == {"role": "tool", "content": "seen", "tool_call_id": f"c{n}"}
