"""The formats of records: their keys, and what a record of each becomes.

`parse` finds the format of a record by its keys, checks that every key is used or harmless, and returns a `Record`.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from peft_core.data.languages import language_named, language_of_file
from peft_core.data.records.checks import (
    Notes,
    Place,
    RecordFormat,
    SkipReason,
    check_keys,
    is_empty,
    keys_in_words,
    parse_json,
    present,
    require_encodable,
    require_list,
    require_text,
    type_in_words,
)
from peft_core.data.records.messages import parse_conversation
from peft_core.schemas.conversation import Conversation

_DRIVE = re.compile(r"[A-Za-z]:/")
MAX_PATH = 4096  # characters of a file_path, which reports show
_MESSAGES_AS_TEXT = re.compile(r'\s*\[\s*\{\s*"(?:role|content)"\s*:\s*"')
RECORD = "record"  # the kind of examples that are not chunks of code
CHUNK_TYPES = ("function", "class", "method", "module", "import", "variable", "comment", "interface", "type", "block")
_QUESTIONS = ("instruction", "question", "query", "prompt")
_ANSWERS = ("output", "response", "answer", "completion")
_INPUTS = ("input", "context")
_SYSTEMS = ("system", "system_prompt")
_PREAMBLE = (
    "Below is an instruction that describes a task{with_input}. "
    "Write a response that appropriately completes the request."
)
_WITH_INPUT = ", paired with an input that provides further context"


_RANGES = (("start_line", "end_line"), ("start_byte", "end_byte"))
_PLACE_KEYS = ("file_path", "language")


class _Form(NamedTuple):
    """The keys of a format. `required`: one of each group must be there."""

    required: tuple[tuple[str, ...], ...]
    optional: tuple[str, ...] = ()
    harmless: tuple[str, ...] = ()  # for this format; see also `METADATA`

    @property
    def used(self) -> frozenset[str]:
        return self.required_keys | frozenset(self.optional)

    @property
    def required_keys(self) -> frozenset[str]:
        return frozenset(key for group in self.required for key in group)

    def matches(self, value: Mapping[str, Any], *, null: bool) -> bool:
        """Return whether a record has exactly one key of each required group. With `null`, its value may be null."""
        found = [sum(key in value and (null or value[key] is not None) for key in group) for group in self.required]
        return found == [1] * len(found)


_FORMS = {
    RecordFormat.TEXT: _Form((("text",),), _PLACE_KEYS),
    RecordFormat.COMPLETION: _Form((("prompt",), ("completion",)), (*_PLACE_KEYS, "tools")),
    RecordFormat.OUTPUT: _Form((("input",), ("output",)), _PLACE_KEYS),
    RecordFormat.INSTRUCTION: _Form(
        (_QUESTIONS, _ANSWERS), (*_INPUTS, *_SYSTEMS, *_PLACE_KEYS, "history", "text", "study")
    ),
    RecordFormat.MESSAGES: _Form((("messages",),), (*_SYSTEMS, "tools", "functions", "prompt", "file_path")),
    RecordFormat.SHAREGPT: _Form((("conversations", "conversation"),), (*_SYSTEMS, "tools", "file_path")),
    RecordFormat.CHUNK: _Form(
        (("content",), ("language",)),
        ("file_path", "chunk_type", *(key for keys in _RANGES for key in keys)),
        (
            "complexity_score",
            "dependencies",
            "name",
            "parent",
            "imports",
            "signature",
            "docstring",
            "chunk_index",
            "chunk_id",
        ),
    ),
}
USED_KEYS = frozenset(key for form in _FORMS.values() for key in form.used)
_PREFERENCE_KEYS = ("chosen", "rejected", "preferred_output", "non_preferred_output")


@dataclass(frozen=True, slots=True)
class Record:
    """A valid record.

    A record of an instruction has both views, `texts` and `conversation`: the conversation is for base models with a chat
    template. Other records have one of them.
    """

    name: str  # "record 17", "line 17"
    format: RecordFormat
    texts: tuple[tuple[str, bool], ...]  # (text, learn) in order; empty if only a chat template can render the record
    conversation: Conversation | None = None
    path: str = ""
    language: str = "text"
    kind: str = RECORD
    start_line: int = 0
    study: str = ""  # the API that it asks about, see `data/study`

    @property
    def needs_chat_template(self) -> bool:
        return not self.texts

    @property
    def content(self) -> str:
        """All text of the record, each on lines of its own: what is searched for secrets."""
        if self.conversation is None:
            return "\n".join(text for text, _ in self.texts)
        return "\n".join([*_leaves(self.conversation.messages), *_leaves(self.conversation.tools)])


def _leaves(value: object, key: str = "") -> Iterator[str]:
    """Yield the texts of a JSON value; those of an object as they would be assigned, so that `api_key` is seen as one."""
    if isinstance(value, str):
        yield f'{key}: "{value}"' if key else value
    elif isinstance(value, Mapping):
        for name, each in value.items():
            if name != "role":
                yield from _leaves(each, "" if name in ("content", "reasoning_content") else str(name))
    elif isinstance(value, Iterable):
        for each in value:
            yield from _leaves(each, key)


def parse(value: object, name: str, *, where: str = "", notes: Notes | None = None) -> Record:
    """Check one record.

    Raises:
        DataError: 'broken_record', with the rule that the record breaks.
    """
    place = Place(name, where, Notes() if notes is None else notes)
    if not isinstance(value, Mapping):
        raise place.refuse(f"it is {type_in_words(value)}; it must be a JSON object")
    value = _named_texts(value, place)
    record_format = _format(value, place)
    place = Place(name, where, place.notes, format=record_format)
    form = _FORMS[record_format]
    check_keys(value, form.used, place, harmless=form.harmless, what="such records")
    given = {key: each for key, each in value.items() if each is not None or key in form.required_keys}
    record = _PARSERS[record_format](given, place)
    path = _path(given, place)
    return replace(record, path=path) if path else record


def _named_texts(value: Mapping[str, Any], place: Place) -> Mapping[str, Any]:
    """Return a record that has texts as `input_ids` and `labels`, as Codebase Gardener writes it, with the keys that fit them.

    Raises:
        DataError: they are token ids.
    """
    pair = {"input_ids", "labels"}
    if not pair <= value.keys() or value.keys() & (USED_KEYS - {*_PLACE_KEYS}):
        return value
    given, learned = value["input_ids"], value["labels"]
    if not (isinstance(given, str) and isinstance(learned, str)):
        raise place.refuse(
            "'input_ids' and 'labels' must be texts; token ids have a meaning for one tokenizer only",
            "Give the text that they were made of: {'text': …}, or {'input': …, 'output': …}",
            reason=SkipReason.UNKNOWN_FORMAT,
        )
    others = {key: each for key, each in value.items() if key not in pair}
    texts = {"text": given} if given == learned else {"input": given, "output": learned}
    return {**others, **texts}


def _format(value: Mapping[str, Any], place: Place) -> RecordFormat:
    """Return the format whose required keys a record has; if there are several, the first that knows all its keys."""
    _refuse_preferences(value, place)
    for null in (False, True):
        matching = [each for each, form in _FORMS.items() if form.matches(value, null=null)]
        for empty in (True, False):  # an empty column of a table does not decide, unless nothing else does
            known = {key for key in USED_KEYS if value.get(key) is not None and (empty or not is_empty(value[key]))}
            complete = [each for each in matching if known <= _FORMS[each].used]
            if complete:
                return complete[0]
        if len(matching) == 1:
            return matching[0]
        if matching:
            raise place.refuse(
                f"its keys ({keys_in_words(value)}) match {len(matching)} formats: {' and '.join(matching)}",
                "Remove the keys that are not to be learned from",
                reason=SkipReason.UNKNOWN_FORMAT,
            )
    raise place.refuse(
        f"its keys ({keys_in_words(value)}) match none of the known formats", reason=SkipReason.UNKNOWN_FORMAT
    )


def is_record(value: Mapping[str, Any]) -> bool:
    """Return whether a value has the keys of a record, whatever else it has."""
    return any(form.matches(value, null=True) for form in _FORMS.values())


def _refuse_preferences(value: Mapping[str, Any], place: Place) -> None:
    pair = [key for key in _PREFERENCE_KEYS if not is_empty(value.get(key))]
    if {"completion", "label"} <= value.keys() and isinstance(value["label"], bool):
        pair = ["completion", "label"]
    if len(pair) < 2:
        return
    if isinstance(value[pair[0]], str):
        what = f"write {{'prompt': …, 'completion': the text of {pair[0]!r}}}"
    else:
        what = f"write {{'messages': the prompt's messages and those of {pair[0]!r}}}"
    raise place.refuse(
        f"it is a preference pair ({' and '.join(pair)}), but training on preferences (DPO, KTO) is not offered here: the "
        "worse answer has no use",
        f"To learn the better answers, {what} for each record",
        reason=SkipReason.PREFERENCE,
    )


def _path(value: Mapping[str, Any], place: Place) -> str:
    path = value.get("file_path")
    if path is None:
        return ""
    if not isinstance(path, (str, os.PathLike)):
        raise place.refuse(f"'file_path' is {type_in_words(path)}; it must be text or null")
    text = os.fspath(path).replace("\\", "/")
    if _DRIVE.match(text):  # absolute like any other path: the directories that all records share are private
        text = f"/{text[0].upper()}{text[1:]}"
    require_encodable(text, "file_path", place)
    if len(text) > MAX_PATH:
        raise place.refuse(f"'file_path' has {len(text)} characters; it must have at most {MAX_PATH}")
    return text


def _language(value: Mapping[str, Any]) -> str:
    language, path = value.get("language"), value.get("file_path")
    if isinstance(language, str) and language.strip():
        return language_named(language).name
    known = (
        language_of_file(os.fspath(path).replace("\\", "/").rpartition("/")[2])
        if isinstance(path, (str, os.PathLike))
        else None
    )
    return known.name if known else "text"


# -- one parser per format --------------------------------------------------------------------------------------------------


def _text(value: Mapping[str, Any], place: Place) -> Record:
    text = require_text(value["text"], "text", place)
    return Record(place.name, RecordFormat.TEXT, ((text, True),), language=_language(value))


def _completion(value: Mapping[str, Any], place: Place) -> Record:
    """Check a prompt and its completion: both text, or both messages, as TRL has them."""
    value = {**value, **{key: _messages_in_text(value[key], key, place) for key in ("prompt", "completion")}}
    if all(isinstance(value[key], Sequence) and not isinstance(value[key], str) for key in ("prompt", "completion")):
        return _chat_completion(value, place)
    if value.get("tools"):
        raise place.refuse("'tools' has no place in a prompt that is text; it needs a prompt of messages")
    return _pair(value, "prompt", "completion", place)


def _messages_in_text(value: object, key: str, place: Place) -> object:
    """Return the messages that a text holds as JSON, as in a cell of a CSV file; any other value as it is."""
    if isinstance(value, str) and _MESSAGES_AS_TEXT.match(value):
        return parse_json(value, key, place)
    return value


def _chat_completion(value: Mapping[str, Any], place: Place) -> Record:
    prompt, completion = value["prompt"], value["completion"]
    conversation = parse_conversation(
        [*prompt, *completion], "prompt and completion", place, tools=value.get("tools"), context=len(prompt)
    )
    return Record(place.name, RecordFormat.COMPLETION, (), conversation, language=_language(value))


def _output(value: Mapping[str, Any], place: Place) -> Record:
    return _pair(value, "input", "output", place)


def _pair(value: Mapping[str, Any], given: str, learned: str, place: Place) -> Record:
    assert place.format is not None  # noqa: S101 - for mypy
    texts = (
        (require_text(value[given], given, place, may_be_blank=True), False),
        (require_text(value[learned], learned, place), True),
    )
    return Record(place.name, place.format, texts, language=_language(value))


def _instruction(value: Mapping[str, Any], place: Place) -> Record:
    """Check an instruction in Alpaca's form, or with the column names of other data sets."""
    (question,), (answer,) = present(value, _QUESTIONS) or _QUESTIONS[:1], present(value, _ANSWERS) or _ANSWERS[:1]
    if value.get("text") is not None and (question, answer) == ("prompt", "completion"):
        raise place.refuse(
            f"its keys ({keys_in_words(value)}) match 2 formats: {RecordFormat.TEXT} and {RecordFormat.COMPLETION}",
            "Remove the keys that are not to be learned from",
            reason=SkipReason.UNKNOWN_FORMAT,
        )
    texts: dict[str, str] = {}
    for name, keys in (("input", _INPUTS), ("system", _SYSTEMS)):
        if len(given := present(value, keys)) > 1:
            raise place.refuse(f"it has {' and '.join(given)}, which mean the same; it must have one of them")
        texts[name] = require_text(value[given[0]], given[0], place, may_be_blank=True) if given else ""
    instruction = require_text(value.get(question), question, place, may_be_blank=bool(texts["input"].strip()))
    output = require_text(value.get(answer), answer, place)
    if (whole := value.get("text")) is not None and output.strip() not in require_text(
        whole, "text", place, may_be_blank=True
    ):
        raise place.refuse(f"'text' does not contain {answer!r}; beside an instruction it may only hold the same again")
    if whole is not None:
        place.notes.unused[f"text (the same as {question} and {answer})"] += 1
    turns = [*_history(value.get("history"), place), ("\n\n".join(filter(None, (instruction, texts["input"]))), output)]
    messages = [{"role": "system", "content": texts["system"]}] if texts["system"].strip() else []
    for asked, answered in turns:
        messages += [{"role": "user", "content": asked}, {"role": "assistant", "content": answered}]
    return Record(
        place.name,
        RecordFormat.INSTRUCTION,
        _alpaca(instruction, texts["input"], texts["system"], turns),
        Conversation.learning_every_answer(messages),
        language=_language(value),
        study=require_text(value["study"], "study", place).strip() if value.get("study") is not None else "",
    )


def _history(value: object, place: Place) -> list[tuple[str, str]]:
    """Return the turns before an instruction. As in LLaMA-Factory, their answers are learned, too."""
    if value is None or value == "":
        return []
    turns = []
    for number, turn in enumerate(require_list(value, "history", place), 1):
        if not isinstance(turn, Sequence) or isinstance(turn, str) or len(turn) != 2:
            raise place.refuse(
                f"turn {number} of 'history' must be a list of two texts: what was asked, and the answer"
            )
        asked, answered = (require_text(text, f"turn {number} of history", place) for text in turn)
        turns.append((asked, answered))
    return turns


def _alpaca(
    instruction: str, given: str, system: str, turns: Sequence[tuple[str, str]]
) -> tuple[tuple[str, bool], ...]:
    """Return an instruction in the form that Stanford Alpaca published, for base models without a chat template.

    A system message replaces the preamble, and earlier turns are repetitions of the form without it.
    """
    preamble = system if system.strip() else _PREAMBLE.format(with_input=_WITH_INPUT if given.strip() else "")
    texts: list[tuple[str, bool]] = []
    for asked, answered in turns[:-1]:
        texts += [(f"{preamble}\n\n### Instruction:\n{asked}\n\n### Response:\n", False), (answered, True)]
        preamble = ""
    opening = f"{preamble}\n\n### Instruction:\n{instruction}\n\n"
    middle = f"### Input:\n{given}\n\n" if given.strip() else ""
    return (*texts, (f"{opening}{middle}### Response:\n", False), (turns[-1][1], True))


def _messages(value: Mapping[str, Any], place: Place) -> Record:
    tools, functions = value.get("tools"), value.get("functions")
    if tools and functions:
        raise place.refuse("it has 'tools' and 'functions', which mean the same; it must have one of them")
    record = _chat(value, "messages", tools or functions, place)
    if (prompt := value.get("prompt")) is not None:
        assert record.conversation is not None  # noqa: S101 - for mypy
        asked = [message["content"] for message in record.conversation.messages if message["role"] == "user"]
        if not isinstance(prompt, str) or prompt.strip() not in (text.strip() for text in asked):
            raise place.refuse(
                "'prompt' is not among the user's messages; beside 'messages' it may only hold one of them again"
            )
        place.notes.unused["prompt (the same as a message)"] += 1
    return record


def _sharegpt(value: Mapping[str, Any], place: Place) -> Record:
    key = "conversations" if value.get("conversations") is not None else "conversation"
    turns = value.get(key)
    if (
        isinstance(turns, Sequence)
        and all(isinstance(turn, Mapping) for turn in turns)
        and any(turn.get("output") is not None for turn in turns)
    ):
        value = {**value, key: list(_paired_messages(turns, place.part(f".{key}[]")))}
    return _chat(value, key, value.get("tools"), place)


def _paired_messages(turns: Sequence[Mapping[str, Any]], place: Place) -> Iterator[dict[str, Any]]:
    """Yield the messages of turns in XTuner's form, {"system", "input", "output"}."""
    for number, turn in enumerate(turns, 1):
        check_keys(turn, ("system", "input", "output"), place, what="a turn")
        for key, role in (("system", "system"), ("input", "user"), ("output", "assistant")):
            if key == "output" or turn.get(key):
                yield {"role": role, "content": require_text(turn.get(key), f"{key} of turn {number}", place)}


def _chat(value: Mapping[str, Any], key: str, tools: object, place: Place) -> Record:
    assert place.format is not None  # noqa: S101 - for mypy
    given = present(value, _SYSTEMS)
    if len(given) > 1:
        raise place.refuse(f"it has {' and '.join(given)}, which mean the same; it must have one of them")
    system = value[given[0]] if given else None
    conversation = parse_conversation(value.get(key), key, place, system=system, tools=tools)
    return Record(place.name, place.format, (), conversation)


def _chunk(value: Mapping[str, Any], place: Place) -> Record:
    """Check a code chunk, which has the fields of Codebase Gardener's CodeChunk."""
    content = require_text(value["content"], "content", place)
    require_text(value["language"], "language", place)
    kind = value.get("chunk_type")
    if kind is not None and not isinstance(kind, str):
        raise place.refuse(f"'chunk_type' is {type_in_words(kind)}; it must be text, such as {', '.join(CHUNK_TYPES)}")
    for start_key, end_key in _RANGES:
        first, last = _whole_number(value, start_key, place), _whole_number(value, end_key, place)
        if first is not None and last is not None and first > last:
            raise place.refuse(f"'{start_key}' ({first}) is greater than '{end_key}' ({last})")
    score = value.get("complexity_score")
    if score is not None and (not isinstance(score, (int, float)) or isinstance(score, bool) or not score >= 0):
        raise place.refuse(f"'complexity_score' is {score!r:.80}; it must be a number of at least 0")
    if not isinstance(value.get("metadata"), Mapping | None):
        raise place.refuse(f"'metadata' is {type_in_words(value['metadata'])}; it must be an object")
    if not isinstance(value.get("dependencies"), list | tuple | None):
        raise place.refuse(f"'dependencies' is {type_in_words(value['dependencies'])}; it must be a list")
    return Record(
        place.name,
        RecordFormat.CHUNK,
        ((content, True),),
        language=language_named(value["language"]).name,
        kind=kind if kind in CHUNK_TYPES else "block",  # other tools name their chunks differently
        start_line=_whole_number(value, "start_line", place) or 0,
    )


def _whole_number(value: Mapping[str, Any], key: str, place: Place) -> int | None:
    """Return a whole number, or None if it is missing.

    Tables represent a missing number as NaN, and then all numbers of the column as floats.
    """
    number = value.get(key)
    if number is None or (isinstance(number, float) and math.isnan(number)):
        return None
    if isinstance(number, bool) or not isinstance(number, (int, float)) or number < 0 or number % 1:
        raise place.refuse(f"'{key}' is {number!r:.80}; it must be a whole number of at least 0")
    return int(number)


_PARSERS: dict[RecordFormat, Callable[[Mapping[str, Any], Place], Record]] = {
    RecordFormat.TEXT: _text,
    RecordFormat.COMPLETION: _completion,
    RecordFormat.OUTPUT: _output,
    RecordFormat.INSTRUCTION: _instruction,
    RecordFormat.MESSAGES: _messages,
    RecordFormat.SHAREGPT: _sharegpt,
    RecordFormat.CHUNK: _chunk,
}
