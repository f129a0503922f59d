"""Check an adapter against a base by headers and configuration alone: no torch, milliseconds, nothing is loaded.

What PEFT would do with each of these is in most cases nothing: it loads, says nothing, and the adapter has no or another
effect. The adapter is taken as hostile: links are not followed, sizes are bounded, no name is a pattern.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from peft_core.adapters.manifest import CONFIG, WEIGHTS
from peft_core.bases.checkpoint import read_checkpoint
from peft_core.bases.header import HeaderError, TensorInfo, open_regular, read_exactly
from peft_core.bases.layout import a_few
from peft_core.bases.safetensors import ADAPTER_LIMITS, read_header
from peft_core.results import Reason
from peft_core.spec import Base

MAX_CONFIG_BYTES = 256 << 10
MAX_RANK = 512
MAX_ALPHA = 100_000.0
FLOATS = frozenset({"F32", "F16", "BF16"})

_KEY = re.compile(r"base_model\.model\.(.+)\.lora_(A|B)\.weight", re.ASCII)
_TARGET = re.compile(r"[A-Za-z0-9_.]{1,128}", re.ASCII)
# Settings of PEFT's that may have a value. Every other must be unset: each of them changes what the weights mean, and
# some name code or files.
_NEUTRAL: dict[str, tuple[object, ...]] = {
    "bias": ("none",),
    "init_lora_weights": (True, False, "gaussian"),  # others alter the base's weights on loading
    "task_type": ("CAUSAL_LM",),
    "megatron_core": ("megatron.core",),  # PEFT's default; without megatron_config it does nothing
}
_FREE = frozenset(
    {
        "base_model_name_or_path",  # ignored: the caller names the base
        "revision",
        "inference_mode",
        "lora_alpha",
        "lora_dropout",
        "peft_type",
        "peft_version",
        "qalora_group_size",
        "r",
        "target_modules",
        "use_rslora",
    }
)


def check_adapter(directory: Path, base: Base) -> list[Reason]:
    """Every reason against using this adapter with this base; empty when there is none.

    Raises:
        BaseModelError, HeaderError: the base, not the adapter, cannot be read.
    """
    modules = linear_modules(read_checkpoint(base.path).shapes)
    if not os.path.lexists(directory / WEIGHTS):
        return [_no_weights(directory)]
    try:
        config = read_adapter_config(directory)
        tensors = read_header(directory / WEIGHTS, limits=ADAPTER_LIMITS, follow_links=False).tensors
    except HeaderError as error:
        return [
            _error("bad_file", error.message, where=Path(error.details["path"]).name, fix="Train or fetch it again")
        ]
    reasons = _check_config(config)
    if any(reason.severity == "error" for reason in reasons):
        return reasons  # what the tensors should be is not known
    return [*reasons, *_check_tensors(tensors, config, modules, base)]


def linear_modules(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, int]]:
    """Modules that LoRA can adapt: name to (out, in). Embeddings are not among them."""
    return {
        name.removesuffix(".weight"): (shape[0], shape[1])
        for name, shape in shapes.items()
        if name.endswith(".weight") and len(shape) == 2 and "embed" not in name.rsplit(".", 2)[-2]
    }


def read_adapter_config(directory: Path) -> dict[str, Any]:
    """The adapter's configuration as it stands, unchecked.

    Raises:
        HeaderError: missing, a link, larger than 256 KB, or not a JSON object.
    """
    path = directory / CONFIG
    with open_regular(path, follow_links=False) as descriptor:
        size = os.fstat(descriptor).st_size
        if size > MAX_CONFIG_BYTES:
            raise HeaderError(path, f"has {size} bytes, more than the {MAX_CONFIG_BYTES} that are read")
        raw = read_exactly(descriptor, size, 0, path)
    try:
        config = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise HeaderError(path, "is not JSON") from error
    if not isinstance(config, dict):
        raise HeaderError(path, "is not a JSON object")
    return config


def _check_config(config: Mapping[str, Any]) -> list[Reason]:
    reasons: list[Reason] = []

    def refuse(setting: str, expected: str, code: str = "config_value") -> None:
        found = repr(config.get(setting))[:80]
        message = f"{CONFIG}: {setting} is {found}, expected {expected}."
        reasons.append(_error(code, message, found=found, expected=expected, where=setting))

    if config.get("peft_type") != "LORA":
        refuse("peft_type", "'LORA'", "not_lora")
    rank, alpha, targets = config.get("r"), config.get("lora_alpha"), config.get("target_modules")
    if type(rank) is not int or not 1 <= rank <= MAX_RANK:
        refuse("r", f"an integer from 1 to {MAX_RANK}")
    if type(alpha) not in (int, float) or not 0 < alpha <= MAX_ALPHA:  # type: ignore[operator]  # a number by then
        refuse("lora_alpha", f"a finite number above 0, at most {MAX_ALPHA:g}")
    if type(config.get("use_rslora", False)) is not bool:
        refuse("use_rslora", "true or false")
    if (
        not isinstance(targets, list)
        or not targets
        or not all(isinstance(target, str) and _TARGET.fullmatch(target) for target in targets)
    ):
        refuse("target_modules", "a list of literal module names", "targets_not_literal")
    for setting, value in config.items():
        # By type too: 0 and False are equal, and 1e999 is a number.
        unset = value is None or value is False or value in ("", [], {})
        if (
            setting not in _FREE
            and not unset
            and not any(value is ok or value == ok for ok in _NEUTRAL.get(setting, ()))
        ):
            allowed = " or ".join(map(repr, _NEUTRAL[setting])) if setting in _NEUTRAL else "unset"
            refuse(setting[:80], allowed, "unsupported_setting")
    return reasons


def _check_tensors(
    tensors: Mapping[str, TensorInfo], config: Mapping[str, Any], modules: Mapping[str, tuple[int, int]], base: Base
) -> list[Reason]:
    found: dict[str, dict[str, TensorInfo]] = {"A": {}, "B": {}}
    foreign: list[str] = []
    for name, tensor in tensors.items():
        match = _KEY.fullmatch(name)
        if match is None:
            foreign.append(name)
        else:
            found[match[2]][match[1]] = tensor
    a, b = found["A"], found["B"]
    targeted = {module for module in modules if _is_target(module, config["target_modules"])}
    unmatched = [t for t in config["target_modules"] if not any(_is_target(module, [t]) for module in modules)]
    present = a.keys() | b.keys()
    other_base = f"Use it with the base that it was trained on, not with {base.name}"
    return [
        *_named("foreign_tensor", "tensors that are no LoRA weights, and could replace the base's own", foreign,
                "Do not use this file: it does more than an adapter"),
        *([] if present else [_error("no_weights", f"{WEIGHTS} holds no LoRA weights.", where=WEIGHTS)]),
        *_named("unpaired", "modules with only one of A and B", sorted(a.keys() ^ b.keys()), "Train it again"),
        *_named("dtype", f"tensors of a type other than {', '.join(sorted(FLOATS))}",
                [t.name for t in tensors.values() if t.dtype not in FLOATS], "Save it in float32 or bfloat16"),
        *_named("target_not_in_base", "target modules that the base does not have", unmatched, other_base),
        *_named("module_not_in_base", "modules that the base does not have", sorted(present - modules.keys()), other_base),
        *_named("weights_missing", "targeted modules without weights", sorted(targeted - present), other_base),
        *_named("not_targeted", "weights of modules that target_modules does not name",
                sorted((present & modules.keys()) - targeted), f"PEFT would ignore them: correct {CONFIG}"),
        *_shape_reasons(a, b, config["r"], modules, other_base),
    ]  # fmt: skip


def _shape_reasons(
    a: Mapping[str, TensorInfo],
    b: Mapping[str, TensorInfo],
    rank: int,
    modules: Mapping[str, tuple[int, int]],
    other_base: str,
) -> list[Reason]:
    """A must be (rank, in) and B (out, rank) for the base's W of (out, in)."""
    wrong_rank: list[str] = []
    wrong_size: list[str] = []
    first: tuple[str, str] | None = None
    for module in sorted((a.keys() | b.keys()) & modules.keys()):
        outputs, inputs = modules[module]
        for tensor, expected, rank_axis in ((a.get(module), (rank, inputs), 0), (b.get(module), (outputs, rank), 1)):
            if tensor is None or tensor.shape == expected:
                continue
            same_rank = len(tensor.shape) == 2 and tensor.shape[rank_axis] == rank
            (wrong_size if same_rank else wrong_rank).append(tensor.name)
            first = first or (str(list(tensor.shape)), str(list(expected)))
    shown = {"found": first[0], "expected": first[1]} if first else {}
    return [
        *_named(
            "rank", f"tensors whose rank is not the configuration's {rank}", wrong_rank, f"Correct {CONFIG}", **shown
        ),
        *_named("shape", "tensors that do not fit the base's sizes", wrong_size, other_base, **shown),
    ]


def _is_target(module: str, targets: Iterable[str]) -> bool:
    """PEFT's rule for literal names: the whole name, or its end after a dot."""
    return any(module == target or module.endswith(f".{target}") for target in targets)


def _named(code: str, what: str, names: list[str], fix: str, **shown: str) -> Iterable[Reason]:
    """One finding about all these names, or none."""
    if names:
        few = a_few(name[:120] for name in names)
        yield _error(code, f"{len(names)} {what}: {few}.", where=names[0][:120], fix=fix, **shown)


def _no_weights(directory: Path) -> Reason:
    if any((directory / name).exists() for name in ("adapter_model.bin", "adapter_model.pt")):
        message = "The adapter's weights are a pickle, which can run code when it is loaded, and are never opened here."
        return _error("pickle", message, where="adapter_model.bin", fix=f"Save it again as {WEIGHTS}")
    message = f"There is no {WEIGHTS} in {directory}."
    return _error("missing_file", message, where=WEIGHTS, fix="Name the directory of an adapter")


def _error(
    code: str,
    message: str,
    *,
    found: str | None = None,
    expected: str | None = None,
    where: str | None = None,
    fix: str | None = None,
) -> Reason:
    return Reason(code=code, severity="error", message=message, found=found, expected=expected, where=where, fix=fix)
