"""Find the one change of prefix after which all modules of an adapter are modules of the base model.

Weights are saved under another prefix when a model was wrapped: by torch.compile (`_orig_mod.`), by distributed training
(`module.`), by PEFT twice, or when the language model is part of a vision-language model (`language_model.`).
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

_MAX_PARTS = 64  # of a name, between dots; real names have about ten
_MAX_CANDIDATES = 20


@dataclass(frozen=True)
class Renaming:
    """Replace `old` by `new` at the start of a name. Other names stay; `applies_to_all`: every name begins with `old`."""

    old: str
    new: str
    applies_to_all: bool

    def __call__(self, name: str) -> str:
        return self.new + name.removeprefix(self.old) if name.startswith(self.old) else name

    def extended_by(self, beginning: str, names: Collection[str]) -> Renaming:
        """Return the same renaming with more of the names in both prefixes, if all of the names have it."""
        if not all(name.startswith(self.old + beginning) for name in names):
            return self
        return Renaming(self.old + beginning, self.new + beginning, self.applies_to_all)

    def command(self, file: str) -> str:
        """Return a shell command that renames the tensors of a safetensors file in place.

        The file is read into memory first: its tensors must not be mapped while it is overwritten. Both prefixes must be
        literal names, because the command is meant to be copied into a shell.
        """
        renamed = f"'{self.new}'+k.removeprefix('{self.old}')"
        if not self.applies_to_all:
            renamed = f"{renamed} if k.startswith('{self.old}') else k"
        return (
            f"python -c \"import safetensors.torch as s; f='{file}'; t=s.load(open(f,'rb').read()); "
            f's.save_file({{({renamed}):t[k] for k in t}}, f)"'
        )


def find_renaming(paths: Collection[str], known: Collection[str]) -> Renaming | None:
    """Return the renaming that maps every path to a different known one, or None. The longest common ending decides.

    A candidate must agree with the deepest path from its layer's number on.
    """
    if not paths or max(path.count(".") for path in paths) >= _MAX_PARTS:
        return None
    known_names, tried = frozenset(known), 0
    deepest = max(sorted(paths), key=lambda path: path.count("."))
    parts = deepest.split(".")
    numbers = [index for index, part in enumerate(parts) if part.isdigit()]
    last_start = numbers[0] if numbers else len(parts) - 1
    for start in range(last_start + 1):
        ending = ".".join(parts[start:])
        candidates = sorted((path for path in known if path == ending or path.endswith(f".{ending}")), key=len)
        for candidate in candidates:
            tried += 1
            if tried > _MAX_CANDIDATES:
                return None
            old, new = deepest.removesuffix(ending), candidate.removesuffix(ending)
            renaming = Renaming(old, new, applies_to_all=all(path.startswith(old) for path in paths))
            renamed = {renaming(path) for path in paths}
            if old != new and len(renamed) == len(paths) and renamed <= known_names:
                return renaming
    return None
