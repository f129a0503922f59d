"""Check `adapter_config.json` and reduce it to a few numbers and literal names.

`FIELDS` decides about each setting by what it does to the mathematics, not by whether it is set: LoRA adds scale * B @ A to a
weight of the base model, and a setting that changes neither the base model, nor A and B, nor the scale is not read. The loader
receives the values of `LoraSettings`, never the file itself, and no regular expression of the file is run. Literal names match
modules as in PEFT 0.21 (`check_target_module_exists`, `get_pattern_key`).
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeGuard, TypeVar

from peft_core.adapters.findings import error, warning
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
_T = TypeVar("_T")


# -- the settings, by what they do to the mathematics ------------------------------------------------------------------


@dataclass(frozen=True)
class Field:
    """What is done with a setting of `adapter_config.json`.

    `refused`: the setting must be unset (null, false or empty); `problem` says what it changes, `fix` what to do about it.
    """

    use: Literal["read", "ignored", "refused"]
    problem: str = ""
    fix: str = "Use an adapter that was trained without it"


_READ, _IGNORED = Field("read"), Field("ignored")
_CHANGES_BASE = "Use an adapter whose base model was left as it was"

FIELDS: dict[str, Field] = {
    # Which modules, and how much A and B count.
    "peft_type": _READ,
    "r": _READ,
    "lora_alpha": _READ,
    "use_rslora": _READ,  # the scale is alpha / sqrt(r) instead of alpha / r
    "rank_pattern": _READ,
    "alpha_pattern": _READ,
    "target_modules": _READ,
    "exclude_modules": _READ,
    "layers_to_transform": _READ,
    "layers_pattern": _READ,
    "bias": _READ,  # neutral where the base model has no biases that could have been trained
    "init_lora_weights": _READ,  # see _INITIALISATIONS
    "ensure_weight_tying": _READ,  # neutral unless the output head is adapted
    "task_type": _READ,  # only for a warning: the task selects PEFT's wrapper, not what A and B do
    # Names, versions and provenance. The caller names the base model, and nothing is imported or downloaded.
    "auto_mapping": _IGNORED,  # PEFT writes it without task_type, Unsloth always: class and module of the base model
    "base_model_name_or_path": _IGNORED,
    "revision": _IGNORED,
    "peft_version": _IGNORED,
    "unsloth_version": _IGNORED,
    "unsloth_fixed": _IGNORED,
    "transformers_version": _IGNORED,
    "_name_or_path": _IGNORED,
    "library_name": _IGNORED,
    "torch_dtype": _IGNORED,
    "dtype": _IGNORED,
    # Used only in training.
    "inference_mode": _IGNORED,
    "lora_dropout": _IGNORED,
    "velora_config": _IGNORED,  # compresses activations for the backward pass (VeloraLinearVariant.forward)
    "monteclora_config": _IGNORED,  # perturbs A in training only (MontecloraLinearVariant.forward)
    "lora_dtype": _IGNORED,  # ms-swift: data type of A and B in training
    "lorap_lr_ratio": _IGNORED,  # ms-swift, LoRA+: learning rates
    "lorap_emb_lr": _IGNORED,
    "loraplus_lr_ratio": _IGNORED,
    "loraplus_lr_embedding": _IGNORED,
    # Used only by an initialisation, which init_lora_weights names; PEFT ignores them without it.
    "loftq_config": _IGNORED,
    "eva_config": _IGNORED,
    "corda_config": _IGNORED,
    "lora_ga_config": _IGNORED,
    # Used only with another setting, or decided by the base model.
    "fan_in_fan_out": _IGNORED,  # layout of the base's weight: PEFT corrects it by the type of the layer
    "megatron_core": _IGNORED,  # names the module of megatron_config; nothing is imported
    "qalora_group_size": _IGNORED,  # used only with use_qalora
    "runtime_config": _IGNORED,  # PEFT ignores it in files
    "merge_weights": _IGNORED,  # PEFT before 0.3: whether evaluation mode merges
    # Another computation than scale * B @ A.
    "use_dora": Field("refused", "DoRA rescales the adapted weights by trained magnitudes",
                      "Use a LoRA adapter that was trained without use_dora"),
    "use_qalora": Field("refused", "QALoRA averages groups of inputs before A"),
    "lora_bias": Field("refused", "a trained bias is added after B"),
    "kasa_config": Field("refused", "KaSA truncates the base model's weights and scales the rows of A"),
    "use_bdlora": Field("refused", "BD-LoRA stores blocks of A and B"),
    "alora_invocation_tokens": Field("refused", "aLoRA applies the adapter only after certain tokens"),
    "arrow_config": Field("refused", "Arrow mixes several adapters per token"),
    "target_parameters": Field("refused", "parameters without a module of their own are adapted, as in fused experts",
                               "Train it again with linear modules as targets, such as 'all-linear'"),
    "enable_lora": Field("refused", "parts of a fused matrix are adapted separately"),  # PEFT before 0.3
    "megatron_config": Field("refused", "A and B belong to the parallel layers of Megatron"),
    # Another base model.
    "layer_replication": Field("refused", "layers of the base model are repeated", _CHANGES_BASE),
    "trainable_token_indices": Field("refused", "rows of the embedding were trained too",
                                     "Train it again without new or trainable tokens"),
    "modules_to_save": Field("refused", "whole modules of the base model were trained too",
                             "Train it again without modules_to_save: with LoRA on linear modules alone"),
}  # fmt: skip

# Initialisations that leave the base model's weights alone, so that A and B hold all that was learned: PEFT sets B to 0
# (true, gaussian, eva) or A to 0 (mica), or starts from B @ A other than 0 (false, orthogonal).
_INITIALISATIONS: tuple[object, ...] = (None, True, False, "gaussian", "eva", "orthogonal", "mica")
# PEFT subtracts the first B @ A from the base model's weights (lora_ga, corda, olora, pissa) or quantises them (loftq).
_CHANGING_INITIALISATIONS = ("pissa", "olora", "corda", "lora_ga", "loftq")
_TASKS = ("CAUSAL_LM", "SEQ_2_SEQ_LM", "SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS", "FEATURE_EXTRACTION")


@dataclass(frozen=True)
class LoraSettings:
    """The validated settings that determine what the weights mean: LoRA adds scale * B @ A to a weight of the base model.

    Keys of the patterns, and excluded modules, are names or dotted suffixes of names; `^` before one: the full name.
    """

    rank: int
    alpha: float
    target_modules: tuple[str, ...] | None  # None: the modules that have weights
    use_rslora: bool = False
    rank_pattern: Mapping[str, int] | None = field(default_factory=dict)  # None: ranks follow from the weights
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    alpha_expressions: tuple[str, ...] = ()  # keys of alpha_pattern that are regular expressions: never run
    exclude_modules: tuple[str, ...] = ()
    layers_to_transform: tuple[int, ...] | None = None  # None: all layers
    layers_pattern: tuple[str, ...] = ()  # names before the layer's number; empty: any
    trained_biases: Literal["none", "all", "lora_only"] = "none"
    ties_head: bool = False  # an adapter of the output head would adapt the embedding as well
    targets_described: str = ""  # what the file says where target_modules is None

    def targets(self, module: str) -> bool:
        """Return whether PEFT adapts this module: whether a target is its full name or a dotted suffix of the name.

        As in PEFT, `layers_to_transform` does not restrict targets that are full names.
        """
        if any(name in self._excluded for name in (f"^{module}", *dotted_suffixes(module))):
            return False
        if self.target_modules is None or module in self._targets:
            return True
        if not any(suffix in self._targets for suffix in dotted_suffixes(module)):
            return False
        if self.layers_to_transform is None:
            return True
        return layer_of(module, self.layers_pattern) in self.layers_to_transform

    def rank_of(self, module: str) -> int | None:
        """Return the rank of a module's A and B; None: unknown, it follows from the weights."""
        if self.rank_pattern is None:
            return None
        return _by_pattern(self.rank_pattern, self._rank_order, module, self.rank)

    def alpha_of(self, module: str) -> float:
        return _by_pattern(self.alpha_pattern, self._alpha_order, module, self.alpha)

    def scale_of(self, module: str, rank: int) -> float:
        """Return the factor of B @ A for a module whose A has `rank` rows."""
        return self.alpha_of(module) / (math.sqrt(rank) if self.use_rslora else rank)

    @functools.cached_property
    def _targets(self) -> frozenset[str]:
        return frozenset(self.target_modules or ())

    @functools.cached_property
    def _excluded(self) -> frozenset[str]:
        return frozenset(self.exclude_modules)

    @functools.cached_property
    def _rank_order(self) -> dict[str, int]:
        return {key: position for position, key in enumerate(self.rank_pattern or ())}

    @functools.cached_property
    def _alpha_order(self) -> dict[str, int]:
        return {key: position for position, key in enumerate(self.alpha_pattern)}


def check_settings(config: Mapping[str, Any]) -> tuple[LoraSettings | None, list[Reason]]:
    """Return the validated settings (None if there are errors), with all errors and warnings. No JSON object makes it raise."""
    method = config.get("peft_type")
    if isinstance(method, str) and method not in ("", "LORA"):  # its other settings are another method's
        return None, [_not_lora(config)]
    errors = [*_invalid_values(config), *_unsupported_settings(config)]
    if errors:
        return None, errors
    return _settings(config), list(_task_warning(config))


def _settings(config: Mapping[str, Any]) -> LoraSettings:
    targets, described = _literal_targets(config)
    layers = config.get("layers_to_transform")
    rank_pattern, rank_expressions = _literal_pattern(config.get("rank_pattern"))
    alpha_pattern, alpha_expressions = _literal_pattern(config.get("alpha_pattern"))
    return LoraSettings(
        rank=config["r"],
        alpha=float(config["lora_alpha"]),
        target_modules=targets,
        targets_described=described,
        use_rslora=bool(config.get("use_rslora")),
        rank_pattern=None if rank_expressions else rank_pattern,
        alpha_pattern={key: float(alpha) for key, alpha in alpha_pattern.items()},
        alpha_expressions=alpha_expressions,
        exclude_modules=_excluded_modules(config.get("exclude_modules")) if targets is not None else (),
        layers_to_transform=(layers,) if isinstance(layers, int) else tuple(layers or ()) or None,
        layers_pattern=tuple(_names(config.get("layers_pattern"))),
        trained_biases=config.get("bias") or "none",
        ties_head=bool(config.get("ensure_weight_tying")),
    )


def _literal_targets(config: Mapping[str, Any]) -> tuple[tuple[str, ...] | None, str]:
    """Return the target modules, or None and a description if only the names of the weights tell them.

    An expression is never run. What PEFT makes of a choice of layers or of exclusions is known only for literal names.
    """
    targets = config.get("target_modules") or []
    if not targets:
        return None, "target_modules is not set"
    if isinstance(targets, str):
        kind = "a wildcard" if targets == "all-linear" else "a regular expression, which is never run"
        return None, f"target_modules is {kind}"
    if not all(map(is_literal, targets)):
        return None, "target_modules contains a regular expression, which is never run"
    for setting in ("exclude_modules", "layers_pattern"):
        if not all(map(is_literal, _names(config.get(setting)))):
            return None, f"{setting} contains a regular expression, which is never run"
    if config.get("layers_to_transform") not in (None, []) and len(targets) >= PEFT_SHORTENS_FROM:
        return None, f"layers_to_transform stands beside {PEFT_SHORTENS_FROM} targets or more"
    return tuple(dict.fromkeys(targets)), ""


def _literal_pattern(pattern: Mapping[str, _T] | None) -> tuple[dict[str, _T], tuple[str, ...]]:
    """Return a pattern with literal keys, and those keys that are regular expressions.

    A key may begin with `^`, end with `$` and have a backslash before each dot: PEFT matches the rest of the name after any
    dot, or, with `^`, the full name.
    """
    literal: dict[str, _T] = {}
    expressions: list[str] = []
    for key, value in (pattern or {}).items():
        name = key.removeprefix("^").removesuffix("$").replace("\\.", ".")
        if is_literal(name):
            literal.setdefault(f"^{name}" if key.startswith("^") else name, value)
        else:
            expressions.append(key)
    return literal, tuple(expressions)


def _excluded_modules(value: object) -> tuple[str, ...]:
    """Return what is excluded. PEFT matches a single text with full names, and each name of a list with their endings, too."""
    return (f"^{value}",) if isinstance(value, str) and value else tuple(_names(value))


def _names(value: object) -> list[Any]:
    """Return the entries of a setting that is a name or a list of names."""
    return value if isinstance(value, list) else [value] if value else []


def _task_warning(config: Mapping[str, Any]) -> Iterator[Reason]:
    task = config.get("task_type")
    if not _is_unset(task) and task != "CAUSAL_LM":
        found = sanitize(short_repr(task))
        yield warning(
            "task_type",
            f"{CONFIG} names the task {found}. This does not change what the weights do, but perhaps the adapter was not "
            "trained to generate text.",
            found=found,
            expected="'CAUSAL_LM'",
            fix="Compare its output with that of the base model without an adapter",
        )


# -- names -------------------------------------------------------------------------------------------------------------


def dotted_suffixes(module: str) -> Iterator[str]:
    """Yield the name itself, then the rest of it after each dot: all strings that a literal target can match."""
    yield module
    position = module.find(".")
    while position >= 0:
        yield module[position + 1 :]
        position = module.find(".", position + 1)


def layer_of(module: str, names: tuple[str, ...] = ()) -> int | None:
    """Return the number of the layer that a module is in, or None if it is in no layer.

    As in PEFT, this is the first number between dots that follows at least two names; with `names` (literal, as in
    layers_pattern), the first number that follows one of these names.
    """
    if not names:
        match = _LAYER.match(module)
        return int(match[1]) if match else None
    for name in names:
        match = re.match(rf"(?:^|.*?\.){re.escape(name)}\.(\d{{1,6}})\.", module, re.ASCII)
        if match:
            return int(match[1])
    return None


def is_literal(name: object) -> bool:
    return isinstance(name, str) and _LITERAL.fullmatch(name) is not None


def _by_pattern(pattern: Mapping[str, _T], order: Mapping[str, int], module: str, default: _T) -> _T:
    """Return the value of the first key that is the module's name or a dotted suffix of it.

    PEFT treats keys as regular expressions, in which a dot matches any character. For literal module names of one model the
    result is the same.
    """
    if not pattern:
        return default
    matching = [key for key in (f"^{module}", *dotted_suffixes(module)) if key in pattern]
    return pattern[min(matching, key=order.__getitem__)] if matching else default


# -- errors ------------------------------------------------------------------------------------------------------------


def _invalid_values(config: Mapping[str, Any]) -> Iterator[Reason]:
    if config.get("peft_type") != "LORA":
        yield _not_lora(config)
    if not is_rank(config.get("r")):
        yield _setting_error(config, "r", f"an integer from 1 to {MAX_RANK}")
    if not is_alpha(config.get("lora_alpha")):
        yield _setting_error(config, "lora_alpha", f"a finite number above 0, at most {MAX_ALPHA:g}")
    for setting in ("use_rslora", "ensure_weight_tying"):
        if config.get(setting) is not None and type(config[setting]) is not bool:
            yield _setting_error(config, setting, "true or false")
    if not _are_names(config.get("target_modules")):
        yield _setting_error(config, "target_modules", "a list of module names", "targets_not_literal")
    for setting in ("exclude_modules", "layers_pattern"):
        if not _are_names(config.get(setting)):
            yield _setting_error(config, setting, "a name or a list of names")
    yield from _invalid_pattern(config, "rank_pattern", is_rank, f"integers from 1 to {MAX_RANK}")
    yield from _invalid_pattern(config, "alpha_pattern", is_alpha, f"numbers above 0, at most {MAX_ALPHA:g}")
    layers = config.get("layers_to_transform")
    if layers is not None and not _are_layers(layers):
        yield _setting_error(config, "layers_to_transform", "a layer number or a list of layer numbers")
    if not _is_unset(config.get("bias")) and config["bias"] not in ("none", "all", "lora_only"):
        yield _setting_error(config, "bias", "'none', 'all' or 'lora_only'", "unsupported_setting")
    yield from _changing_initialisation(config)


def _not_lora(config: Mapping[str, Any]) -> Reason:
    return _setting_error(config, "peft_type", "'LORA'", "not_lora", "Use a LoRA adapter: no other kind is supported")


def _invalid_pattern(
    config: Mapping[str, Any], setting: str, is_valid: Callable[[object], bool], values: str
) -> Iterator[Reason]:
    pattern = config.get(setting)
    if pattern is None:
        return
    if not isinstance(pattern, dict) or len(pattern) > MAX_NAMES or not all(map(is_valid, pattern.values())):
        yield _setting_error(config, setting, f"a mapping of module names to {values}")


def _changing_initialisation(config: Mapping[str, Any]) -> Iterator[Reason]:
    value = config.get("init_lora_weights")
    # The types are compared too, because 1 == True.
    if any(type(value) is type(allowed) and value == allowed for allowed in _INITIALISATIONS):
        return
    expected = "true, false, 'gaussian', 'eva', 'orthogonal' or 'mica'"
    name = value.lower() if isinstance(value, str) else ""
    if not name.startswith(_CHANGING_INITIALISATIONS):
        yield _setting_error(config, "init_lora_weights", expected, "unsupported_setting")
        return
    found = sanitize(short_repr(value))
    is_loftq = name.startswith("loftq")
    changed = "quantised" if is_loftq else "changed"
    fix = (
        "Train it again with init_lora_weights true, or use the base model that LoftQ wrote"
        if is_loftq
        else "Save it again with PEFT's save_pretrained(..., path_initial_model_for_weight_conversion=...), which makes plain "
        "LoRA of it, or train it again with init_lora_weights true"
    )
    yield error(
        "unsupported_setting",
        f"{CONFIG}: init_lora_weights is {found}. This {changed} the base model's weights before training, so that A and B do "
        "not belong to the base model as it is published.",
        found=found,
        expected=expected,
        where="init_lora_weights",
        fix=fix,
    )


def _unsupported_settings(config: Mapping[str, Any]) -> Iterator[Reason]:
    """Yield one error for each of the first ten unsupported settings, then one that counts the rest."""
    unsupported = [
        setting
        for setting, value in config.items()
        if not _is_unset(value) and (setting not in FIELDS or FIELDS[setting].use == "refused")
    ]
    for setting in unsupported[:10]:
        yield _unsupported(config, setting)
    if len(unsupported) > 10:
        message = f"{CONFIG} sets {len(unsupported) - 10} more settings that must be unset."
        yield error("unsupported_setting", message, where=sanitize(unsupported[10]), fix="Use a plain LoRA adapter")


def _unsupported(config: Mapping[str, Any], setting: str) -> Reason:
    known = FIELDS.get(setting)
    if known is None:
        fix = f"If it had no effect but in training, remove it from {CONFIG}; otherwise use a plain LoRA adapter"
        return _setting_error(config, setting, "unset, because its effect is unknown", "unsupported_setting", fix)
    found, name = sanitize(short_repr(config[setting])), sanitize(setting)
    message = f"{CONFIG}: {name} is {found}, which is not plain LoRA: {known.problem}."
    return error("unsupported_setting", message, found=found, expected="unset", where=name, fix=known.fix)


def _setting_error(
    config: Mapping[str, Any], setting: str, expected: str, code: str = "config_value", fix: str | None = None
) -> Reason:
    found, name = sanitize(short_repr(config.get(setting))), sanitize(setting)
    message = f"{CONFIG}: {name} is {found}; it must be {expected}."
    return error(
        code, message, found=found, expected=expected, where=name, fix=fix or f"Correct {CONFIG}, or download it again"
    )


def short_repr(value: object) -> str:
    """Return a bounded `repr`, without the cost of a complete one for a large or deeply nested value."""
    match value:
        case str():
            return repr(value[:80])
        case list() | dict():
            items = [*value][:3]
            shown = ", ".join(short_repr(item) if isinstance(item, str | int | float) else "…" for item in items)
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


def _are_names(value: object) -> bool:
    """Return whether a value is unset, a string, or a list of strings. Each may be an expression: none is ever run."""
    names = value if isinstance(value, list) else [value] if not _is_unset(value) else []
    return len(names) <= MAX_NAMES and all(isinstance(name, str) for name in names)
