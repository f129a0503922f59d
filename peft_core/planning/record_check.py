"""Check records against the base model before a job is queued: what its chat template writes, and what fits max_length.

A child process renders and counts (`check_records.py`), because a chat template is code of a stranger that could run for ever.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from peft_core.data import table
from peft_core.data.records import write_records
from peft_core.errors import DataError, unwritable
from peft_core.schemas.base_model import Base
from peft_core.schemas.dataset import RecordLengths, SkippedRecords, SourceKind, SourceSummary, TrainingData
from peft_core.schemas.frozen import FrozenModel
from peft_core.system.child_process import run_json_child

TIMEOUT_S = 90.0
LIMITS = (512, 1024, 2048, 4096, 8192)  # values of max_length that are proposed
_REASON = "chat_template"


class RecordCheckRequest(FrozenModel):
    source: Path
    is_copy: bool  # written by `write_records`: the user does not know this file
    base: Base
    max_length: int
    skip: bool


class RecordCheck(FrozenModel):
    """What records become with a base model."""

    checked: int  # fewer than there are if that takes too long
    examples: int  # that fit
    tokens: int  # of these examples
    lengths: RecordLengths
    refused: int  # records that the chat template does not write
    first_refused: tuple[str, ...] = ()  # their names
    reason: str = ""  # why, for the first one


def check_records(
    source: SourceSummary,
    given: TrainingData,
    base: Base,
    *,
    max_length: int,
    skip: bool,
    longer_allowed: int | None = None,
) -> tuple[SourceSummary, int]:
    """Return the summary of records with what the base model makes of them, and the tokens of an example.

    Args:
        source: What was found without the base model.
        given: Where: a path, or the records.
        base: The base model.
        max_length: The tokens of an example.
        skip: Whether records that the chat template does not write are left out instead of refused.
        longer_allowed: The highest `max_length` that may be chosen instead; None: it is not chosen but given.

    Raises:
        DataError: 'chat_template' with the number of a record that cannot be used; 'records_too_long' if none fits.
        StorageError: the records cannot be copied for the child process.
    """
    if source.kind is SourceKind.REPOSITORY:
        return source, max_length
    check = _run(source, given, base, max_length, skip=skip)
    if check.refused and not skip:
        raise _refused(check, source, base)
    lengths = check.lengths.model_copy(
        update={"max_length": max_length, "suggested": _suggested(check.lengths, base.shape.context_length)}
    )
    if longer_allowed is not None and lengths.too_long and lengths.suggested:
        chosen = max((limit for limit in LIMITS if limit <= min(lengths.suggested, longer_allowed)), default=max_length)
        if chosen > max_length:
            longer, _ = check_records(source, given, base, max_length=chosen, skip=skip)
            if longer.lengths is None or longer.lengths.too_long < lengths.too_long:
                return longer.model_copy(update={"raised_max_length": lengths}), chosen
    if not check.examples:
        raise _all_too_long(lengths, source, base)
    share = check.checked / max(1, source.examples or 1)
    left_out = {**source.left_out}
    if check.refused:
        left_out[_REASON] = check.refused
    advice = [lengths.with_advice] if lengths.too_long else []
    if check.checked < (source.examples or 0):
        advice.insert(0, f"{check.checked} of {source.examples} records were counted; the job counts the others")
    refused = SkippedRecords(reason=_REASON, count=check.refused, first=check.first_refused, example=check.reason)
    changed = source.model_copy(
        update={
            "examples": round(check.examples / share),
            "cut_records": round(check.examples / share),
            "estimated_tokens": round(check.tokens / share),
            "left_out": left_out,
            "skipped": (*source.skipped, refused) if check.refused else source.skipped,
            "lengths": lengths if lengths.too_long else None,
            "advice": (*source.advice, *advice),
        }
    )
    return changed, max_length


def _run(source: SourceSummary, given: TrainingData, base: Base, max_length: int, *, skip: bool) -> RecordCheck:
    if source.kind is SourceKind.JSONL and source.path is not None:
        return _child(source.path, base, max_length, skip=skip, is_copy=False)
    with tempfile.TemporaryDirectory(prefix="peft-mcp-records-") as directory:  # only the user can read it
        records = Path(directory) / "records.jsonl"
        try:
            if isinstance(given, str):
                table.export_records(source.path or Path(given), records, skip_unusable_records=skip)
            else:
                write_records(given, records, skip=skip)
        except OSError as error:
            raise unwritable(records, error) from error
        return _child(records, base, max_length, skip=skip, is_copy=True)


def _child(records: Path, base: Base, max_length: int, *, skip: bool, is_copy: bool) -> RecordCheck:
    return run_json_child(
        "peft_core.planning.check_records",
        RecordCheckRequest(source=records, is_copy=is_copy, base=base, max_length=max_length, skip=skip),
        RecordCheck,
        timeout_s=TIMEOUT_S,
        action="Checking the records with the base model's chat template and tokenizer",
        on_timeout=("Give fewer records", "Or use another base model: its chat template may not come to an end"),
    )


def _suggested(lengths: RecordLengths, context_length: int) -> int | None:
    """Return the smallest usual limit that takes every record, or else the highest one that takes more than now."""
    possible = sorted({limit for limit in LIMITS if limit <= context_length} | {min(context_length, LIMITS[-1])})
    enough = [limit for limit in possible if limit >= lengths.longest]
    return enough[0] if enough else possible[-1] if possible else None


def _refused(check: RecordCheck, source: SourceSummary, base: Base) -> DataError:
    where = f" of {source.path}" if source.path else ""
    name = check.first_refused[0]
    others = f" The same holds for {check.refused - 1} other records." if check.refused > 1 else ""
    return DataError(
        f"{name[:1].upper()}{name[1:]}{where} cannot be used with {base.name}: {check.reason.rstrip('.')}.{others}",
        code="chat_template",
        suggestions=(
            "Change these conversations to what the template allows, or use another base model",
            "Or set config.skip_unusable_records = true to leave them out",
        ),
        details={"refused": check.refused, "first": list(check.first_refused)},
    )


def _all_too_long(lengths: RecordLengths, source: SourceSummary, base: Base) -> DataError:
    return DataError(
        f"{source.path or 'The data'} cannot be used: {lengths.in_words}; {base.name} takes up to {base.shape.context_length}.",
        code="records_too_long",
        suggestions=(lengths.advice or "Give shorter records, or use a base model with a longer context",),
        details=lengths.model_dump(),
    )
