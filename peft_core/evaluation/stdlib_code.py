"""A little general code that is no part of anybody's project: what an adapter forgets shows there.

Functions of Python's standard library, the same for everybody whatever Python runs, so that figures compare. The base has
read them; how well it still knows them beside the adapter is the question.
"""

from __future__ import annotations

import json
from importlib.resources import files

from peft_core.schemas.dataset import Example, Segment


def general_examples() -> list[Example]:
    lines = (
        files("peft_core.evaluation")
        .joinpath("stdlib_code_samples", "code.jsonl")
        .read_text(encoding="utf-8")
        .splitlines()
    )
    functions = [json.loads(line) for line in lines]
    return [
        Example(segments=(Segment(text=function["text"]),), path=function["name"], language="python", kind="function")
        for function in functions
    ]
