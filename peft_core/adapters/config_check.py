"""Check `adapter_config.json` and reduce it to a few numbers and literal names.

PEFT's configuration has some forty settings. Most change what the weights mean or what happens to the base model, and some
name code, files or regular expressions. Only a few may be set here, and only these are passed to PEFT's loader, never the
file itself. Names match as in PEFT 0.21 (`check_target_module_exists`, `get_pattern_key`) if they are literal.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeGuard, TypeVar

from peft_core.adapters.findings import error
from peft_core.adapters.manifest import CONFIG
from peft_core.errors import sanitize
from peft_core.schemas.results import Reason

MAX_RANK = 512
MAX_ALPHA = 100_000.0
MAX_NAMES = 20_000  # as many as an adapter may have tensors
# From so many targets on, PEFT replaces them by fewer, shorter names, to which layers_to_transform then applies anew.
PEFT_SHORTENS_FROM = 20

_LITERAL = re.compile(r"[A-Za-z0-9_.]{1,128}", re.ASCII)
_LAYER = re.compile(r".*?\.[^.]*\.(\d{1,6})\.", re.ASCII)
# Values that these settings may have; they may also be unset.
_NEUTRAL: dict[str, tuple[object, ...]] = {
    "bias": ("none",),
    "init_lora_weights": (True, "gaussian"),  # other values change the base model's weights when the adapter is loaded
    "task_type": ("CAUSAL_LM",),
    "megatron_core": ("megatron.core",),  # PEFT's default; without megatron_config it does nothing
}
_IGNORED = frozenset(
    {
        "base_model_name_or_path",  # the caller names the base
        "revision",
        "inference_mode",
        "lora_dropout",  # of training
        "peft_version",
        "qalora_group_size",  # of a setting that must be unset
    }
)
_T = TypeVar("_T")


@dataclass(frozen=True)
class LoraSettings:
    """The validated settings that decide what the weights mean. The update of a weight is scale * B @ A."""

    rank: int
    alpha: float
    target_modules: tuple[str, ...]
    use_rslora: bool = False
    rank_pattern: Mapping[str, int] = field(default_factory=dict)  # by the end of a module's name
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    layers_to_transform: tuple[int, ...] | None = None  # None: all

    def targets(self, module: str) -> bool:
        """Return whether PEFT adapts this module: a target is its full name, or the last parts of it.

        As in PEFT, a full name ignores `layers_to_transform`.
        """
        if module in self._targets:
            return True
        if not any(end in self._targets for end in dotted_suffixes(module)):
            return False
        if self.layers_to_transform is None:
            return True
        return layer_of(module) in self.layers_to_transform

    def rank_of(self, module: str) -> int:
        return _by_pattern(self.rank_pattern, self._rank_order, module, self.rank)

    @functools.cached_property
    def _targets(self) -> frozenset[str]:
        return frozenset(self.target_modules)

    @functools.cached_property
    def _rank_order(self) -> dict[str, int]:
        return {key: place for place, key in enumerate(self.rank_pattern)}


def check_settings(config: Mapping[str, Any]) -> tuple[LoraSettings | None, list[Reason]]:
    """Return the validated settings, or None and all reasons against them. Never raises, for any JSON."""
    reasons = [*_wrong_values(config), *_set_but_unsupported(config)]
    if reasons:
        return None, reasons
    layers = config.get("layers_to_transform")
    return (
        LoraSettings(
            rank=config["r"],
            alpha=float(config["lora_alpha"]),
            target_modules=tuple(dict.fromkeys(config["target_modules"])),
            use_rslora=bool(config.get("use_rslora")),
            rank_pattern=dict(config.get("rank_pattern") or {}),
            alpha_pattern={key: float(alpha) for key, alpha in (config.get("alpha_pattern") or {}).items()},
            layers_to_transform=(layers,) if isinstance(layers, int) else tuple(layers or ()) or None,
        ),
        [],
    )


def dotted_suffixes(module: str) -> Iterator[str]:
    """The name, then what is left of it after each of its dots: all that a literal name can match."""
    yield module
    position = module.find(".")
    while position >= 0:
        yield module[position + 1 :]
        position = module.find(".", position + 1)


def layer_of(module: str) -> int | None:
    """The number of the layer that a module is in, as PEFT reads it: the first number between dots, after two names."""
    match = _LAYER.match(module)
    return int(match[1]) if match else None


def is_literal(name: object) -> bool:
    return isinstance(name, str) and _LITERAL.fullmatch(name) is not None


def _by_pattern(pattern: Mapping[str, _T], order: Mapping[str, int], module: str, default: _T) -> _T:
    """Return the value of the first key that is the module's name or its last parts.

    PEFT treats keys as regular expressions, in which a dot matches any character. For literal module names of one model the
    result is the same.
    """
    if not pattern:
        return default
    matching = [end for end in dotted_suffixes(module) if end in pattern]
    return pattern[min(matching, key=order.__getitem__)] if matching else default


def _wrong_values(config: Mapping[str, Any]) -> Iterator[Reason]:
    if config.get("peft_type") != "LORA":
        yield _refusal(config, "peft_type", "'LORA'", "not_lora", "Only LoRA adapters are used here")
    if not is_rank(config.get("r")):
        yield _refusal(config, "r", f"an integer from 1 to {MAX_RANK}")
    if not is_alpha(config.get("lora_alpha")):
        yield _refusal(config, "lora_alpha", f"a finite number above 0, at most {MAX_ALPHA:g}")
    if type(config.get("use_rslora", False)) is not bool:
        yield _refusal(config, "use_rslora", "true or false")
    targets = config.get("target_modules")
    if not isinstance(targets, list) or not 0 < len(targets) <= MAX_NAMES or not all(map(is_literal, targets)):
        fix = "Replace the expression by the names of the modules that have weights"
        yield _refusal(config, "target_modules", "a list of literal module names", "targets_not_literal", fix)
    yield from _wrong_pattern(config, "rank_pattern", is_rank, f"integers from 1 to {MAX_RANK}")
    yield from _wrong_pattern(config, "alpha_pattern", is_alpha, f"numbers above 0, at most {MAX_ALPHA:g}")
    layers = config.get("layers_to_transform")
    if layers is not None and not _are_layers(layers):
        yield _refusal(config, "layers_to_transform", "the numbers of layers")
    elif layers not in (None, []) and isinstance(targets, list) and len(targets) >= PEFT_SHORTENS_FROM:
        yield _refusal(config, "layers_to_transform", f"unset, where there are {PEFT_SHORTENS_FROM} targets or more")


def _wrong_pattern(
    config: Mapping[str, Any], setting: str, is_sound: Callable[[object], bool], values: str
) -> Iterator[Reason]:
    pattern, expected = config.get(setting), f"literal module names with {values}"
    if pattern is None:
        return
    if not isinstance(pattern, dict) or not all(map(is_sound, pattern.values())):
        yield _refusal(config, setting, expected)
    elif not all(map(is_literal, pattern)) or len(pattern) > MAX_NAMES:
        fix = "Replace the expressions by the names of modules"
        yield _refusal(config, setting, expected, "targets_not_literal", fix)


def _set_but_unsupported(config: Mapping[str, Any]) -> Iterator[Reason]:
    """One reason for each: what to do differs."""
    read = _IGNORED | {"peft_type", "r", "lora_alpha", "use_rslora", "target_modules"}
    read |= {"rank_pattern", "alpha_pattern", "layers_to_transform"}
    odd = [
        setting
        for setting, value in config.items()
        # By type too: 1 and True are equal.
        if setting not in read
        and not _is_unset(value)
        and not any(type(value) is type(ok) and value == ok for ok in _NEUTRAL.get(setting, ()))
    ]
    for setting in odd[:10]:
        allowed = " or ".join(map(repr, _NEUTRAL[setting])) if setting in _NEUTRAL else "unset"
        yield _refusal(config, setting, allowed, "unsupported_setting", "Use an adapter that was trained without it")
    if len(odd) > 10:
        message = f"{CONFIG}: {len(odd) - 10} more settings are set that must not be."
        yield error("unsupported_setting", message, where=sanitize(odd[10]), fix="Use a plain LoRA adapter")


def _refusal(
    config: Mapping[str, Any], setting: str, expected: str, code: str = "config_value", fix: str | None = None
) -> Reason:
    found, name = sanitize(_brief(config.get(setting))), sanitize(setting)
    message = f"{CONFIG}: {name} is {found}, expected {expected}."
    return error(
        code, message, found=found, expected=expected, where=name, fix=fix or f"Correct {CONFIG}, or fetch it again"
    )


def _brief(value: object) -> str:
    """Like `repr`, but quick for what is large or deep."""
    match value:
        case str():
            return repr(value[:80])
        case list() | dict():
            items = [*value][:3]
            inside = ", ".join(_brief(item) if isinstance(item, str | int | float) else "…" for item in items)
            more = ", …" if len(value) > len(items) else ""
            return f"[{inside}{more}]" if isinstance(value, list) else f"{{{inside}{more}}}"
        case _:
            return repr(value)


def _is_unset(value: object) -> bool:
    return value is None or value is False or (isinstance(value, str | list | dict) and not value)


def is_rank(value: object) -> TypeGuard[int]:
    return type(value) is int and 1 <= value <= MAX_RANK


def is_alpha(value: object) -> TypeGuard[int | float]:
    return isinstance(value, int | float) and type(value) is not bool and 0 < value <= MAX_ALPHA  # NaN is not, either


def _are_layers(value: object) -> bool:
    numbers = value if isinstance(value, list) else [value]
    return len(numbers) <= MAX_NAMES and all(type(number) is int and 0 <= number <= 10_000 for number in numbers)
