"""Check `adapter_config.json` and reduce it to a few numbers and literal names.

PEFT's configuration has about forty settings. Most of them change what the weights mean or modify the base model, and some
name code, files or regular expressions. Only a few are supported here. The loader receives these values, never the file
itself. Literal names match modules as in PEFT 0.21 (`check_target_module_exists`, `get_pattern_key`).
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
MAX_NAMES = 20_000  # the same as the limit on an adapter's tensors
# PEFT replaces this many targets or more by fewer, shorter names, to which layers_to_transform then applies differently.
PEFT_SHORTENS_FROM = 20

_LITERAL = re.compile(r"[A-Za-z0-9_.]{1,128}", re.ASCII)
_LAYER = re.compile(r".*?\.[^.]*\.(\d{1,6})\.", re.ASCII)
# The only values that these settings may have, unless they are unset.
_ALLOWED_VALUES: dict[str, tuple[object, ...]] = {
    "bias": ("none",),
    "init_lora_weights": (True, "gaussian"),  # other values change the base model's weights when the adapter is loaded
    "task_type": ("CAUSAL_LM",),
    "megatron_core": ("megatron.core",),  # PEFT's default, which has no effect without megatron_config
}
_IGNORED = frozenset(
    {
        "base_model_name_or_path",  # the caller names the base model
        "revision",
        "inference_mode",
        "lora_dropout",  # used only in training
        "peft_version",
        "qalora_group_size",  # used only with use_qalora, which must be unset
    }
)
_T = TypeVar("_T")


@dataclass(frozen=True)
class LoraSettings:
    """The validated settings that determine what the weights mean: LoRA adds scale * B @ A to a weight of the base model."""

    rank: int
    alpha: float
    target_modules: tuple[str, ...]
    use_rslora: bool = False
    rank_pattern: Mapping[str, int] = field(default_factory=dict)  # by dotted suffix of a module's name
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    layers_to_transform: tuple[int, ...] | None = None  # None: all layers

    def targets(self, module: str) -> bool:
        """Return whether PEFT adapts this module: whether a target is its full name or a dotted suffix of the name.

        As in PEFT, `layers_to_transform` does not restrict targets that are full names.
        """
        if module in self._targets:
            return True
        if not any(suffix in self._targets for suffix in dotted_suffixes(module)):
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
        return {key: position for position, key in enumerate(self.rank_pattern)}


def check_settings(config: Mapping[str, Any]) -> tuple[LoraSettings | None, list[Reason]]:
    """Return the validated settings, or None and one error for each invalid setting. No JSON object makes it raise."""
    reasons = [*_invalid_values(config), *_unsupported_settings(config)]
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
    """Yield the name itself, then the rest of it after each dot: all strings that a literal target can match."""
    yield module
    position = module.find(".")
    while position >= 0:
        yield module[position + 1 :]
        position = module.find(".", position + 1)


def layer_of(module: str) -> int | None:
    """Return the number of the layer that a module is in, or None if it is in no layer.

    As in PEFT, this is the first number between dots that follows at least two names.
    """
    match = _LAYER.match(module)
    return int(match[1]) if match else None


def is_literal(name: object) -> bool:
    return isinstance(name, str) and _LITERAL.fullmatch(name) is not None


def _by_pattern(pattern: Mapping[str, _T], order: Mapping[str, int], module: str, default: _T) -> _T:
    """Return the value of the first key that is the module's name or a dotted suffix of it.

    PEFT treats keys as regular expressions, in which a dot matches any character. For literal module names of one model the
    result is the same.
    """
    if not pattern:
        return default
    matching = [suffix for suffix in dotted_suffixes(module) if suffix in pattern]
    return pattern[min(matching, key=order.__getitem__)] if matching else default


def _invalid_values(config: Mapping[str, Any]) -> Iterator[Reason]:
    if config.get("peft_type") != "LORA":
        yield _setting_error(
            config, "peft_type", "'LORA'", "not_lora", "Use a LoRA adapter: no other kind is supported"
        )
    if not is_rank(config.get("r")):
        yield _setting_error(config, "r", f"an integer from 1 to {MAX_RANK}")
    if not is_alpha(config.get("lora_alpha")):
        yield _setting_error(config, "lora_alpha", f"a finite number above 0, at most {MAX_ALPHA:g}")
    if type(config.get("use_rslora", False)) is not bool:
        yield _setting_error(config, "use_rslora", "true or false")
    targets = config.get("target_modules")
    if not isinstance(targets, list) or not 0 < len(targets) <= MAX_NAMES or not all(map(is_literal, targets)):
        fix = "Replace the expression by the names of the modules that have weights"
        yield _setting_error(config, "target_modules", "a list of literal module names", "targets_not_literal", fix)
    yield from _invalid_pattern(config, "rank_pattern", is_rank, f"integers from 1 to {MAX_RANK}")
    yield from _invalid_pattern(config, "alpha_pattern", is_alpha, f"numbers above 0, at most {MAX_ALPHA:g}")
    layers = config.get("layers_to_transform")
    if layers is not None and not _are_layers(layers):
        yield _setting_error(config, "layers_to_transform", "a layer number or a list of layer numbers")
    elif layers not in (None, []) and isinstance(targets, list) and len(targets) >= PEFT_SHORTENS_FROM:
        yield _setting_error(config, "layers_to_transform", f"unset if there are {PEFT_SHORTENS_FROM} targets or more")


def _invalid_pattern(
    config: Mapping[str, Any], setting: str, is_valid: Callable[[object], bool], values: str
) -> Iterator[Reason]:
    pattern, expected = config.get(setting), f"a mapping of literal module names to {values}"
    if pattern is None:
        return
    if not isinstance(pattern, dict) or not all(map(is_valid, pattern.values())):
        yield _setting_error(config, setting, expected)
    elif not all(map(is_literal, pattern)) or len(pattern) > MAX_NAMES:
        fix = "Replace the expressions by the names of modules"
        yield _setting_error(config, setting, expected, "targets_not_literal", fix)


def _unsupported_settings(config: Mapping[str, Any]) -> Iterator[Reason]:
    """Yield one error for each of the first ten unsupported settings, then one that counts the rest."""
    supported = _IGNORED | {"peft_type", "r", "lora_alpha", "use_rslora", "target_modules"}
    supported |= {"rank_pattern", "alpha_pattern", "layers_to_transform"}
    unsupported = [
        setting
        for setting, value in config.items()
        # The types are compared too, because 1 == True.
        if setting not in supported
        and not _is_unset(value)
        and not any(type(value) is type(allowed) and value == allowed for allowed in _ALLOWED_VALUES.get(setting, ()))
    ]
    for setting in unsupported[:10]:
        expected = " or ".join(map(repr, _ALLOWED_VALUES[setting])) if setting in _ALLOWED_VALUES else "unset"
        fix = "Use an adapter that was trained without it"
        yield _setting_error(config, setting, expected, "unsupported_setting", fix)
    if len(unsupported) > 10:
        message = f"{CONFIG} sets {len(unsupported) - 10} more settings that must be unset."
        yield error("unsupported_setting", message, where=sanitize(unsupported[10]), fix="Use a plain LoRA adapter")


def _setting_error(
    config: Mapping[str, Any], setting: str, expected: str, code: str = "config_value", fix: str | None = None
) -> Reason:
    found, name = sanitize(_short_repr(config.get(setting))), sanitize(setting)
    message = f"{CONFIG}: {name} is {found}; it must be {expected}."
    return error(
        code, message, found=found, expected=expected, where=name, fix=fix or f"Correct {CONFIG}, or download it again"
    )


def _short_repr(value: object) -> str:
    """Return a bounded `repr`, without the cost of a complete one for a large or deeply nested value."""
    match value:
        case str():
            return repr(value[:80])
        case list() | dict():
            items = [*value][:3]
            shown = ", ".join(_short_repr(item) if isinstance(item, str | int | float) else "…" for item in items)
            more = ", …" if len(value) > len(items) else ""
            return f"[{shown}{more}]" if isinstance(value, list) else f"{{{shown}{more}}}"
        case _:
            return repr(value)


def _is_unset(value: object) -> bool:
    return value is None or value is False or (isinstance(value, str | list | dict) and not value)


def is_rank(value: object) -> TypeGuard[int]:
    return type(value) is int and 1 <= value <= MAX_RANK


def is_alpha(value: object) -> TypeGuard[int | float]:
    return isinstance(value, int | float) and type(value) is not bool and 0 < value <= MAX_ALPHA  # NaN fails this too


def _are_layers(value: object) -> bool:
    numbers = value if isinstance(value, list) else [value]
    return len(numbers) <= MAX_NAMES and all(type(number) is int and 0 <= number <= 10_000 for number in numbers)
