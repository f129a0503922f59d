"""The tensors of an adapter against its settings and against the modules of a base: by name, shape and type.

PEFT itself loads most of what is refused here without a word: names that it does not know are skipped, modules without
weights stay as they are, and a tensor named like one of the base's replaces it for good.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from peft_core.adapters.config_check import LoraSettings, dotted_suffixes, layer_of
from peft_core.adapters.findings import error, error_about
from peft_core.adapters.manifest import CONFIG, WEIGHTS
from peft_core.base_models.checkpoint import read_checkpoint
from peft_core.base_models.checkpoint_info import TensorInfo, join_some
from peft_core.base_models.families import EMBEDDING_MODULES
from peft_core.schemas.base_model import Base
from peft_core.schemas.results import Reason

FLOATS = ("BF16", "F16", "F32")
PREFIX = "base_model.model."
_PEFT = re.compile(r"(.+)\.lora_(A|B)\.weight", re.ASCII)
_NAMED = re.compile(r"(.+)\.lora_(A|B)\.[^.]+\.weight", re.ASCII)  # model.state_dict() has the adapter's name inside
_UNUSABLE = {
    "dora_weights": re.compile(r"\.lora_magnitude_vector\b", re.ASCII),
    "embedding_lora": re.compile(r"\.lora_embedding_[AB]\b", re.ASCII),
    "mlx_names": re.compile(r"\.lora_[ab]$", re.ASCII),
}
_WEIGHT_FILE = f"Do not use this {WEIGHTS}"


@dataclass(frozen=True)
class BaseModules:
    """What LoRA can adapt in a base model. `linear`: name to (out, in) of the weight W; `parameters`: every shape."""

    base: Base
    parameters: Mapping[str, tuple[int, ...]]
    linear: Mapping[str, tuple[int, int]]
    layers: frozenset[int]


@dataclass(frozen=True)
class _Sorted:
    """The tensors classified by name. `a` and `b` are by module, also if the name deviates slightly from PEFT's."""

    a: dict[str, TensorInfo] = field(default_factory=dict)
    b: dict[str, TensorInfo] = field(default_factory=dict)
    foreign: dict[str, list[str]] = field(default_factory=dict)  # code: names

    @property
    def modules(self) -> set[str]:
        return self.a.keys() | self.b.keys()

    @property
    def is_complete(self) -> bool:
        """Whether a module without weights in `a` and `b` really has none, rather than weights under MLX's names."""
        return "mlx_names" not in self.foreign


def base_modules(base: Base) -> BaseModules:
    """Return the modules of a base model.

    Raises:
        BaseCheckpointError, HeaderError: the base model cannot be read.
    """
    shapes = read_checkpoint(base.path).shapes
    linear = linear_modules(shapes)
    layers = frozenset(number for module in linear if (number := layer_of(module)) is not None)
    return BaseModules(base, shapes, linear, layers)


def linear_modules(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, int]]:
    """Return the modules that LoRA can adapt, without embeddings: name to (out, in)."""
    return {
        name.removesuffix(".weight"): (shape[0], shape[1])
        for name, shape in shapes.items()
        if name.endswith(".weight") and len(shape) == 2 and "embed" not in name.rsplit(".", 2)[-2]
    }


def check_tensors(
    tensors: Mapping[str, TensorInfo], settings: LoraSettings | None, modules: BaseModules | None
) -> list[Reason]:
    """Return the errors in these tensors, one of each kind.

    If the settings were rejected or there is no base model, only the remaining checks are made.
    """
    found = _sorted(tensors, modules)
    reasons = [*_foreign(found), *_unsound(tensors, found)]
    if settings is not None:
        reasons += _against_settings(found, settings, modules)
    if modules is not None:
        reasons += _against_base(found, settings, modules)
    return reasons


def _sorted(tensors: Mapping[str, TensorInfo], modules: BaseModules | None) -> _Sorted:
    found = _Sorted()
    for name, tensor in tensors.items():
        bare = name.removeprefix(PREFIX)
        match = _PEFT.fullmatch(bare)
        code = None if match and bare != name else "prefix_stripped"
        if match is None and (match := _NAMED.fullmatch(bare)):
            code = "adapter_name_in_keys"
        if match is None:
            code = _meaning(bare, tensor, modules)
        else:
            (found.a if match[2] == "A" else found.b)[match[1]] = tensor
        if code is not None:
            found.foreign.setdefault(code, []).append(name)
    return found


def _meaning(name: str, tensor: TensorInfo, modules: BaseModules | None) -> str:
    """Return the error code for a tensor that is not a LoRA weight."""
    for code, pattern in _UNUSABLE.items():
        if pattern.search(name):
            return code
    if not name.endswith((".weight", ".bias")) or ".lora_" in name:
        return "foreign_tensor"
    part = name.split(".")[-2]
    if part in (*EMBEDDING_MODULES, "lm_head") and modules is not None:
        rows = tensor.shape[0] if tensor.shape else 0
        return "overwrites_base" if rows == _vocabulary(modules) else "vocabulary_resized"
    taken = modules is None or name in modules.parameters or part == "base_layer"
    return "overwrites_base" if taken else "foreign_tensor"


# Code: what the tensors are, what to do.
_FOREIGN = {
    "prefix_stripped": (
        f"tensors lack the prefix '{PREFIX}', so that PEFT would load none of them",
        "Save it with PEFT's save_pretrained, or put the prefix before each name",
    ),
    "adapter_name_in_keys": (
        "tensors have the adapter's name in theirs, so that PEFT would load none of them",
        "Save it with PEFT's save_pretrained, not with model.state_dict()",
    ),
    "mlx_names": (
        "tensors are named, and transposed, as MLX does, so that PEFT would load none of them",
        "Convert it to PEFT's form: lora_a is the transpose of lora_A.weight",
    ),
    "overwrites_base": (
        "tensors would replace the base's own weights, for good",
        f"{_WEIGHT_FILE}; was it trained with modules_to_save, train without",
    ),
    "vocabulary_resized": (
        "tensors are an embedding or head of another vocabulary than the base's",
        "Use the base that it was trained on, whose vocabulary was extended; or train without new tokens",
    ),
    "dora_weights": (
        "tensors are the magnitudes of DoRA, without which its A and B mean something else",
        "Use a LoRA adapter that was trained without use_dora",
    ),
    "embedding_lora": (
        "tensors adapt an embedding, which is not supported here",
        "Train with linear modules as targets, such as 'all-linear'",
    ),
    "foreign_tensor": ("tensors are no LoRA weights", f"{_WEIGHT_FILE}: it holds more than an adapter"),
}


def _foreign(found: _Sorted) -> Iterator[Reason]:
    for code, (what, fix) in _FOREIGN.items():
        yield from error_about(code, what, found.foreign.get(code, []), fix=fix)


def _unsound(tensors: Mapping[str, TensorInfo], found: _Sorted) -> Iterator[Reason]:
    if not found.modules and found.is_complete:
        yield error("no_weights", f"{WEIGHTS} holds no LoRA weights.", where=WEIGHTS, fix="Train it, or fetch it again")
    unpaired = sorted(found.a.keys() ^ found.b.keys())
    yield from error_about("unpaired", "modules have only one of A and B", unpaired, fix="Train it, or fetch it again")
    odd = [tensor.name for tensor in tensors.values() if tensor.dtype not in FLOATS]
    kinds = ", ".join(sorted({tensors[name].dtype for name in odd}))
    fix = "Save it in float32 or bfloat16"
    yield from error_about(
        "dtype", "tensors are no plain floats", odd, found=kinds, expected=", ".join(FLOATS), fix=fix
    )


def _against_settings(found: _Sorted, settings: LoraSettings, modules: BaseModules | None) -> Iterator[Reason]:
    """Compare weights and configuration: PEFT builds modules from the configuration and fills in the weights that match."""
    fix = f"{CONFIG} and {WEIGHTS} are not of one adapter, or one was edited: fetch both again"
    wrong: list[str] = []
    first: dict[str, str] = {}
    for module in sorted(found.modules):
        rank = settings.rank_of(module)
        for tensor, axis in ((found.a.get(module), 0), (found.b.get(module), 1)):
            if tensor is not None and (len(tensor.shape) != 2 or tensor.shape[axis] != rank):
                wrong.append(tensor.name)
                ranks = tensor.shape[axis] if len(tensor.shape) == 2 else list(tensor.shape)
                first = first or {"found": f"rank {ranks}", "expected": f"rank {rank}"}
    yield from error_about("rank", "tensors have another rank than the configuration says", wrong, fix=fix, **first)
    known = found.modules if modules is None else found.modules & modules.linear.keys()
    beside = sorted(module for module in known if not settings.targets(module))
    yield from error_about(
        "not_targeted", "modules have weights that PEFT would ignore: no target names them", beside, fix=fix
    )
    if modules is None and found.is_complete:
        matched = {end for module in found.modules for end in dotted_suffixes(module)}
        idle = [target for target in settings.target_modules if target not in matched]
        yield from error_about("weights_missing", "targets have no weights", idle, fix=fix)


def _against_base(found: _Sorted, settings: LoraSettings | None, modules: BaseModules) -> Iterator[Reason]:
    base, linear = modules.base, modules.linear
    other = f"Use it with the base that it was trained on, which {base.name} is not"
    matched = {end for module in linear for end in dotted_suffixes(module)}
    missing: set[str] = set()
    if settings is not None:
        yield from _unmatched(settings, matched, other)
        if found.is_complete:
            missing = {module for module in linear if settings.targets(module)} - found.modules
    strange = found.modules - linear.keys()
    count = _other_layers(found, settings, modules)
    if count is not None:
        yield error(
            "layer_count",
            f"The adapter has weights for {count[0]}, the base has {count[1]}.",
            found=count[0],
            expected=count[1],
            fix=other,
        )
        layers = {number for module in found.modules if (number := layer_of(module)) is not None}
        strange = {module for module in strange if layer_of(module) in modules.layers or layer_of(module) is None}
        missing = {module for module in missing if layer_of(module) in layers or layer_of(module) is None}
    yield from error_about("module_not_in_base", "modules are not in the base", sorted(strange), fix=other)
    yield from error_about("weights_missing", "targeted modules have no weights", sorted(missing), fix=other)
    yield from _sizes(found, modules, other)


def _unmatched(settings: LoraSettings, matched: set[str], fix: str) -> Iterator[Reason]:
    targets = [target for target in settings.target_modules if target not in matched]
    embeddings = [target for target in targets if target.rpartition(".")[2] in EMBEDDING_MODULES]
    what, advice = _FOREIGN["embedding_lora"]
    yield from error_about("embedding_lora", what.replace("tensors adapt", "targets are"), embeddings, fix=advice)
    others = [target for target in targets if target not in embeddings]
    yield from error_about("target_not_in_base", "target modules are not in the base", others, fix=fix)
    keys = [key for key in (*settings.rank_pattern, *settings.alpha_pattern) if key not in matched]
    yield from error_about("pattern_not_in_base", "keys of rank_pattern or alpha_pattern fit no module", keys, fix=fix)


def _other_layers(found: _Sorted, settings: LoraSettings | None, modules: BaseModules) -> tuple[str, str] | None:
    """Describe the layers of adapter and base model if their numbers differ; otherwise return None."""
    layers = {number for module in found.modules if (number := layer_of(module)) is not None}
    chosen = settings is not None and settings.layers_to_transform is not None
    from_first = layers == set(range(len(layers)))
    if not layers or not modules.layers or not (from_first or chosen):
        return None
    beyond = max(layers) > max(modules.layers)
    fewer = not chosen and max(layers) < max(modules.layers)
    if not beyond and not fewer:
        return None
    return _range(layers), _range(modules.layers)


def _range(layers: Iterable[int]) -> str:
    numbers = sorted(set(layers))
    if numbers[-1] - numbers[0] + 1 == len(numbers) > 1:  # not enumerated: a malicious name may contain layer 999999
        return f"layers {numbers[0]}-{numbers[-1]}"
    return f"{'layers' if len(numbers) > 1 else 'layer'} {join_some(map(str, numbers), 6)}"


def _sizes(found: _Sorted, modules: BaseModules, fix: str) -> Iterator[Reason]:
    """Check that A is (rank, in) and B is (out, rank) for the base's W of (out, in). `_against_settings` checks the rank."""
    wrong: list[tuple[TensorInfo, str, int, int]] = []  # with the module, the size found and the one expected
    for module in sorted(found.modules & modules.linear.keys()):
        outputs, inputs = modules.linear[module]
        for tensor, axis, expected in ((found.a.get(module), 1, inputs), (found.b.get(module), 0, outputs)):
            if tensor is not None and len(tensor.shape) == 2 and tensor.shape[axis] != expected:
                wrong.append((tensor, module, tensor.shape[axis], expected))
    heads: list[tuple[TensorInfo, str, int, int]] = []
    rest: list[tuple[TensorInfo, str, int, int]] = []
    for entry in wrong:
        is_head = entry[1].rpartition(".")[2] == "lm_head" and entry[3] == _vocabulary(modules)
        (heads if is_head else rest).append(entry)
    if heads:
        what, advice = _FOREIGN["vocabulary_resized"]
        sizes = {"found": str(heads[0][2]), "expected": str(heads[0][3])}
        yield from error_about("vocabulary_resized", what, [entry[0].name for entry in heads], fix=advice, **sizes)
    if rest:
        difference = _difference(rest, modules)
        yield from error_about(
            "shape",
            "tensors do not fit the base's sizes" + (f" ({difference[0]})" if difference else ""),
            [tensor.name for tensor, *_ in rest],
            found=difference[1] if difference else str(rest[0][2]),
            expected=difference[2] if difference else str(rest[0][3]),
            fix=fix,
        )


def _vocabulary(modules: BaseModules) -> int:
    return modules.base.shape.vocab_size


def _difference(wrong: list[tuple[TensorInfo, str, int, int]], modules: BaseModules) -> tuple[str, str, str] | None:
    """Return (difference, found, expected) in words if one dimension explains all wrong sizes; otherwise None."""
    shape = modules.base.shape
    sizes = {size for _, _, size, _ in wrong}
    if all(module.endswith((".k_proj", ".v_proj")) and ".lora_B." in tensor.name for tensor, module, *_ in wrong):
        head = max(1, wrong[0][3] // shape.kv_heads)  # rows of a head, assumed to be equal in both models
        if len(sizes) == 1 and (found := sizes.pop()) % head == 0:
            what = "key and value heads"
            return what, f"{found // head} {what}", f"{shape.kv_heads} {what}"
        return None
    # Report the hidden size first: other sizes follow from it.
    for what, expected in (("hidden size", shape.hidden_size), ("intermediate size", shape.intermediate_size)):
        sizes = {size for _, _, size, required in wrong if required == expected}
        if len(sizes) == 1:
            return what, f"{what} {sizes.pop()}", f"{what} {expected}"
    return None


# -- the weights themselves: finite numbers, and not all zero ----------------------------------------------------------
# No numpy: the sign and most of the exponent of a float are in its top byte, and bytes methods search all top bytes in C.

_WIDTH = {"F32": 4, "BF16": 2, "F16": 2}
# Top bytes of an infinity or NaN: an exponent of ones. In float32 and bfloat16 its last bit is in the byte below.
_SUSPECT = {"F32": b"\x7f\xff", "BF16": b"\x7f\xff", "F16": bytes([*range(0x7C, 0x80), *range(0xFC, 0x100)])}
_ZEROS = b"\x00\x80"  # a zero's top byte: either sign


def check_weights(tensors: Iterable[TensorInfo], read: Callable[[TensorInfo], bytes]) -> list[Reason]:
    """Return the errors in these weights. `read` returns a tensor's bytes, little-endian as in the file.

    One tensor at a time is in memory. Other types than these floats are skipped, because `check_tensors` rejects them.
    """
    odd: list[str] = []
    b_seen = b_moves = False
    for tensor in tensors:
        if tensor.dtype not in _WIDTH:
            continue
        data = read(tensor)
        if not _is_finite(data, tensor.dtype):
            odd.append(tensor.name)
        if ".lora_B." in tensor.name:
            b_seen = True
            b_moves = b_moves or not _is_zero(data, _WIDTH[tensor.dtype])
    reasons = [
        *error_about("not_finite", "tensors hold NaN or infinity", odd, fix="Train it again with a lower learning rate")
    ]
    if b_seen and not b_moves:
        message = "Every B is zero: the adapter would change nothing. It was never trained, or its weights were lost."
        reasons.append(error("b_all_zero", message, where="lora_B", fix="Train it, or fetch it again"))
    return reasons


def _is_finite(data: bytes, dtype: str) -> bool:
    width = _WIDTH[dtype]
    top = data[width - 1 :: width]
    if not any(byte in top for byte in _SUSPECT[dtype]):
        return True
    if dtype == "F16":
        return False
    below = data[width - 2 :: width]
    return not any(high & 0x7F == 0x7F and low & 0x80 for high, low in zip(top, below, strict=True))


def _is_zero(data: bytes, width: int) -> bool:
    if data[:4096].strip(_ZEROS) or data.strip(_ZEROS):  # the first bytes usually decide
        return False
    # Only bytes 0 and 128 are left: zero of either sign, if 128 is nowhere but on top.
    return not any(0x80 in data[place::width] for place in range(width - 1))
