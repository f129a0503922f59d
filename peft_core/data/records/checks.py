"""What every parser of records needs: where a value is, what to say about one that cannot be used, and which keys are
harmless.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from peft_core.errors import DataError, sanitize

MAX_RECORD_BYTES = 16_000_000  # of one record, as text
_NAMED_KEYS = 12  # of a record whose keys are shown
_MAX_DEPTH = 64  # of arguments and schemas of tools; templates write them by recursion
_FIRST = 5  # skipped records that are named per reason


class RecordFormat(StrEnum):
    """The format of a record. The value is the example that error messages show."""

    TEXT = '{"text": "def add(a, b): …"}'
    COMPLETION = '{"prompt": "…", "completion": "…"}'
    OUTPUT = '{"input": "…", "output": "…"}'
    INSTRUCTION = '{"instruction": "…", "input": "…", "output": "…"}'
    MESSAGES = '{"messages": [{"role": "user", "content": "…"}, {"role": "assistant", "content": "…"}]}'
    SHAREGPT = '{"conversations": [{"from": "human", "value": "…"}, {"from": "gpt", "value": "…"}]}'
    CHUNK = '{"content": "def add(a, b): …", "language": "python", "file_path": "src/app.py"}'


FORMATS = (  # by their keys; an error has no space for all examples
    'one of {"text"}, {"prompt", "completion"}, {"input", "output"}, {"instruction", "input", "output"}, '
    '{"messages": [{"role", "content"}]}, {"conversations": [{"from", "value"}]}, {"content", "language", "file_path"}'
)


class SkipReason(StrEnum):
    """Why a record cannot be used. The values are shown, counted and stored, so they must not change."""

    BAD_VALUE = "bad_value"  # a key has a value of the wrong type, or one that is not allowed
    NOT_JSON = "not_json"
    NOTHING_LEARNED = "nothing_learned"  # no answer of the assistant, or only answers that are marked as context
    NOT_TEXT = "not_text_content"  # an image, sound or file in a message
    OTHER_FORMAT = "other_format"  # than the first record has
    PREFERENCE = "preference_pair"
    UNKNOWN_FORMAT = "unknown_format"
    UNKNOWN_KEY = "unknown_key"


@dataclass(slots=True)
class Skipped:
    """Records that were skipped for one reason."""

    count: int
    first: list[str]  # names of the first few: "line 17"
    example: str  # what is wrong with the first one


@dataclass(slots=True)
class Notes:
    """What was given but not used while records were read. The reader fills it in as it goes."""

    unused: Counter[str] = field(default_factory=Counter)  # records per key that has no meaning for training
    skipped: dict[SkipReason, Skipped] = field(default_factory=dict)
    left_out: Counter[str] = field(default_factory=Counter)  # parts of a transcript, per reason

    def counts(self) -> Counter[str]:
        """Return how many records and parts of records were left out, per reason."""
        return self.left_out + Counter({reason.value: skipped.count for reason, skipped in self.skipped.items()})

    def skip(self, name: str, error: DataError) -> None:
        reason = SkipReason(error.details["reason"])
        skipped = self.skipped.setdefault(reason, Skipped(0, [], error.message))
        skipped.count += 1
        if len(skipped.first) < _FIRST:
            skipped.first.append(name)


@dataclass(frozen=True, slots=True)
class Place:
    """Where a value is: a record of a source, or a part of the record."""

    name: str  # of the record: "record 17", "line 17"
    where: str = ""  # the file or table
    notes: Notes = field(default_factory=Notes)
    inside: str = ""  # the part of the record, as a path that jq understands: ".messages[]"
    format: RecordFormat | None = None  # of the record, if it is known

    @property
    def words(self) -> str:
        return f"{self.name} of {self.where}" if self.where else self.name

    def part(self, path: str) -> Place:
        return Place(self.name, self.where, self.notes, self.inside + path, self.format)

    def refuse(
        self, rule: str, *suggestions: str, reason: SkipReason = SkipReason.BAD_VALUE, code: str = "broken_record"
    ) -> DataError:
        """Return the error for a record that breaks a rule. Without suggestions, the format is suggested."""
        words = self.words
        return DataError(
            f"{words[0].upper()}{words[1:]} cannot be used: {rule.rstrip('.')}.",
            code=code,
            suggestions=suggestions or (f"Give every record as {self.format or FORMATS}.",),
            details={"reason": reason.value, "record": self.name},
        )


# Keys without a meaning for training, wherever they are. They are named once in the answer. Compared in lower case.
# ruff: noqa: SIM905 - a string of words is easier to read than a column of quoted words
METADATA = frozenset(
    # identity and origin
    "id _id idx index uuid uid guid hash sha md5 key row_id __index_level_0__ prompt_id question_id task_id "
    "sample_id example_id instance_id problem_id conversation_id conv_id conversation_hash dialogue_id session_id "
    "thread_id parent_id user_id turn_id message_id request_id trace_id source source_id src origin dataset "
    "dataset_name data_source subset config split url uri link reference_url site domain website repo repo_name "
    "repository repository_name path filename file_name file commit commit_hash sha256 branch license licence "
    "copyright author authors creator annotator annotator_id worker_id user username user_name avatar avatarurl "
    # time and version
    "date time timestamp ts created created_at created_time create_time createdat updated updated_at update_time "
    "modified modified_at collected_at year version revision schema schema_version schemaversion "
    # labels for people, and statistics
    "category categories subcategory topic topics subtopic tag tags keyword keywords title remark task task_name "
    "task_type type kind group cluster field subject skill skills capability difficulty level language lang "
    "locale quality quality_score score scores rating ratings rank votes upvotes downvotes likes views stars "
    "num_turns turns_count n_turns num_tokens n_tokens token_count tokens_count total_tokens length char_count "
    "word_count perplexity ppl similarity distance confidence probability toxic toxicity redacted is_duplicate "
    "verified approved status metadata meta info extra_info additional_info attributes annotations flags "
    "skip_prompt_formatting "
    # how a model was called, and what that cost
    "model model_name model_id model_version generator provider engine generation_model temperature top_p top_k "
    "max_tokens max_completion_tokens n stop stream seed frequency_penalty presence_penalty logprobs logit_bias "
    "response_format parallel_tool_calls tool_choice service_tier store usage cost latency latency_ms duration "
    "duration_ms finish_reason stop_reason stop_sequence object system_fingerprint openai_fingerprint "
    "cache_control "
    # vectors of an index
    "vector embedding embeddings _distance _relevance_score _rowid".split()
)


def check_keys(
    value: Mapping[str, Any], used: Collection[str], place: Place, *, harmless: Collection[str] = (), what: str = ""
) -> None:
    """Check that each key is used or harmless; note the harmless ones.

    A key whose value is null is as good as absent: tables have all columns in all rows.

    Raises:
        DataError: a key is neither.
    """
    for key, content in value.items():
        if key in used or content is None or (isinstance(content, float) and math.isnan(content)):
            continue
        path = f"{place.inside.removeprefix('.')}.{key}".lstrip(".")
        is_metadata = key in harmless or (
            isinstance(key, str) and (key.lower() in METADATA or key.startswith("Unnamed: "))
        )
        if is_metadata or is_empty(content):
            place.notes.unused[sanitize(path, limit=80)] += 1
            continue
        shown = sanitize(path, limit=80)
        raise place.refuse(
            f"the key {shown!r} is not used here, and it may carry a meaning; the keys of {what or 'this part'} are "
            f"{', '.join(sorted(used))} and metadata",
            f"To ignore it, delete it from all records: {_deletion(place, str(key))}",
            "Or leave out such records: config.skip_unusable_records=true",
            reason=SkipReason.UNKNOWN_KEY,
        )


def _deletion(place: Place, key: str) -> str:
    quoted = json.dumps(sanitize(key, limit=80), ensure_ascii=False)
    return f"jq -c 'del({place.inside}[{quoted}])'" if place.inside else f"jq -c 'del(.[{quoted}])'"


def is_empty(value: object) -> bool:
    return value is None or (isinstance(value, (str, Sequence, Mapping)) and len(value) == 0)


def present(value: Mapping[str, Any], keys: Iterable[str]) -> list[str]:
    """Return those keys that have a value which is not null."""
    return [key for key in keys if value.get(key) is not None]


def first_present(value: Mapping[str, Any], keys: Iterable[str]) -> Any:
    """Return the value of the first key that has one which is not null, or None."""
    return next((value[key] for key in present(value, keys)), None)


def require_text(value: object, key: str, place: Place, *, may_be_blank: bool = False) -> str:
    if not isinstance(value, str):
        raise place.refuse(f"{key!r} is {type_in_words(value)}; it must be text")
    if not may_be_blank and not value.strip():
        raise place.refuse(f"{key!r} is blank; it must hold some text")
    require_encodable(value, key, place)
    return value


def require_encodable(value: str, key: str, place: Place) -> None:
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise place.refuse(f"{key!r} holds an unpaired surrogate at character {error.start}") from error


def require_json(value: object, key: str, place: Place) -> Any:
    """Return a value as plain JSON values, such as lists for tuples.

    Raises:
        DataError: it has no JSON form, holds an unpaired surrogate, or is nested too deeply.
    """
    try:
        text = json.dumps(value, ensure_ascii=False, default=_as_mapping)
        require_encodable(text, key, place)
        value = json.loads(text)
    except (TypeError, ValueError, RecursionError) as error:
        raise place.refuse(f"{key!r} holds a value without a JSON form: {sanitize(error)}") from error
    if _is_deeper(value, _MAX_DEPTH):
        raise place.refuse(f"{key!r} is nested more than {_MAX_DEPTH} levels deep")
    return value


def _is_deeper(value: object, levels: int) -> bool:
    if not isinstance(value, (dict, list)):
        return False
    each = value.values() if isinstance(value, dict) else value
    return levels == 0 or any(_is_deeper(inner, levels - 1) for inner in each)


def parse_json(text: str, key: str, place: Place) -> Any:
    """Return the value of a text that holds JSON.

    Raises:
        DataError: it is not JSON, or has a key twice.
    """
    try:
        return loads(text)
    except RecursionError as error:
        raise place.refuse(f"{key!r} is JSON text that is nested too deeply") from error
    except ValueError as error:
        raise place.refuse(f"{key!r} is text that is not valid JSON: {sanitize(error)}") from error


def require_list(value: object, key: str, place: Place) -> Sequence[Any]:
    """Return a list. Text that holds a JSON list is understood: tables cannot always hold lists."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        value = parse_json(value, key, place)
    if not isinstance(value, Sequence) or isinstance(value, (str, bytes)):
        raise place.refuse(f"{key!r} is {type_in_words(value)}; it must be a list")
    return value


class DuplicateKeyError(ValueError):
    """An object of a JSON text has a key twice: one of the two values would be lost."""


def loads(text: str | bytes) -> Any:
    """Parse JSON.

    Raises:
        ValueError: it is not JSON; `DuplicateKeyError` if an object has a key twice.
        RecursionError: it is nested too deeply.
    """
    return json.loads(text, object_pairs_hook=distinct_keys)


def distinct_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """For `json.loads`: build an object of which no key is given twice."""
    value = dict(pairs)
    if len(value) < len(pairs):
        key = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        raise DuplicateKeyError(f"the key {sanitize(key)!r} is given twice in one object")
    return value


def keys_in_words(value: Mapping[str, Any]) -> str:
    keys = sorted(str(key) for key in value)
    return sanitize(", ".join(keys[:_NAMED_KEYS]), limit=200) or "none"


def type_in_words(value: object) -> str:
    names = {dict: "an object", list: "a list", tuple: "a list", str: "text", bool: "a truth value", type(None): "null"}
    return names.get(type(value), "a number" if isinstance(value, (int, float)) else f"a {type(value).__name__}")


def _as_mapping(value: object) -> Any:
    if isinstance(value, Mapping):
        return dict(value)
    raise TypeError(f"a {type(value).__name__} is not a JSON value")
