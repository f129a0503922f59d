"""Which verdicts of the adapter check allow an export."""

from __future__ import annotations

from peft_core.errors import InvalidArgument
from peft_core.schemas.results import BaseMatch, Compatibility


def refuse_mismatch(check: Compatibility, adapter_path: str, *, named: bool) -> list[str]:
    """Return the warnings of a check that allows the export.

    An adapter without a record of its base model is exported if the user named the base model: only the user can know it.

    Raises:
        InvalidArgument: The adapter does not fit, or its record says that it was trained on other weights.
    """
    errors = [reason for reason in check.reasons if reason.severity == "error"]
    unrecorded = named and any(reason.code == "base_not_recorded" for reason in check.reasons)
    if check.compatible or (check.verdict is BaseMatch.SHAPE_ONLY and unrecorded and not errors):
        return [reason.message for reason in check.reasons]
    reasons = errors or check.reasons
    raise InvalidArgument(
        "adapter_path",
        adapter_path,
        " ".join(reason.message for reason in reasons[:3]) or f"the verdict of the check is {check.verdict}",
        suggestions=[reason.fix for reason in reasons[:1] if reason.fix],
        code=reasons[0].code if reasons else "incompatible",
    )
