"""Functions from Python's standard library, on which evaluations measure how much an adapter forgets.

They belong to no user's project. They are packaged as text and do not depend on the Python version that runs, so results
are comparable between machines. Every base model has probably seen them; only the change caused by the adapter matters.
"""

from __future__ import annotations

import json
from importlib.resources import files

from peft_core.schemas.dataset import Example, Segment


def stdlib_examples() -> list[Example]:
    """Return the packaged functions as examples."""
    directory = files("peft_core.evaluation").joinpath("stdlib_code_samples")
    lines = directory.joinpath("code.jsonl").read_text(encoding="utf-8").splitlines()
    functions = [json.loads(line) for line in lines]
    return [
        Example(segments=(Segment(text=function["text"]),), path=function["name"], language="python", kind="function")
        for function in functions
    ]
