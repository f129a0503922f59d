"""Check the `adapter_config.json` of mlx-lm and reduce it to the same settings as PEFT's.

mlx-lm writes every argument of the training into this file. Its loader (`tuner/utils.py`) reads `fine_tune_type`, the number
of layers and `lora_parameters`; the weights name the layers and modules here, so that only the rank and the scale remain.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from peft_core.adapters.config_check import MAX_ALPHA, MAX_RANK, LoraSettings, is_alpha, is_rank, short_repr
from peft_core.adapters.findings import error, warning
from peft_core.adapters.layout import MLX, PEFT
from peft_core.adapters.manifest import CONFIG
from peft_core.errors import sanitize
from peft_core.schemas.results import Reason

_KNOWN = ("rank", "scale", "alpha", "dropout", "keys")


def check_mlx_settings(config: Mapping[str, Any]) -> tuple[LoraSettings | None, list[Reason]]:
    """Return the validated settings (None if there are errors), with all errors and warnings. No JSON object makes it raise."""
    parameters = config.get("lora_parameters")
    errors = [*_wrong_method(config)]
    if not isinstance(parameters, dict):
        expected = "a mapping with rank and scale, as mlx-lm writes it"
        fix = f"Correct {CONFIG}"
        if config.get("peft_type") is not None:
            fix = f"{CONFIG} is PEFT's: if PEFT wrote the weights too, rename {MLX.weights} to {PEFT.weights}"
        errors.append(_invalid("lora_parameters", parameters, expected, fix=fix))
    elif not errors:
        errors += _invalid_parameters(parameters)
    if errors or not isinstance(parameters, dict):
        return None, errors
    rank, scale = parameters["rank"], float(parameters["scale"])
    settings = LoraSettings(rank=rank, alpha=scale * rank, target_modules=None)
    return settings, list(_alpha_warning(parameters))


def _wrong_method(config: Mapping[str, Any]) -> Iterator[Reason]:
    method = config.get("fine_tune_type") or ("dora" if config.get("use_dora") else "lora")
    if method != "lora":
        fix = "Train it again with --fine-tune-type lora"
        yield _invalid("fine_tune_type", method, "'lora': DoRA and full fine-tuning are not supported", "not_lora", fix)


def _invalid_parameters(parameters: Mapping[str, Any]) -> Iterator[Reason]:
    rank, scale = parameters.get("rank"), parameters.get("scale")
    if not is_rank(rank):
        yield _invalid("lora_parameters.rank", rank, f"an integer from 1 to {MAX_RANK}")
    elif not is_alpha(scale) or not is_alpha(scale * rank):
        hint = ""
        if scale is None and "alpha" in parameters:
            hint = "; mlx-lm has a scale, not alpha: write the scale that the adapter was trained with"
        yield _invalid("lora_parameters.scale", scale, f"a number above 0, at most {MAX_ALPHA:g} / rank{hint}")
    unknown = [name for name, value in parameters.items() if name not in _KNOWN and value not in (None, False)]
    for name in unknown[:3]:
        expected = "unset, because its effect is unknown"
        yield _invalid(f"lora_parameters.{name}", parameters[name], expected, "unsupported_setting")


def _alpha_warning(parameters: Mapping[str, Any]) -> Iterator[Reason]:
    """Warn of an alpha: mlx-lm has ignored it since 2024, and multiplied the scale by alpha / rank before."""
    rank, scale, alpha = parameters["rank"], parameters["scale"], parameters.get("alpha")
    if is_alpha(alpha) and alpha != rank:
        yield warning(
            "mlx_alpha",
            f"{CONFIG} has an alpha beside the scale. As in mlx-lm, only the scale ({scale:g}) is used; versions of early 2024 "
            f"multiplied it by alpha / rank, which would give {scale * alpha / rank:g}.",
            found=f"scale {scale:g}, alpha {alpha:g}",
            fix="If the adapter was trained with such a version, multiply lora_parameters.scale by alpha / rank",
        )


def _invalid(
    setting: str, value: object, expected: str, code: str = "config_value", fix: str = f"Correct {CONFIG}"
) -> Reason:
    found, name = sanitize(short_repr(value)), sanitize(setting)
    message = f"{CONFIG} (of mlx-lm): {name} is {found}; it must be {expected}."
    return error(code, message, found=found, expected=expected, where=name, fix=fix)
