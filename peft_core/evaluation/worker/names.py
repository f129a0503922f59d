"""Which names belong to a project, and which ones a completion invents."""

from __future__ import annotations

import keyword
import re
from collections.abc import Collection
from functools import cache

from peft_core.data.code_names import MIN_CHARACTERS
from peft_core.data.study.builtins import builtin_names, standard_modules
from peft_core.evaluation.stdlib_code import stdlib_examples
from peft_core.schemas.dataset import CodeNames

_WORD = re.compile(r"[^\W\d]\w*")
_CALL_OR_ATTRIBUTE = re.compile(r"(?:(?<=\.)|(?<=->)|(?<=::))([^\W\d]\w*)|([^\W\d]\w*)(?=\()")
_NO_USE = re.compile(
    r"\b(?:def|class|func|fun|fn|function)\s+\w+|(?:#|//).*|\"(?:[^\"\\\n]|\\.)*\"?|'(?:[^'\\\n]|\\.)*'?"
)


def project_names(names: CodeNames) -> frozenset[str]:
    """Return the names that a code base defines and that are not common in other code."""
    return names.defined - common_names()


def invents_name(completion: str, prompt: str, known: Collection[str]) -> bool:
    """Return whether a completion calls a function or reads an attribute whose name occurs nowhere.

    Args:
        completion: What a model wrote. Comments, strings and definitions do not count, nor does a name at the very end, which
            may be cut off.
        prompt: Its words are known.
        known: Names of the code base, which has no shorter ones than MIN_CHARACTERS: what is shorter is not invented.
    """
    code = _NO_USE.sub("", completion)
    written = {match[1] or match[2] for match in _CALL_OR_ATTRIBUTE.finditer(code) if match.end() < len(code)}
    unknown = {name for name in written if len(name) >= MIN_CHARACTERS and name not in known} - common_names()
    return not unknown <= set(_WORD.findall(prompt))


@cache
def common_names() -> frozenset[str]:
    """Return names that code has whatever it is about: Python's keywords, builtins and modules, and those in samples of it."""
    samples = {word for example in stdlib_examples() for word in _WORD.findall(example.text)}
    return builtin_names("python") | standard_modules("python") | {*keyword.kwlist, *samples}
