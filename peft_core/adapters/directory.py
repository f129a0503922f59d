"""Say what a directory holds that is not an adapter's directory, and what to do about it.

Only names are read, and only the first thousand: the directory may be any directory that a person has given.
"""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from peft_core.adapters.findings import error
from peft_core.adapters.layout import MLX, PEFT, Layout
from peft_core.adapters.manifest import CONFIG, WEIGHTS
from peft_core.base_models.checkpoint_info import join_some
from peft_core.errors import sanitize
from peft_core.schemas.results import Reason

_MAX_NAMES = 1000
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".lora")
_ARCHIVES = (".zip", ".tar", ".tar.gz", ".tgz", ".tar.bz2", ".7z", ".rar")
_SHARD = re.compile(r"adapter_model-\d{5}-of-\d{5}\.safetensors", re.ASCII)
_MLX_CHECKPOINT = re.compile(r"\d+_adapters\.safetensors", re.ASCII)
_SAFE_NAME = re.compile(r"[A-Za-z0-9_.-]{1,100}", re.ASCII)  # can be put into a shell command


@dataclass(frozen=True)
class Explanation:
    """What is wrong with a directory, in a sentence, and the next step."""

    code: str
    problem: str
    fix: str
    where: str = ""


@dataclass
class _Names:
    files: list[str] = field(default_factory=list)
    directories: list[str] = field(default_factory=list)


def layout_of(directory: Path) -> Layout:
    """Return the layout of an adapter, by the name of its weights. If there are both files, PEFT's is read."""
    is_mlx = os.path.lexists(directory / MLX.weights) and not os.path.lexists(directory / PEFT.weights)
    return MLX if is_mlx else PEFT


def is_adapter(directory: Path) -> bool:
    """Return whether a directory contains both files of an adapter, by their names."""
    names = (layout_of(directory).weights, CONFIG)
    return all(os.path.lexists(directory / name) for name in names)


def missing_files(directory: Path) -> list[Reason]:
    """Return an error if a directory lacks a file of an adapter, with what it contains instead."""
    if is_adapter(directory):
        return []
    found = explain(directory)
    where = found.where or " and ".join(_missing(directory))
    return [error(found.code, found.problem, where=where, fix=found.fix)]


def explain(directory: Path) -> Explanation:
    """Describe a directory that is not an adapter's."""
    names = _read_names(directory)
    missing = " and ".join(_missing(directory))
    found = next(_explanations(directory, names), None) if WEIGHTS in missing or not names.files else None
    return found or Explanation(
        "missing_file", f"{directory} does not contain {missing}.", "Give the path of an adapter's directory"
    )


def is_archive(path: Path) -> bool:
    return path.name.lower().endswith(_ARCHIVES)


def _missing(directory: Path) -> list[str]:
    names = (layout_of(directory).weights, CONFIG)
    return [name for name in names if not os.path.lexists(directory / name)]


def _explanations(directory: Path, names: _Names) -> Iterator[Explanation]:
    """Yield what the names suggest, the likeliest first."""
    yield from _weights_in_another_form(names.files)
    if adapters := _adapters_below(directory, names.directories):
        shown = join_some([sanitize(name) for name in adapters], 8)
        last = sanitize(str(directory / adapters[-1]))
        problem = f"{directory} is not an adapter itself; these directories in it are: {shown}."
        yield Explanation("missing_file", problem, f"Give the path of one of them, such as {last}")
    if "config.json" in names.files and any(name.endswith((".safetensors", ".bin", ".gguf")) for name in names.files):
        problem = f"{directory} contains a whole model (config.json and weights), not an adapter."
        fix = "Give it as base_model, or give the path of an adapter's directory"
        yield Explanation("missing_file", problem, fix, "config.json")
    if archives := [name for name in names.files if name.lower().endswith(_ARCHIVES)]:
        problem = (
            f"{directory} contains no adapter, but an archive: {join_some([sanitize(name) for name in archives])}."
        )
        yield Explanation("missing_file", problem, "Unpack it, and give the directory with the adapter", archives[0])


def _weights_in_another_form(files: Sequence[str]) -> Iterator[Explanation]:
    shards = [name for name in files if _SHARD.fullmatch(name)]
    if shards:
        problem = f"The adapter's weights are in {len(shards)} shards; PEFT and this program read a single {WEIGHTS}."
        yield Explanation("sharded", problem, f"Run `{_JOIN_SHARDS}` in the adapter's directory", shards[0])
    checkpoints = [name for name in files if _MLX_CHECKPOINT.fullmatch(name)]
    if checkpoints:
        problem = f"{MLX.weights} is missing; there are only checkpoints of mlx-lm: {join_some(checkpoints)}."
        fix = f"Copy the one to use, such as {checkpoints[-1]}, to {MLX.weights}"
        yield Explanation("missing_file", problem, fix, MLX.weights)
    if "adapters.npz" in files:
        problem = "adapters.npz is the format of mlx-lm before 2024, which is not read."
        fix = f"Run mlx's `mx.save_safetensors('{MLX.weights}', mx.load('adapters.npz'))`, and write {CONFIG} beside it"
        yield Explanation("missing_file", problem, fix, "adapters.npz")
    pickles = sorted(
        (name for name in files if name.lower().endswith(_PICKLES)), key=lambda name: "adapter" not in name
    )
    if pickles and (CONFIG in files or "adapter" in pickles[0]):
        problem = "The adapter's weights are a pickle file. It is never opened, because loading a pickle can run code."
        yield Explanation("pickle", problem, _unpickle(pickles[0]), sanitize(pickles[0]))
    if CONFIG in files:
        ggufs = [name for name in files if name.lower().endswith(".gguf")]
        if ggufs:
            problem = f"The adapter's weights are in the form of llama.cpp ({sanitize(ggufs[0])}), which is not read."
            yield Explanation("missing_file", problem, f"Give the adapter with its original {WEIGHTS}", WEIGHTS)
        others = [name for name in files if name.endswith(".safetensors")]
        if others:
            problem = (
                f"{WEIGHTS} is missing; {CONFIG} is there, and also {join_some([sanitize(name) for name in others])}."
            )
            fix = f"If that file holds the adapter's weights, rename it to {WEIGHTS}"
            yield Explanation("missing_file", problem, fix, WEIGHTS)


_JOIN_SHARDS = (
    'python -c "import glob, safetensors.torch as s; t={}; '
    "[t.update(s.load_file(f)) for f in glob.glob('adapter_model-*.safetensors')]; "
    f"s.save_file(t, '{WEIGHTS}')\""
)


def _unpickle(name: str) -> str:
    """Return how to convert a pickle. `weights_only` lets torch read tensors and nothing else."""
    if not _SAFE_NAME.fullmatch(name):
        return f"Save the adapter again as {WEIGHTS}"
    return (
        'If you trust its author, run in its directory: `python -c "import torch, safetensors.torch as s; '
        f"t=torch.load('{name}', map_location='cpu', weights_only=True); "
        f"s.save_file({{k: v.clone() for k, v in t.items()}}, '{WEIGHTS}')\"`"
    )


def _adapters_below(directory: Path, names: Sequence[str]) -> list[str]:
    """Return the subdirectories that are adapters, checkpoints in the order of their steps."""

    def step(name: str) -> tuple[int, str]:
        number = name.rpartition("-")[2]
        return (int(number) if number.isascii() and number.isdigit() and len(number) < 12 else -1, name)

    return sorted((name for name in names if is_adapter(directory / name)), key=step)


def _read_names(directory: Path) -> _Names:
    names = _Names()
    try:
        with os.scandir(directory) as entries:
            for entry in itertools.islice(entries, _MAX_NAMES):
                is_directory = entry.is_dir(follow_symlinks=False)
                (names.directories if is_directory else names.files).append(entry.name)
    except OSError:  # missing, or not readable: then nothing is known about it
        return names
    names.files.sort()
    names.directories.sort()
    return names
