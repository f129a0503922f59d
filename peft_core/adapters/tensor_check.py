"""Compare the tensors of an adapter with its settings and with the modules of a base model: by name, shape and type.

PEFT loads most of what is rejected here without a warning: it skips unknown names, leaves modules without weights
unadapted, and lets a tensor that is named like one of the base model's replace it permanently.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace

from peft_core.adapters.config_check import MAX_RANK, LoraSettings, dotted_suffixes, is_literal, layer_of
from peft_core.adapters.findings import error, error_about, warning
from peft_core.adapters.layout import MLX, PEFT, Layout
from peft_core.adapters.manifest import CONFIG, WEIGHTS
from peft_core.adapters.renaming import Renaming, find_renaming
from peft_core.adapters.weight_check import is_b
from peft_core.base_models.checkpoint import read_checkpoint
from peft_core.base_models.checkpoint_info import TensorInfo, join_some
from peft_core.base_models.families import EMBEDDING_MODULES
from peft_core.errors import sanitize
from peft_core.schemas.base_model import Base
from peft_core.schemas.results import Reason

FLOATS = ("BF16", "F16", "F32")
_STATE_DICT_NAME = re.compile(r"(.+)\.lora_(A|B)\.[^.]+\.weight", re.ASCII)  # contains the adapter's name
_UNSUPPORTED = {
    "dora_weights": re.compile(r"\.lora_magnitude_vector\b", re.ASCII),
    "embedding_lora": re.compile(r"\.lora_embedding_[AB]\b", re.ASCII),
    "mlx_names": re.compile(r"\.lora_[ab]$", re.ASCII),
    "lora_bias": re.compile(r"\.lora_[AB]\.(?:[^.]+\.)?bias$", re.ASCII),
    "token_rows": re.compile(r"\.(?:token_adapter|trainable_tokens_)", re.ASCII),
}
_DO_NOT_USE = f"Do not use this {WEIGHTS}"


@dataclass(frozen=True)
class BaseModules:
    """The modules and parameters of a base model."""

    base: Base
    parameters: Mapping[str, tuple[int, ...]]  # the shape of every parameter
    linear: Mapping[str, tuple[int, int]]  # (out, in) of the modules that LoRA can adapt
    layers: frozenset[int]


@dataclass(frozen=True)
class _ClassifiedTensors:
    """The tensors of an adapter by their role.

    `a` and `b` map modules to LoRA weights, including those whose names deviate slightly from the layout's. Their shapes are
    those of A (rank, in) and B (out, rank), also if the layout stores them transposed.
    """

    layout: Layout = PEFT
    a: dict[str, TensorInfo] = field(default_factory=dict)
    b: dict[str, TensorInfo] = field(default_factory=dict)
    wrong_names: dict[str, list[str]] = field(default_factory=dict)  # by error code

    @property
    def modules(self) -> set[str]:
        return self.a.keys() | self.b.keys()

    @property
    def is_complete(self) -> bool:
        """Whether a module without weights in `a` and `b` really has none, rather than weights under MLX's names."""
        return "mlx_names" not in self.wrong_names

    @property
    def paths(self) -> dict[str, str]:
        """The modules by the beginnings of their tensors' names: prefix and module."""
        stored = {**self.a, **self.b}
        return {_stored_path(tensor.name, module): module for module, tensor in stored.items()}

    def renamed(self, renaming: Renaming) -> _ClassifiedTensors:
        """Return the tensors as they would be classified under their new names."""
        new = {module: renaming(path).removeprefix(self.layout.prefix) for path, module in self.paths.items()}
        a = {new[module]: tensor for module, tensor in self.a.items()}
        return _ClassifiedTensors(self.layout, a, {new[module]: tensor for module, tensor in self.b.items()})


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
    """Return (out, in) of every module that LoRA can adapt, by name. Embeddings are not among them."""
    return {
        name.removesuffix(".weight"): (shape[0], shape[1])
        for name, shape in shapes.items()
        if name.endswith(".weight") and len(shape) == 2 and "embed" not in name.rsplit(".", 2)[-2]
    }


def check_tensors(
    tensors: Mapping[str, TensorInfo],
    settings: LoraSettings | None,
    modules: BaseModules | None,
    layout: Layout = PEFT,
) -> list[Reason]:
    """Return the errors and warnings about these tensors, one of each kind.

    If the settings were rejected or there is no base model, only the remaining checks are made.
    """
    classified = _classify(tensors, modules, layout)
    if modules is not None and (other_prefix := _other_prefix(classified, settings, modules)):
        return [other_prefix, *_malformed_weights(tensors, classified)]
    reasons = [*_wrong_name_errors(classified), *_malformed_weights(tensors, classified)]
    if settings is not None:
        reasons += _compare_with_settings(classified, settings, modules)
    if modules is not None:
        reasons += _compare_with_base(classified, settings, modules)
    return reasons


def _classify(tensors: Mapping[str, TensorInfo], modules: BaseModules | None, layout: Layout) -> _ClassifiedTensors:
    classified = _ClassifiedTensors(layout)
    for name, tensor in tensors.items():
        bare = name.removeprefix(layout.prefix)
        match = layout.name.fullmatch(bare)
        code = None if match and name.startswith(layout.prefix) else "prefix_stripped"
        if match is None and (match := _STATE_DICT_NAME.fullmatch(bare)):
            code = "adapter_name_in_keys"
        if match is None:
            code = _error_code(bare, tensor, modules, layout)
        else:
            role = classified.a if match[2] in "Aa" else classified.b
            role[match[1]] = replace(tensor, shape=tensor.shape[::-1]) if layout.transposed else tensor
        if code is not None:
            classified.wrong_names.setdefault(code, []).append(name)
    return classified


def _stored_path(name: str, module: str) -> str:
    """Return the beginning of a tensor's name, up to the end of its module's name."""
    return name[: name.rindex(f"{module}.lora_") + len(module)]


def _other_prefix(classified: _ClassifiedTensors, settings: LoraSettings | None, modules: BaseModules) -> Reason | None:
    """Return an error if all modules are in the base model, with their sizes, after one prefix was replaced.

    The targets in the configuration are then names of the other prefix too, and no further finding would help.
    """
    prefix = classified.layout.prefix
    paths = classified.paths
    known = {f"{prefix}{module}" for module in modules.linear}
    if paths.keys() <= known or classified.wrong_names.keys() - {"prefix_stripped", "adapter_name_in_keys"}:
        return None
    renaming = find_renaming(paths, known)
    if renaming is not None and not renaming.new.startswith(prefix) and renaming.old:
        renaming = renaming.extended_by(prefix, paths)
    if renaming is None or not all(part == "" or is_literal(part) for part in (renaming.old, renaming.new)):
        return None
    renamed = classified.renamed(renaming)
    if [*_wrong_sizes(renamed, modules, "")]:
        return None
    old_module, new_module = (part.removeprefix(prefix) for part in (renaming.old, renaming.new))
    stripped = renaming.old == ""
    begin = f"lack the prefix '{renaming.new}'" if stripped else f"begin with '{renaming.old}'"
    end = "" if stripped else f" and must begin with '{renaming.new}'" if renaming.new else ", which is too much"
    fix = f"Run `{renaming.command(classified.layout.weights)}` in the adapter's directory"
    targets = settings.target_modules if settings is not None else None
    if old_module and any(target.startswith(old_module) for target in targets or ()):
        fix += f"; and replace '{old_module}' by '{new_module}' in {CONFIG}"
    return error(
        "prefix_stripped" if stripped and renaming.new == prefix else "other_prefix",
        f"The adapter fits this base model, but the names of its tensors {begin}{end}. PEFT would load none of them.",
        found=renaming.old,
        expected=renaming.new,
        where=min(paths),
        fix=fix,
    )


def _error_code(name: str, tensor: TensorInfo, modules: BaseModules | None, layout: Layout) -> str:
    """Return the error code for a tensor that is not a LoRA weight."""
    if layout is MLX and name.endswith(".m"):
        return "dora_weights"
    if layout is MLX and PEFT.name.fullmatch(name):
        return "peft_names"
    for code, pattern in _UNSUPPORTED.items():
        if pattern.search(name):
            return code
    if not name.endswith((".weight", ".bias")) or ".lora_" in name:
        return "foreign_tensor"
    part = name.split(".")[-2]
    if part in (*EMBEDDING_MODULES, "lm_head") and modules is not None:
        rows = tensor.shape[0] if tensor.shape else 0
        return "overwrites_base" if rows == _vocabulary(modules) else "vocabulary_resized"
    is_base_weight = modules is None or name in modules.parameters or part == "base_layer"
    return "overwrites_base" if is_base_weight else "foreign_tensor"


# Error code: (problem, fix).
_WRONG_NAMES = {
    "prefix_stripped": (
        f"These tensors lack the prefix '{PEFT.prefix}', so PEFT would load none of them",
        f"Run `{Renaming('', PEFT.prefix, applies_to_all=True).command(WEIGHTS)}` in the adapter's directory",
    ),
    "adapter_name_in_keys": (
        "The names of these tensors contain the adapter's name, so PEFT would load none of them",
        "Save the adapter with PEFT's save_pretrained, not with model.state_dict()",
    ),
    "lora_bias": (
        "These tensors are biases of A or B, which plain LoRA does not have",
        "Train it again with lora_bias false",
    ),
    "token_rows": (
        "These tensors are trained rows of the embedding, which are not supported",
        "Train it again without trainable_token_indices",
    ),
    "mlx_names": (
        "These tensors have the names and the transposed layout of MLX, so PEFT would load none of them",
        f"If mlx-lm wrote them, rename the file to {MLX.weights} and keep the {CONFIG} that mlx-lm wrote beside it",
    ),
    "peft_names": (
        "These tensors have the names of PEFT, but their file has the name that mlx-lm uses",
        f"If PEFT wrote them, rename the file to {WEIGHTS}",
    ),
    "overwrites_base": (
        "These tensors would permanently replace weights of the base model",
        f"{_DO_NOT_USE}; if it was trained with modules_to_save, train it without",
    ),
    "vocabulary_resized": (
        "These tensors belong to an embedding or output head with another vocabulary size than the base model's",
        "Use the base model with the extended vocabulary that it was trained on, or train without new tokens",
    ),
    "tied_head": (
        "The adapter changes lm_head, but this base model has no output head of its own: it uses its embedding as the head",
        "Train it again without lm_head as a target, or use the base model with its own head that it was trained on",
    ),
    "dora_weights": (
        "These tensors are DoRA magnitudes, without which the adapter's A and B mean something else",
        "Use a LoRA adapter that was trained without use_dora",
    ),
    "embedding_lora": (
        "These tensors adapt an embedding, which is not supported",
        "Train with linear modules as targets, such as 'all-linear'",
    ),
    "foreign_tensor": ("These tensors are not LoRA weights", f"{_DO_NOT_USE}: it contains more than an adapter"),
}


def _wrong_name_errors(classified: _ClassifiedTensors) -> Iterator[Reason]:
    for code, (problem, fix) in _WRONG_NAMES.items():
        yield from error_about(code, problem, classified.wrong_names.get(code, []), fix=fix)


def _malformed_weights(tensors: Mapping[str, TensorInfo], classified: _ClassifiedTensors) -> Iterator[Reason]:
    fix = "Train the adapter, or download it again"
    if not classified.modules and classified.is_complete:
        file = classified.layout.weights
        yield error("no_weights", f"{file} contains no LoRA weights.", where=file, fix=fix)
    unpaired = sorted(classified.a.keys() ^ classified.b.keys())
    yield from error_about("unpaired", "These modules have only one of A and B", unpaired, fix=fix)
    unsupported = [tensor.name for tensor in tensors.values() if tensor.dtype not in FLOATS]
    yield from error_about(
        "dtype",
        "These tensors have an unsupported data type",
        unsupported,
        found=", ".join(sorted({tensors[name].dtype for name in unsupported})),
        expected=", ".join(FLOATS),
        fix="Save the adapter in float32 or bfloat16",
    )


def _compare_with_settings(
    classified: _ClassifiedTensors, settings: LoraSettings, modules: BaseModules | None
) -> Iterator[Reason]:
    """Compare weights and configuration: PEFT creates modules from the configuration and then loads the matching weights."""
    fix = f"Download {CONFIG} and {WEIGHTS} again: they belong to different adapters, or one of them was edited"
    yield from _wrong_ranks(classified, settings, fix)
    in_base = classified.modules if modules is None else classified.modules & modules.linear.keys()
    untargeted = sorted(module for module in in_base if not settings.targets(module))
    yield from error_about(
        "not_targeted", "PEFT would ignore the weights of these modules, which no target matches", untargeted, fix=fix
    )
    if modules is None and classified.is_complete:
        suffixes = {suffix for module in classified.modules for suffix in dotted_suffixes(module)}
        unmatched = [target for target in settings.target_modules or () if target not in suffixes]
        yield from error_about("weights_missing", "These targets have no weights", unmatched, fix=fix)
    yield from _undecided_settings(classified, settings)


def _wrong_ranks(classified: _ClassifiedTensors, settings: LoraSettings, fix: str) -> Iterator[Reason]:
    """Compare the ranks of A and B with the configuration, or with each other where it has expressions for ranks."""
    wrong: list[str] = []
    ranks: dict[str, str] = {}  # of the first wrong tensor
    for module in sorted(classified.modules):
        a, b = classified.a.get(module), classified.b.get(module)
        rank = settings.rank_of(module)
        if rank is None:
            rank = next((t.shape[axis] for t, axis in ((a, 0), (b, 1)) if t is not None and len(t.shape) == 2), 0)
        for tensor, axis in ((a, 0), (b, 1)):
            if tensor is None:
                continue
            if len(tensor.shape) != 2 or tensor.shape[axis] != rank or not 1 <= rank <= MAX_RANK:
                wrong.append(tensor.name)
                tensor_rank = tensor.shape[axis] if len(tensor.shape) == 2 else list(tensor.shape)
                ranks = ranks or {"found": f"rank {tensor_rank}", "expected": f"rank {rank}"}
    yield from error_about("rank", "The rank of these tensors differs from the configuration", wrong, fix=fix, **ranks)


def _undecided_settings(classified: _ClassifiedTensors, settings: LoraSettings) -> Iterator[Reason]:
    """Decide about settings that only the names of the weights can decide about."""
    parts = sorted({_without_layer(module) for module in classified.modules})
    if settings.target_modules is None and settings.targets_described and parts:
        yield warning(
            "targets_from_weights",
            f"{settings.targets_described}; the modules with weights are adapted: {join_some(map(sanitize, parts), 8)}.",
            found=settings.targets_described,
            fix="Compare these modules with those that were trained",
        )
    if settings.alpha_expressions:
        expression = sanitize(repr(settings.alpha_expressions[0][:80]))
        message = (
            f"{CONFIG}: alpha_pattern has the regular expression {expression}, which is never run, so that the scale of some "
            "modules is unknown. The modules with weights are "
            f"{join_some(map(sanitize, parts), 8)}."
        )
        fix = "Replace each expression by the names that it matches, such as 'self_attn.q_proj' or a full name"
        yield error("targets_not_literal", message, where="alpha_pattern", fix=fix)
    if experts := sorted(filter(_is_expert, classified.modules)):
        yield warning(
            "experts",
            f"The adapter has weights for {len(experts)} modules of single experts, such as {sanitize(experts[0])}. Where "
            "transformers computes all experts together, loading it fails.",
            fix="Load it to find out, or train it again without experts as targets",
        )
    if settings.ties_head and "lm_head" in {module.rpartition(".")[2] for module in classified.modules}:
        message = f"{CONFIG}: with ensure_weight_tying, the adapter of lm_head changes the embedding as well."
        fix = "Train it again without lm_head as a target"
        yield error("unsupported_setting", message, where="ensure_weight_tying", fix=fix)


def _without_layer(module: str) -> str:
    """Return what a module's name has after its layer's number, or the name itself."""
    parts = module.split(".")
    numbers = [index for index, part in enumerate(parts) if part.isdigit()]
    return ".".join(parts[numbers[0] + 1 :]) if numbers and numbers[0] + 1 < len(parts) else module


def _compare_with_base(
    classified: _ClassifiedTensors, settings: LoraSettings | None, modules: BaseModules
) -> Iterator[Reason]:
    base, linear = modules.base, modules.linear
    fix = f"Use the base model that the adapter was trained on, which is not {base.name}"
    missing: set[str] = set()
    unknown = classified.modules - linear.keys()
    if "lm_head" in unknown:  # the base model computes its logits with the embedding
        unknown.remove("lm_head")
        problem, tied_fix = _WRONG_NAMES["tied_head"]
        yield error("tied_head", f"{problem}.", where="lm_head", fix=tied_fix)
    if settings is not None:
        all_used = not unknown and bool(classified.modules) and all(map(settings.targets, classified.modules))
        yield from _unmatched_targets(settings, linear, fix, harmless=all_used)
        yield from _trained_biases(classified, settings, modules)
        if classified.is_complete and settings.target_modules is not None:
            missing = {module for module in linear if settings.targets(module)} - classified.modules
            if not any(
                map(_is_expert, classified.modules)
            ):  # since transformers 5, experts are no modules of their own
                missing = {module for module in missing if not _is_expert(module)}
    layer_ranges = _different_layers(classified, settings, modules)
    if layer_ranges is not None:
        adapter_layers, base_layers = layer_ranges
        yield error(
            "layer_count",
            f"The adapter has weights for {adapter_layers}, but the base model has {base_layers}.",
            found=adapter_layers,
            expected=base_layers,
            fix=fix,
        )
        # Do not report the modules of the missing layers as well.
        layers = {number for module in classified.modules if (number := layer_of(module)) is not None}
        unknown = {module for module in unknown if layer_of(module) in modules.layers or layer_of(module) is None}
        missing = {module for module in missing if layer_of(module) in layers or layer_of(module) is None}
    yield from error_about("module_not_in_base", "The base model lacks these modules", sorted(unknown), fix=fix)
    yield from error_about("weights_missing", "These targeted modules have no weights", sorted(missing), fix=fix)
    yield from _wrong_sizes(classified, modules, fix)


def _unmatched_targets(settings: LoraSettings, linear: Iterable[str], fix: str, *, harmless: bool) -> Iterator[Reason]:
    """Report targets and pattern keys that match no module of the base model.

    PEFT demands only that one target matches, so that lists for many families are common. They are `harmless` if all weights
    are used; otherwise they explain why not.
    """
    suffixes = {suffix for module in linear for suffix in dotted_suffixes(module)}
    targets = [target for target in settings.target_modules or () if target not in suffixes]
    embeddings = [target for target in targets if target.rpartition(".")[2] in EMBEDDING_MODULES]
    _, embedding_fix = _WRONG_NAMES["embedding_lora"]
    problem = "These targets are embeddings, which are not supported"
    yield from error_about("embedding_lora", problem, embeddings, fix=embedding_fix)
    unknown = [target for target in targets if target not in embeddings]
    patterns = (*(settings.rank_pattern or ()), *settings.alpha_pattern)
    keys = [key for key in patterns if key.removeprefix("^") not in suffixes]
    for code, names, problem in (
        ("target_not_in_base", unknown, "The base model lacks these target modules"),
        ("pattern_not_in_base", keys, "These keys of rank_pattern or alpha_pattern match no module of the base model"),
    ):
        if names and harmless:
            shown = join_some(sanitize(name) for name in names)
            yield warning(code, f"{problem}: {shown}. All weights are used without them.")
        else:
            yield from error_about(code, problem, names, fix=fix)


def _trained_biases(classified: _ClassifiedTensors, settings: LoraSettings, modules: BaseModules) -> Iterator[Reason]:
    """Refuse `bias` "all" or "lora_only" if the base model has biases that were trained with it; many have none."""
    match settings.trained_biases:
        case "none":
            return
        case "all":
            biases = [name for name in modules.parameters if name.endswith(".bias")]
        case "lora_only":
            biases = [f"{module}.bias" for module in sorted(classified.modules)]
    trained = [name for name in biases if name in modules.parameters]
    problem = f"{CONFIG}: with bias {settings.trained_biases!r}, these biases of the base model were trained too"
    yield from error_about("unsupported_setting", problem, trained, fix="Train it again with bias 'none'")


def _different_layers(
    classified: _ClassifiedTensors, settings: LoraSettings | None, modules: BaseModules
) -> tuple[str, str] | None:
    """Describe the layers of the adapter and of the base model if their numbers differ; otherwise return None."""
    layers = {number for module in classified.modules if (number := layer_of(module)) is not None}
    # An expression may choose layers too.
    layers_chosen = settings is not None and (
        settings.layers_to_transform is not None or settings.target_modules is None
    )
    consecutive = layers == set(range(len(layers)))
    if not layers or not modules.layers or not (consecutive or layers_chosen):
        return None
    too_many = max(layers) > max(modules.layers)
    adapts_last = classified.layout is MLX  # mlx-lm adapts the last layers
    too_few = (adapts_last or not layers_chosen) and max(layers) < max(modules.layers)
    if not too_many and not too_few:
        return None
    return _describe_layers(layers), _describe_layers(modules.layers)


def _is_expert(module: str) -> bool:
    return ".experts." in module


def _describe_layers(layers: Iterable[int]) -> str:
    numbers = sorted(set(layers))
    if numbers[-1] - numbers[0] + 1 == len(numbers) > 1:  # not enumerated: a malicious name may contain layer 999999
        return f"layers {numbers[0]}-{numbers[-1]}"
    return f"{'layers' if len(numbers) > 1 else 'layer'} {join_some(map(str, numbers), 6)}"


@dataclass(frozen=True)
class _WrongSize:
    tensor: TensorInfo
    module: str
    size: int
    expected: int


def _wrong_sizes(classified: _ClassifiedTensors, modules: BaseModules, fix: str) -> Iterator[Reason]:
    """Check that A is (rank, in) and B is (out, rank) for a weight of (out, in).

    The rank itself is checked by `_compare_with_settings`.
    """
    wrong: list[_WrongSize] = []
    for module in sorted(classified.modules & modules.linear.keys()):
        outputs, inputs = modules.linear[module]
        for tensor, axis, expected in ((classified.a.get(module), 1, inputs), (classified.b.get(module), 0, outputs)):
            if tensor is not None and len(tensor.shape) == 2 and tensor.shape[axis] != expected:
                wrong.append(_WrongSize(tensor, module, tensor.shape[axis], expected))
    heads = [w for w in wrong if w.module.rpartition(".")[2] == "lm_head" and w.expected == _vocabulary(modules)]
    others = [w for w in wrong if w not in heads]
    if heads:
        problem, head_fix = _WRONG_NAMES["vocabulary_resized"]
        sizes = {"found": str(heads[0].size), "expected": str(heads[0].expected)}
        yield from error_about("vocabulary_resized", problem, [w.tensor.name for w in heads], fix=head_fix, **sizes)
    if others:
        difference = _common_difference(others, modules)
        yield from error_about(
            "shape",
            "These tensors do not have the sizes of the base model" + (f" ({difference[0]})" if difference else ""),
            [w.tensor.name for w in others],
            found=difference[1] if difference else str(others[0].size),
            expected=difference[2] if difference else str(others[0].expected),
            fix=fix,
        )


def _vocabulary(modules: BaseModules) -> int:
    return modules.base.shape.vocab_size


def _common_difference(wrong: list[_WrongSize], modules: BaseModules) -> tuple[str, str, str] | None:
    """Return (dimension, found, expected) in words if one dimension explains all wrong sizes; otherwise None."""
    shape = modules.base.shape
    if all(w.module.endswith((".k_proj", ".v_proj")) and is_b(w.tensor.name) for w in wrong):
        rows_per_head = max(1, wrong[0].expected // shape.kv_heads)  # assumed to be equal in both models
        sizes = {w.size for w in wrong}
        if len(sizes) == 1 and (size := sizes.pop()) % rows_per_head == 0:
            dimension = "key and value heads"
            return dimension, f"{size // rows_per_head} {dimension}", f"{shape.kv_heads} {dimension}"
        return None
    # Report the hidden size first, because other sizes depend on it.
    for dimension, expected in (("hidden size", shape.hidden_size), ("intermediate size", shape.intermediate_size)):
        sizes = {w.size for w in wrong if w.expected == expected}
        if len(sizes) == 1:
            return dimension, f"{dimension} {sizes.pop()}", f"{dimension} {expected}"
    return None
