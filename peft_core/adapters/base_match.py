"""Compare a base model with the one that an adapter was trained on. Shapes do not suffice: many models share them.

The adapter's manifest records its base model. This protects against mistakes, not against a forged manifest.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable

from peft_core.adapters.findings import warning
from peft_core.adapters.manifest import MANIFEST_NAME, BaseRecord
from peft_core.errors import PeftMcpError, sanitize
from peft_core.schemas.base_model import Base
from peft_core.schemas.results import BaseMatch, Reason

# Unsloth's and mlx-community's names of quantised copies.
_QUANTISED = re.compile(r"(?:-unsloth)?(?:-bnb)?(?:-mlx)?-[2-8]bit(?:-dwq)?$|-(?:bf16|fp16)$", re.ASCII)
_SAME_WEIGHTS = (BaseMatch.EXACT, BaseMatch.SAMPLED)


def match_base(record: BaseRecord | None, base: Base, hint: str | None = None) -> tuple[BaseMatch, list[Reason]]:
    """Return how certain it is that `base` is the recorded base model, with a warning if it is not certain.

    `hint` is the base model's name in the adapter's configuration. It proves nothing, but helps a person to decide.
    """
    if record is None:
        return BaseMatch.SHAPE_ONLY, [_base_not_recorded(base, hint)]
    verdict = _verdict(record, base)
    if verdict in _SAME_WEIGHTS:
        return verdict, []
    return verdict, [_base_differs(record, base, verdict)]


def find_base(record: BaseRecord, candidates: Iterable[Callable[[], Base]]) -> Base | None:
    """Return the first candidate with the recorded weights, else the first that is the same model in another number format.

    Each candidate is a function that resolves a base model; candidates that raise PeftMcpError are skipped.
    """
    same_family: Base | None = None
    for candidate in candidates:
        try:
            base = candidate()
        except PeftMcpError:
            continue
        verdict = _verdict(record, base)
        if verdict in _SAME_WEIGHTS:
            return base
        if verdict is BaseMatch.SAME_FAMILY and same_family is None:
            same_family = base
    return same_family


def _verdict(record: BaseRecord, base: Base) -> BaseMatch:
    trained, given = record.fingerprint, base.fingerprint
    if trained.architecture != given.architecture:
        return BaseMatch.SHAPE_ONLY
    if trained.content is not None and trained.content == given.content:
        return BaseMatch.EXACT
    if trained.sample == given.sample:
        same_revision = record.revision is not None and (record.name, record.revision) == (base.name, base.revision)
        return BaseMatch.EXACT if same_revision else BaseMatch.SAMPLED
    converted = (record.format, trained.storage) != (base.format, given.storage)
    if trained.family and trained.family == given.family and converted:
        return BaseMatch.SAME_FAMILY
    return BaseMatch.SHAPE_ONLY


def _base_differs(record: BaseRecord, base: Base, verdict: BaseMatch) -> Reason:
    """Return the warning that describes how `base` differs from the recorded base model."""
    trained, given = record.fingerprint, base.fingerprint
    recorded = f"{sanitize(record.name)}{f' at {sanitize(record.revision)}' if record.revision else ''}"
    names = {"found": base.name, "expected": recorded}
    fix = f"Use {recorded}, or train an adapter for {base.name}"
    if verdict is BaseMatch.SAME_FAMILY:
        return warning(
            "other_storage",
            f"{base.name} is {recorded} in another number format: all norm weights are equal. A version that was "
            "fine-tuned with frozen norms would look the same.",
            found=f"{base.format}: {sanitize(given.storage)}",
            expected=f"{record.format}: {sanitize(trained.storage)}",
            fix="Compare its output with that of the base model without an adapter",
        )
    if trained.architecture != given.architecture:
        message = (
            f"The adapter fits, but the architecture of {base.name} differs from that of {recorded}, on which the adapter "
            "was trained: in the vocabulary, the rotary embedding or another setting."
        )
        return warning("other_architecture", message, fix=fix, **names)
    if trained.family and given.family and trained.family != given.family:
        message = (
            f"The adapter fits, but {base.name} is not the model on which it was trained: the norm weights differ."
        )
        return warning("other_model", message, fix=fix, **names)
    message = (
        f"The adapter fits, but it was not trained on these weights of {base.name}: they may be another revision, "
        "fine-tuned, or merged with an adapter."
    )
    return warning("other_weights", message, fix=fix, **names)


def _base_not_recorded(base: Base, hint: str | None) -> Reason:
    message = f"Nothing proves that the adapter belongs to {base.name}: it has no readable {MANIFEST_NAME}."
    if hint is not None:
        same_name = _short_name(hint) == _short_name(base.name)
        which = "which may be this base model" if same_name else "which seems to be another base model"
        message += f" Its configuration names {sanitize(hint)!r}, {which}."
    return warning(
        "base_not_recorded",
        message,
        found=sanitize(hint) if hint is not None else None,
        expected=base.name,
        fix="Load it only if you know that it was trained on this base model",
    )


def _short_name(name: str) -> str:
    """Return a model's name without its organisation, directories and marks of quantisation, in lower case."""
    name = name.replace("\\", "/").rstrip("/").rpartition("/")[2].lower().removesuffix(".gguf")
    return _QUANTISED.sub("", name)
