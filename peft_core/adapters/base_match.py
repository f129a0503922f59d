"""Compare a base model with the one that an adapter was trained on. Shapes do not suffice: many models share them.

The record is a claim in the adapter's manifest. It protects against mistakes, not against a forged manifest.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from peft_core.adapters.findings import warning
from peft_core.adapters.manifest import MANIFEST_NAME, BaseRecord
from peft_core.errors import PeftMcpError, sanitize
from peft_core.schemas.base_model import Base
from peft_core.schemas.results import BaseMatch, Reason

_CERTAIN = (BaseMatch.EXACT, BaseMatch.SAMPLED)


def match_base(record: BaseRecord | None, base: Base, hint: str | None = None) -> tuple[BaseMatch, list[Reason]]:
    """Return how certain it is that `base` is the recorded base model, with a warning if it is not certain.

    `hint` is the base model's name in the adapter's configuration. It proves nothing, but helps a person to decide.
    """
    if record is None:
        return BaseMatch.SHAPE_ONLY, [_not_recorded(base, hint)]
    verdict = _verdict(record, base)
    if verdict in _CERTAIN:
        return verdict, []
    return verdict, [_doubt(record, base, verdict)]


def find_base(record: BaseRecord, candidates: Iterable[Callable[[], Base]]) -> Base | None:
    """Return the first candidate with the recorded weights, else the first that is the same model in another number format.

    Each candidate is a call that resolves a base model; those that raise PeftMcpError are skipped.
    """
    family: Base | None = None
    for candidate in candidates:
        try:
            base = candidate()
        except PeftMcpError:
            continue
        verdict = _verdict(record, base)
        if verdict in _CERTAIN:
            return base
        if verdict is BaseMatch.SAME_FAMILY and family is None:
            family = base
    return family


def _verdict(record: BaseRecord, base: Base) -> BaseMatch:
    trained, given = record.fingerprint, base.fingerprint
    if trained.architecture != given.architecture:
        return BaseMatch.SHAPE_ONLY
    if trained.content is not None and trained.content == given.content:
        return BaseMatch.EXACT
    if trained.sample == given.sample:
        named_alike = record.revision is not None and (record.name, record.revision) == (base.name, base.revision)
        return BaseMatch.EXACT if named_alike else BaseMatch.SAMPLED
    converted = (record.format, trained.storage) != (base.format, given.storage)
    if trained.family and trained.family == given.family and converted:
        return BaseMatch.SAME_FAMILY
    return BaseMatch.SHAPE_ONLY


def _doubt(record: BaseRecord, base: Base, verdict: BaseMatch) -> Reason:
    trained, given = record.fingerprint, base.fingerprint
    recorded = f"{sanitize(record.name)}{f' at {sanitize(record.revision)}' if record.revision else ''}"
    named = {"found": base.name, "expected": recorded}
    fix = f"Use {recorded}, or train an adapter for {base.name}"
    if verdict is BaseMatch.SAME_FAMILY:
        return warning(
            "other_storage",
            f"{base.name} is {recorded} in another number format: every norm weight is equal. A model that was trained "
            "further with frozen norms would look the same.",
            found=f"{base.format}: {sanitize(given.storage)}",
            expected=f"{record.format}: {sanitize(trained.storage)}",
            fix="Compare its output with that of the base model without an adapter",
        )
    if trained.architecture != given.architecture:
        message = (
            f"The adapter fits, but {base.name} is of another architecture than {recorded}, on which it was trained: "
            "the vocabulary, the rotary embedding or another setting differs."
        )
        return warning("other_architecture", message, fix=fix, **named)
    if trained.family and given.family and trained.family != given.family:
        message = (
            f"The adapter fits, but {base.name} is not the model on which it was trained: its norm weights differ."
        )
        return warning("other_model", message, fix=fix, **named)
    message = (
        f"The adapter fits, but the weights of {base.name} are not those on which it was trained: another revision, a "
        "model trained further, or one into which an adapter was merged."
    )
    return warning("other_weights", message, fix=fix, **named)


def _not_recorded(base: Base, hint: str | None) -> Reason:
    message = f"Nothing proves that the adapter belongs to {base.name}: there is no readable {MANIFEST_NAME} with it."
    if hint is not None:
        alike = _last(hint) == _last(base.name)
        message += f" Its configuration names {sanitize(hint)!r}, {'which may be' if alike else 'which looks like'} "
        message += "this base." if alike else "another base."
    return warning(
        "base_not_recorded",
        message,
        found=sanitize(hint) if hint is not None else None,
        expected=base.name,
        fix="Load it only if you know that it was trained on this base",
    )


def _last(name: str) -> str:
    """Return a model's name without its organisation or directories, in lower case."""
    return name.replace("\\", "/").rstrip("/").rpartition("/")[2].lower().removesuffix(".gguf")
