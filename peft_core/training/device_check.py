"""Compare an accelerator with the CPU before the first training on it: loss and gradients of one micro-batch, and the memory.

The reference shares nothing with the device but the numbers: its weights come from the base model's files again, and it
computes as transformers and PEFT do, in float32, one document after the other. So it also checks what is done for speed
(packing, fused blocks, the head in chunks), and the copy of the weights on the device, which must be equal bit for bit.

B of an untrained adapter is zero, and so is the gradient of A. The comparison therefore sets both to random numbers of the
size of a trained adapter's. Afterwards the model is as it was, and the run draws the same random numbers as without it.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import structlog
import torch
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from peft_core.config import Settings
from peft_core.devices import records
from peft_core.devices.tolerance import SIGNIFICANT_BITS, memory_note, needs_emulation, tolerance, why_different
from peft_core.evaluation.worker.setup import Session
from peft_core.modeling.batches import Document
from peft_core.modeling.device import (
    device_memory_bytes,
    forget_peak_memory,
    identify,
    number_format,
    recommended_memory_bytes,
    release_memory,
    rng_state,
    set_rng_state,
)
from peft_core.modeling.fused_blocks import fuse
from peft_core.modeling.load import FrozenEmbedding, FrozenLinear, load_base, load_mapped
from peft_core.modeling.memory import return_freed_memory
from peft_core.modeling.objective import Objective
from peft_core.modeling.quantised import FrozenMatrix, QuantisedMatrix
from peft_core.planning.device_check import DOCUMENTS, Effort, expected_device_bytes, plan_effort, why_too_large
from peft_core.schemas.device_check import DeviceCheck, DeviceKey, GradientDifference, Outcome
from peft_core.system.failures import describe_error, is_out_of_memory
from peft_core.system.machine import available_memory_bytes, usable_cores
from peft_core.training import lora

_log = structlog.get_logger(__name__)

_B_STD = 0.02  # a trained adapter's
_SEED = 0
_TINY = 1e-2  # of a typical tensor's gradient

Gradients = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class Subject:
    """A base model on the device that is checked, and what it will be trained on."""

    session: Session
    directory: Path  # of the base model, in Hugging Face format
    model: PreTrainedModel
    objective: Objective
    recomputes: bool  # whether the run uses gradient checkpointing
    documents: Sequence[Document]

    @property
    def device(self) -> torch.device:
        device: torch.device = self.session.accelerator.device
        return device

    @property
    def computes_in(self) -> torch.dtype:
        """The type of the base model's matrices on the device."""
        head = self.model.get_input_embeddings()
        return head.stored.product_dtype if isinstance(head, FrozenEmbedding) else self.session.device.weights


class Step(NamedTuple):
    """What one micro-batch gave."""

    loss: float  # nats per target token
    gradients: Gradients  # float32, on the CPU


def key_of(subject: Subject) -> DeviceKey:
    """Return what a check of this subject is valid for."""
    objective = subject.objective
    way = [
        "documents packed" if objective.packed else "documents one by one",
        "head in chunks" if objective.head is not None else "complete logits",
        *(["gradient checkpointing"] if subject.recomputes else []),
    ]
    key = key_of_session(subject.session)
    computes_in = number_format(subject.computes_in, subject.device)
    return key.model_copy(update={"number_format": computes_in, "way": "; ".join([key.way, *way])})


def key_of_session(session: Session) -> DeviceKey:
    """Return the part of a key that is known before a base model is loaded."""
    device, shape = session.accelerator.device, session.task.request.base.shape
    identity = identify(device)
    return DeviceKey(
        machine=records.machine_id(),
        system=identity.system,
        device=session.device.device,
        device_name=identity.name,
        driver=identity.driver,
        torch=torch.__version__,
        number_format=number_format(session.device.weights, device),
        way=f"{session.task.request.base.model_type} with heads of {shape.features_of_head}",
    )


def check(subject: Subject) -> DeviceCheck:
    """Compare the device with the CPU. What goes wrong on the device is a result, not an error.

    Raises:
        Cancelled: on request.
        PeftMcpError: the request itself is at fault, such as a target module that does not exist.
    """
    began, request = time.monotonic(), subject.session.task.request
    key, layers = key_of(subject), request.base.shape.layers
    effort = plan_effort(request.base, request.config, cores=usable_cores(), available_bytes=available_memory_bytes())
    result = DeviceCheck(key=key, outcome=Outcome.SKIPPED, reason=effort.skipped, total_layers=layers)
    if not effort.skipped:
        result = _compare(subject, result, effort)
    _log.info("device_checked", outcome=result.outcome, reason=result.reason, memory_note=result.memory_note)
    return result.model_copy(
        update={
            "seconds": round(time.monotonic() - began, 1),
            "checked_at": datetime.now(UTC).isoformat(timespec="seconds"),
            "version": version("peft-mcp"),
        }
    )


def failed(key: DeviceKey, error: BaseException) -> DeviceCheck:
    """Return the result for a device that raised an error."""
    outcome = Outcome.OUT_OF_MEMORY if is_out_of_memory(error) else Outcome.FAILED
    return DeviceCheck(key=key, outcome=outcome, reason=records.without_paths(describe_error(error))[:300])


def _compare(subject: Subject, result: DeviceCheck, effort: Effort) -> DeviceCheck:
    stop, expected = subject.session.stop, expected_device_bytes(subject.session.task.request)
    documents = [shorten(document, effort.document_tokens) for document in subject.documents[:DOCUMENTS]]
    try:
        with _adapted(subject) as (adapted, objective):
            with _first_layers(subject.model, effort.layers):
                found = _step(adapted, objective, documents, subject.session)
            stop.check()
            measured, problem = _measure_memory(subject, adapted, objective)
    except (RuntimeError, TypeError, ValueError, MemoryError) as error:
        error.__traceback__ = None  # it keeps the tensors of the failed step alive
        with suppress(RuntimeError):  # a kernel that crashed may have left a device that answers nothing
            release_memory(subject.device)
        return failed(result.key, error).model_copy(update={"total_layers": result.total_layers})
    stop.check()
    reference = _load_reference(subject)
    differing = differing_weights(subject.model, reference)
    expected_step, rounded_step = _reference_steps(subject, reference, effort, documents)
    difference = difference_of(found, expected_step)
    rounding = None if rounded_step is None else difference_of(rounded_step, expected_step)
    allowed = tolerance(rounding)
    reason = why_different(difference, allowed)
    if differing:
        reason = f"{len(differing)} weights on it are not those of the file, such as {differing[0]}"
    outcome, note = Outcome.DIFFERS if reason else Outcome.AGREES, memory_note(measured, expected)
    if not reason and measured is not None and note and (reason := _why_too_large(subject, measured)):
        outcome = Outcome.TOO_LARGE
    return result.model_copy(
        update={
            "outcome": outcome,
            "reason": reason,
            "memory_note": problem or note,
            "difference": difference,
            "rounding": rounding,
            "tolerance": allowed,
            "tokens": sum(map(len, documents)),
            "layers": effort.layers,
            "measured_bytes": measured,
            "expected_bytes": expected,
        }
    )


# --- On the device ---------------------------------------------------------------------------------------------------------


@contextmanager
def _adapted(subject: Subject) -> Iterator[tuple[PeftModel, Objective]]:
    """Yield the model with an adapter of random weights, computed as in training; then restore the model."""
    states, was_training = rng_state(subject.device), subject.model.training
    adapted = _attach(subject, subject.model)
    try:
        fuse(adapted)  # compares blocks with their own forward, for which B must still be zero
        fill(adapted)
        objective = replace(subject.objective)
        if subject.recomputes:
            objective.enable_gradient_checkpointing()
        adapted.train()
        yield adapted, objective
    finally:
        for module in adapted.modules():
            module.__dict__.pop("forward", None)  # fusion and gradient checkpointing set it on the instance
        tuner: Any = adapted.base_model  # annotated as a module
        model = tuner.unload()
        if hasattr(model, "peft_config"):
            del model.peft_config
        model.requires_grad_(requires_grad=False)
        model.train(was_training)
        set_rng_state(subject.device, states)
        del adapted
        release_memory(subject.device)
        return_freed_memory()


def _attach(subject: Subject, model: PreTrainedModel) -> PeftModel:
    # Dropout would drop other numbers on each side.
    config = subject.session.task.request.config
    adapted = lora.attach(model, config, "")
    for module in adapted.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return adapted


def fill(adapted: PeftModel) -> None:
    """Set A and B to random numbers, which are the same on every device."""
    generator = torch.Generator().manual_seed(_SEED)
    with torch.no_grad():
        for name, weight in sorted(lora.weights(adapted).items()):
            std = _B_STD if ".lora_B." in name else 1 / math.sqrt(3 * weight.shape[1])
            weight.copy_(std * torch.randn(weight.shape, generator=generator))


@contextmanager
def _first_layers(model: PreTrainedModel, layers: int) -> Iterator[None]:
    """Let the model compute its first layers only; transformers reads their number at each forward pass."""
    config = model.config.get_text_config()
    before = config.num_hidden_layers
    if layers == before:
        yield
        return
    config.num_hidden_layers = layers
    try:
        yield
    finally:
        config.num_hidden_layers = before


def _step(adapted: PeftModel, objective: Objective, documents: Sequence[Document], session: Session) -> Step:
    """Compute loss and gradients as the training loop does."""
    accelerator, weights = session.accelerator, lora.weights(adapted)
    targets = sum(document.targets for document in documents)
    total = torch.zeros((), device=accelerator.device)
    for batch in objective.batches(documents, accelerator.device):
        with accelerator.autocast():
            loss = objective.loss(batch) / targets
        accelerator.backward(loss)
        total += loss.detach()
    gradients = {name: weight.grad.float().cpu() for name, weight in weights.items() if weight.grad is not None}
    for weight in weights.values():
        weight.grad = None
    return Step(float(total), gradients)


def _measure_memory(subject: Subject, adapted: PeftModel, objective: Objective) -> tuple[int | None, str]:
    """Return the device's memory during the largest micro-batch of the run, if it can be measured, and what went wrong."""
    config = subject.session.task.request.config
    documents = heaviest(subject.documents, objective.capacity, config.batch_size)
    forget_peak_memory(subject.device)
    try:
        _step(adapted, objective, documents, subject.session)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        for weight in lora.weights(adapted).values():
            weight.grad = None
        tokens = sum(map(len, documents))
        return None, f"its memory is too small for {tokens} tokens, so that the training will compute fewer together"
    return device_memory_bytes(subject.device) or None, ""


def _why_too_large(subject: Subject, measured: int) -> str:
    limit_mb, recommended_bytes = Settings().max_memory_mb, recommended_memory_bytes(subject.device)
    request = subject.session.task.request
    return why_too_large(request, measured, limit_mb=limit_mb, recommended_bytes=recommended_bytes)


def heaviest(documents: Sequence[Document], capacity: int, batch_size: int) -> list[Document]:
    """Return the documents of the largest micro-batch that a run may have: of one step, and at most `capacity` tokens."""
    chosen: list[Document] = []
    free = capacity
    for document in sorted(documents, key=len, reverse=True):
        if not chosen or len(document) <= free:
            chosen.append(document)
            free -= len(document)
        if len(chosen) == (batch_size if capacity else 1):
            break
    return chosen


def shorten(document: Document, tokens: int) -> Document:
    """Return at most `tokens` tokens of a document, up to its last target."""
    end = int(document.learn_T.nonzero()[-1]) + 1
    part = slice(max(0, end - tokens), max(end, min(tokens, len(document))))
    learn_T = document.learn_T[part].clone()
    learn_T[0] = False  # it has no context any more
    return Document(ids_T=document.ids_T[part], learn_T=learn_T)


# --- The reference ---------------------------------------------------------------------------------------------------------


def _load_reference(subject: Subject) -> PreTrainedModel:
    """Load the base model once more for float32 products on the CPU, with weights rounded as on the device."""
    base, dtype = subject.session.task.request.base, subject.computes_in
    model = load_mapped(base, subject.directory)
    if model is None:
        model = load_base(subject.directory, dtype)
        model.float()
        return model
    if dtype == torch.bfloat16:
        rounded: dict[int, QuantisedMatrix] = {}
        for module in model.modules():
            if isinstance(module, FrozenLinear | FrozenEmbedding):
                stored = module.stored
                if id(stored) not in rounded:
                    rounded[id(stored)] = QuantisedMatrix.from_tensor(stored.to_bf16().storage)
                module.stored = rounded[id(stored)]
    return model


def _reference_steps(
    subject: Subject, reference: PreTrainedModel, effort: Effort, documents: Sequence[Document]
) -> tuple[Step, Step | None]:
    """Return the step in float32, and with products rounded as the device rounds them unless that is float32 too."""
    cpu = torch.device("cpu")
    states = rng_state(cpu)
    adapted = _attach(subject, reference)
    set_rng_state(cpu, states)
    fill(adapted)
    adapted.train()
    computes_in = number_format(subject.computes_in, subject.device)
    with _first_layers(reference, effort.layers):
        exact = _cpu_step(subject, adapted, reference, documents)
        if not needs_emulation(computes_in):
            return exact, None
        with rounded_products(adapted, SIGNIFICANT_BITS[computes_in], everywhere=subject.model.dtype != torch.float32):
            return exact, _cpu_step(subject, adapted, reference, documents)


def _cpu_step(subject: Subject, adapted: PeftModel, reference: PreTrainedModel, documents: Sequence[Document]) -> Step:
    objective = Objective(model=reference, packed=False, head=None, capacity=0)
    targets, weights = sum(document.targets for document in documents), lora.weights(adapted)
    total = 0.0
    for batch in objective.batches(documents, torch.device("cpu")):
        loss = objective.loss(batch) / targets
        loss.backward()
        total += float(loss.detach())
        subject.session.stop.check()
    gradients = {name: weight.grad for name, weight in weights.items() if weight.grad is not None}
    for weight in weights.values():
        weight.grad = None
    return Step(total, gradients)


@contextmanager
def rounded_products(model: nn.Module, bits: int, *, everywhere: bool) -> Iterator[None]:
    """Round operands and results of the model's products, and their gradients, to so many significant bits.

    `everywhere`: results of all modules, as in models whose hidden states are in 16 bits too.
    """

    def rounded(value: object) -> object:
        if isinstance(value, tuple):
            return tuple(map(rounded, value))
        is_real = isinstance(value, torch.Tensor) and value.is_floating_point()
        return _Rounded.apply(value, bits) if is_real else value

    handles = []
    for module in model.modules():
        is_product = isinstance(module, nn.Linear | Conv1D)
        if is_product:
            handles.append(module.register_forward_pre_hook(lambda _, inputs: rounded(inputs)))
        if is_product or (everywhere and not isinstance(module, PeftModel | PreTrainedModel)):
            handles.append(module.register_forward_hook(lambda _, __, out: rounded(out)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class _Rounded(torch.autograd.Function):
    """Rounds a tensor in the forward pass, and its gradient in the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, bits: int) -> torch.Tensor:
        ctx.bits = bits
        return round_to(x, bits)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        return round_to(grad, ctx.bits), None


def round_to(x: torch.Tensor, bits: int) -> torch.Tensor:
    """Round float32 numbers to so many significant bits, halves away from zero. Their exponents stay those of float32."""
    dropped = 24 - bits
    whole = x.contiguous().view(torch.int32)
    return ((whole + (1 << (dropped - 1))) & ~((1 << dropped) - 1)).view(torch.float32)


def differing_weights(model: PreTrainedModel, reference: PreTrainedModel) -> list[str]:
    """Return the names of the weights on the device that are not equal to the file's, bit for bit."""
    expected = dict(_named_weights(reference))
    return [
        name
        for name, weight in _named_weights(model)
        if name not in expected or not _is_equal(_as_tensor(weight), _as_tensor(expected[name]))
    ]


def _is_equal(weight: torch.Tensor, expected: torch.Tensor) -> bool:
    return weight.shape == expected.shape and torch.equal(weight.cpu(), expected.to(weight.dtype))


def _as_tensor(weight: torch.Tensor | FrozenMatrix) -> torch.Tensor:
    """Return a weight in the type that it is stored in, or in float32 if that is a quantised one."""
    if isinstance(weight, torch.Tensor):
        return weight.detach()
    return weight.to_bf16().storage if weight.kind == "BF16" else weight.dequantise_all()


def _named_weights(model: PreTrainedModel) -> Iterator[tuple[str, torch.Tensor | FrozenMatrix]]:
    for name, module in model.named_modules():
        if isinstance(module, FrozenLinear | FrozenEmbedding):
            yield name, module.stored
            if isinstance(module, FrozenLinear) and module.bias is not None:
                yield f"{name}.bias", module.bias
            continue
        for parameter, weight in module.named_parameters(recurse=False):
            yield f"{name}.{parameter}".removesuffix(".weight"), weight


def difference_of(found: Step, expected: Step) -> GradientDifference:
    """Compare two steps. A tensor that has a gradient on one side only differs completely."""
    zero = torch.zeros(())
    names = sorted(found.gradients.keys() | expected.gradients.keys())
    pairs = {
        name: (found.gradients.get(name, zero).double(), expected.gradients.get(name, zero).double()) for name in names
    }
    errors = {name: float((g - g0).square().sum()) for name, (g, g0) in pairs.items()}
    references = {name: float(g0.square().sum()) for name, (_, g0) in pairs.items()}
    products = sum(float((g * g0).sum()) for g, g0 in pairs.values())
    squares, reference_squares = sum(errors.values()), sum(references.values())
    # In a tensor whose gradient is tiny, rounding errors of the others are all there is.
    least = _TINY**2 * reference_squares / max(1, len(names))
    worst, worst_tensor = 0.0, ""
    for name in names:
        share = _finite(_ratio(errors[name], max(references[name], least)))
        if share > worst:
            worst, worst_tensor = share, name
    return GradientDifference(
        loss=_finite(abs(found.loss - expected.loss) / max(abs(expected.loss), 1e-12)),
        gradient=_finite(_ratio(squares, reference_squares)),
        worst=worst,
        worst_tensor=_short(worst_tensor),
        scale=_finite(abs(products / reference_squares - 1) if reference_squares else 0.0),
    )


def _ratio(squares: float, reference_squares: float) -> float:
    if squares == 0:
        return 0.0
    return math.sqrt(squares / reference_squares) if reference_squares else math.inf


def _finite(value: float) -> float:
    """Return a number that JSON has, and that exceeds every tolerance if this one is NaN or infinite."""
    return value if math.isfinite(value) else 1e30


def _short(name: str) -> str:
    """Return the part of PEFT's name that people know: "layers.3.self_attn.q_proj, B"."""
    layer, _, matrix = name.removeprefix("base_model.model.").partition(".lora_")
    return f"{layer.removeprefix('model.')}, {matrix[:1]}" if matrix else name
