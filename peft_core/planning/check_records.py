"""The child process of `record_check.py`: a RecordCheckRequest (JSON) in, a RecordCheck or an ErrorInfo out.

By hand: `python -m peft_core.planning.check_records < request.json`.
"""

from __future__ import annotations

import contextlib
import math
import resource
import sys
import time
from collections.abc import Iterator

from peft_core.data.examples import fitting_segments, render_record
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
MAX_S = 30.0  # what was not checked until then is checked by the job
MAX_MEMORY_BYTES = 8 << 30  # of addresses: a template can ask for any amount
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
    deadline = time.monotonic() + MAX_S
    checked = refused = 0
    first: list[str] = []
    reason = ""
    for record in _records(request):
        if time.monotonic() > deadline:
            break
        checked += 1
        if record.format in (RecordFormat.TEXT, RecordFormat.CHUNK):
            lengths.add_split(record)
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
        lengths.add(renderings)
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


class _Lengths:
    """Sums up how long the examples are."""

    def __init__(self, counter: TokenCounter, max_length: int) -> None:
        self._counter = counter
        self._max_length = max_length
        self._exact_bytes = self._exact_tokens = 0
        self.examples = self.tokens = self.too_long = self.shortened = self.longest = 0

    def add_split(self, record: Record) -> None:
        """Count a record that is split where it is too long."""
        size = len(record.content.encode())
        self.tokens += math.ceil(size / self._bytes_per_token)
        self.examples += 1

    def add(self, renderings: tuple[tuple[Segment, ...], ...]) -> None:
        """Count the examples of one record. It is too long if one of them does not fit, shortened if its beginning does."""
        too_long = shortened = False
        for segments in renderings:
            counts = self._count(segments)
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
