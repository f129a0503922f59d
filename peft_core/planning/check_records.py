"""The child process of `record_check.py`: a RecordCheckRequest (JSON) in, a RecordCheck or an ErrorInfo out.

Conversations are refused by their shape, that is roles and fields. So after the first `RENDERED` of them, only those are
rendered that have a shape of which few were seen, or that may not fit into max_length; the others are counted from their size.
The job renders all.

By hand: `python -m peft_core.planning.check_records < request.json`.
"""

from __future__ import annotations

import contextlib
import math
import resource
import sys
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from peft_core.base_models.chat_messages import shape_of
from peft_core.data.examples import RESERVED_TOKENS, fitting_segments, render_record
from peft_core.data.records import Record, RecordFormat, read_copy, read_file
from peft_core.data.token_counter import BYTES_PER_TOKEN, TokenCounter
from peft_core.errors import DataError
from peft_core.planning.record_check import RecordCheck, RecordCheckRequest
from peft_core.planning.token_counts import token_counter_of
from peft_core.schemas.dataset import RecordLengths, Segment
from peft_core.system.child_process import answer_request
from peft_core.system.failures import TaskKind

TASK = TaskKind(
    name="inspection",
    crash_code="inspection_failed",
    log="the log of the server",
    memory_advice=("Close other programs, or give a part of the data.",),
)
COUNTED_S = 10.0  # from then on, only conversations of a new shape are rendered, and the counts are extrapolated
MAX_S = 30.0  # what was not checked until then is checked by the job
MAX_MEMORY_BYTES = 8 << 30  # of addresses: a template can ask for any amount
RENDERED = 1000  # conversations of any shape
_OF_A_SHAPE = 20  # conversations of one shape that are rendered before others are counted by it
_MARGIN = 1.15  # how many more tokens per byte than the densest of them another one may have
_EXACT_BYTES = 4_000_000  # texts that are tokenised; of the others, only those whose length is in doubt
_DOUBT = 0.3  # relative error of an estimate from bytes
_NAMED = 5


def check(request: RecordCheckRequest) -> RecordCheck:
    """Render and count the records.

    Raises:
        DataError: a record that is broken in itself; see `records.read_file`.
    """
    counter = token_counter_of(request.base)
    lengths = _Lengths(counter, request.max_length)
    started = time.monotonic()
    checked = refused = 0
    first: list[str] = []
    reason = ""
    for record in _records(request):
        elapsed = time.monotonic() - started
        if elapsed > MAX_S:
            break
        if elapsed > COUNTED_S and lengths.has_seen(record):
            continue
        checked += 1
        if record.format in (RecordFormat.TEXT, RecordFormat.CHUNK):
            lengths.add_split(record)
            continue
        if lengths.add_by_shape(record):
            continue
        try:
            renderings = render_record(record, counter)
        except DataError as error:
            if error.code != "chat_template":
                raise
            refused += 1
            reason = reason or error.message.partition(": ")[2]
            if len(first) < _NAMED:
                first.append(record.name)
            continue
        lengths.add(record, renderings)
    return RecordCheck(
        checked=checked,
        examples=lengths.examples,
        tokens=lengths.tokens,
        lengths=RecordLengths(
            records=checked - refused,
            too_long=lengths.too_long,
            shortened=lengths.shortened,
            longest=lengths.longest,
            max_length=request.max_length,
        ),
        refused=refused,
        first_refused=tuple(first),
        reason=reason,
    )


def _records(request: RecordCheckRequest) -> Iterator[Record]:
    if request.is_copy:
        return read_copy(request.source, skip=request.skip)
    return read_file(request.source, max_length=request.max_length, skip=request.skip)


@dataclass(slots=True)
class _Rendered:
    """What conversations of one shape became. Each gave one example, else none is counted by the shape."""

    records: int = 0
    size: int = 0  # bytes that were given
    tokens: int = 0
    densest: float = 0.0  # most tokens per byte
    is_simple: bool = True


class _Lengths:
    """Sums up how long the examples are."""

    def __init__(self, counter: TokenCounter, max_length: int) -> None:
        self._counter = counter
        self._max_length = max_length
        self._exact_bytes = self._exact_tokens = 0
        self._rendered = 0
        self._shapes: defaultdict[object, _Rendered] = defaultdict(_Rendered)
        self.examples = self.tokens = self.too_long = self.shortened = self.longest = 0

    def add_split(self, record: Record) -> None:
        """Count a record that is split where it is too long."""
        size = len(record.content.encode())
        self.tokens += math.ceil(size / self._bytes_per_token)
        self.examples += 1

    def has_seen(self, record: Record) -> bool:
        """Return whether the chat template wrote a record of this shape."""
        return record.conversation is None or shape_of(record.conversation) in self._shapes

    def add_by_shape(self, record: Record) -> bool:
        """Count a conversation from its size, and return whether that is possible: it is like others, and surely fits."""
        if self._rendered < RENDERED or record.conversation is None:
            return False
        seen = self._shapes.get(shape_of(record.conversation))
        if seen is None or seen.records < _OF_A_SHAPE or not seen.is_simple:
            return False
        size = len(record.content.encode("utf-8", "replace"))
        if size * seen.densest * _MARGIN + RESERVED_TOKENS > self._max_length:
            return False
        self.examples += 1
        self.tokens += math.ceil(size * seen.tokens / seen.size)
        return True

    def _remember(self, record: Record, tokens: Sequence[int]) -> None:
        if record.conversation is None:
            return
        seen = self._shapes[shape_of(record.conversation)]
        self._rendered += 1
        seen.records += 1
        size = max(1, len(record.content.encode("utf-8", "replace")))
        seen.size += size
        seen.tokens += sum(tokens)
        seen.densest = max(seen.densest, sum(tokens) / size)
        seen.is_simple = seen.is_simple and len(tokens) == 1

    def add(self, record: Record, renderings: tuple[tuple[Segment, ...], ...]) -> None:
        """Count the examples of one record. It is too long if one of them does not fit, shortened if its beginning does."""
        too_long = shortened = False
        counted = [self._count(segments) for segments in renderings]
        self._remember(record, [sum(counts) + 1 for counts in counted])
        for segments, counts in zip(renderings, counted, strict=True):
            self.longest = max(self.longest, sum(counts) + 2)
            fitting = fitting_segments(segments, counts, self._max_length)
            shortened = shortened or (fitting.segments > 0 and fitting.turns_left_out > 0)
            if fitting.segments:
                self.examples += 1
                self.tokens += fitting.tokens + 1
            else:
                too_long = True
        self.too_long += too_long or shortened
        self.shortened += shortened and not too_long

    @property
    def _bytes_per_token(self) -> float:
        return self._exact_bytes / self._exact_tokens if self._exact_tokens else BYTES_PER_TOKEN

    def _count(self, segments: tuple[Segment, ...]) -> list[int]:
        texts = [segment.text for segment in segments]
        sizes = [len(text.encode("utf-8", "replace")) for text in texts]
        estimates = [math.ceil(size / self._bytes_per_token) for size in sizes]
        limit = self._max_length
        in_doubt = limit * (1 - _DOUBT) < sum(estimates) < limit * (1 + _DOUBT)
        if self._exact_bytes > _EXACT_BYTES and not in_doubt:
            return estimates
        counts = self._counter.count(texts)
        self._exact_bytes += sum(sizes)
        self._exact_tokens += sum(counts)
        return counts


def limit_memory() -> None:
    """Bound what a template can take. Some systems do not support it; the time limit of the parent remains."""
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_AS, (MAX_MEMORY_BYTES, MAX_MEMORY_BYTES))


if __name__ == "__main__":
    limit_memory()
    sys.exit(answer_request(RecordCheckRequest, check, TASK))
