"""Say in a sentence what has changed since an adapter was trained, and when to retrain."""

from __future__ import annotations

from peft_core.schemas.staleness import Staleness
from peft_core.staleness.compare import Changes

# Measured by benchmarks/staleness.py: what an adapter does not gain on changed code costs 0.02 nats per token over all code
# (as much as an update may be behind a full retraining) from 12 % of the units on in one package, from 20 % in another.
RETRAIN_PERCENT = 10.0
# Units in common, as a share of the smaller code base. Nine Python packages had 0.5 to 8 % in common with one another,
# mostly imports; starlette 0.38 and 1.3 had 43 %, mcp 1.9 and 2.0 had 25 %.
_DIFFERENT_CODE = 0.12


def is_other_code(changes: Changes) -> bool:
    """Return whether two code bases have so little in common that one is no version of the other."""
    return changes.in_common is not None and changes.in_common < _DIFFERENT_CODE


def describe(changes: Changes, commits: int | None, *, source: str, had_commit: bool) -> Staleness:
    """Return the staleness with its sentences.

    Args:
        changes: What differs.
        commits: How many commits were made since; None if that is not known.
        source: The path of the code, for people.
        had_commit: Whether the training recorded a commit.
    """
    percent = None if changes.share is None else round(100 * changes.share, 1)
    retrain = percent is not None and percent >= RETRAIN_PERCENT
    sentences = [_what(changes, commits, percent)]
    if had_commit and commits is None:
        sentences.append("Its commit is not in the history of the current branch, so commits cannot be counted.")
    if is_other_code(changes):
        retrain = False
        sentences.append(f"Hardly anything of what it was trained on is in {source}, which may be another code base.")
    elif retrain:
        sentences.append("Retrain it with refresh_project: it has not seen enough of the code as it is now.")
    elif changes.any:
        sentences.append(f"Retraining is worthwhile from about {RETRAIN_PERCENT:.0f} % of the units.")
    return Staleness(
        text=" ".join(sentences),
        retrain=retrain,
        commits_behind=commits,
        files=changes.files,
        files_changed=changes.changed,
        files_new=changes.new,
        files_deleted=changes.deleted,
        units_changed_percent=percent,
        source=source,
    )


def _what(changes: Changes, commits: int | None, percent: float | None) -> str:
    files = f"{changes.files} file{'' if changes.files == 1 else 's'}"
    behind = f"{commits} commit{'' if commits == 1 else 's'} behind" if commits else ""
    if not changes.any:
        if behind:
            return f"{behind}, but none of its {files} has changed."
        return f"Up to date: none of its {files} has changed since the training."
    differing = changes.changed + changes.new + changes.deleted
    details = [f"{changes.new} new"] * bool(changes.new) + [f"{changes.deleted} deleted"] * bool(changes.deleted)
    what = f"{differing} of {files} changed" + (f" ({', '.join(details)})" if details else "")
    if percent is not None:
        what += f", {_percent(percent, about=changes.is_estimate)} of the units"
    if behind:
        return f"{behind}: {what}."
    return f"Not committed: {what}." if commits == 0 else f"Since the training, {what}."


def _percent(percent: float, *, about: bool) -> str:
    if percent == 0 and not about:
        return "none"
    return "less than 1 %" if percent < 1 else f"{'about ' * about}{percent:.0f} %"
