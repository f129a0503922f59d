"""What is measured on, kept apart from what is trained on, by the rule that tells later what an adapter was trained on.

Files and copies are apart already. What is left are texts that go on in each other, as chunks of a window that slides over
a file, and answers that are given to several questions.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import replace
from pathlib import Path

from peft_core.data.examples import taught
from peft_core.data.overlap import SEEN, runs_of, shares_a_run, shares_seen
from peft_core.data.split import Split
from peft_core.errors import DataError
from peft_core.example import Example


def kept_apart(parts: Split, spool: Path) -> Split:
    """Without the held-out examples of which half is trained on. The spool holds examples in the order of the split.

    Where that would be all of them, measuring comes first: whatever shares a run of lines with them is not trained on.

    Raises:
        DataError: 'too_few_examples', all of them hold the same.
    """
    held_out = dict(_texts(spool, parts.held_out))
    seen = shares_seen(held_out, (text for _, text in _texts(spool, parts.train)))
    kept = [position for position in parts.held_out if seen[position] < SEEN]
    if kept:
        return replace(parts, held_out=kept, seen_as_lines=len(parts.held_out) - len(kept))
    runs = runs_of(held_out.values())
    train = [position for position, text in _texts(spool, parts.train) if not shares_a_run(text, runs)]
    if not (train and held_out):
        raise DataError(
            "All examples hold the same lines or the same answer: whatever is held out is trained on as well, and nothing can "
            "be measured.",
            code="too_few_examples",
            suggestions=("Give records that differ in what is to be learned from them",),
        )
    return replace(parts, train=train, seen_as_lines=len(parts.train) - len(train))


def _texts(spool: Path, positions: Collection[int]) -> Iterator[tuple[int, str]]:
    wanted = set(positions)
    with spool.open("rb") as lines:
        for position, line in enumerate(lines):
            if position in wanted:
                yield position, taught(Example.model_validate_json(line))
