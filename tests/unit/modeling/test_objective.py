"""T tokens, N targets, V vocabulary."""

from typing import Literal

import pytest
import torch
from peft import PeftModel
from torch.nn.functional import cross_entropy

from peft_core.modeling import attention
from peft_core.modeling import objective as objective_module
from peft_core.modeling.batches import Document, join, micro_batches
from peft_core.modeling.fused_blocks import fuse
from peft_core.modeling.objective import Objective, probe_fast_paths
from peft_core.schemas.training import TrainingConfig
from peft_core.training import lora
from tests.tiny_models import tiny_documents, tiny_model

CPU = torch.device("cpu")
LENGTHS = (40, 12, 9, 30, 3, 17)


def with_random_adapter(
    architecture: str, *, fused: bool, targets: Literal["all-linear"] | list[str] = "all-linear"
) -> tuple[Objective, PeftModel]:
    model = tiny_model(architecture)
    objective = probe_fast_paths(model, max_length=64)
    adapted = lora.attach(model, TrainingConfig(rank=4, target_modules=targets), "tiny")
    torch.manual_seed(1)
    for weight in lora.weights(adapted).values():
        torch.nn.init.normal_(weight, std=0.1)  # B is zero at first, which would hide half of the gradient
    if fused:
        fuse(adapted)
    return objective, adapted


def gradient_of(model: PeftModel, loss: torch.Tensor) -> torch.Tensor:
    weights = list(lora.weights(model).values())
    return torch.cat([gradient.flatten() for gradient in torch.autograd.grad(loss, weights)])


def plain_loss(model: PeftModel, documents: list[Document]) -> torch.Tensor:
    """Compute the loss with the model's own forward, one document at a time."""
    total = torch.zeros(())
    for document in documents:
        ids_1T = document.ids_T.long()[None]
        logits_TV = model(input_ids=ids_1T).logits[0, :-1]
        learned_T = document.learn_T[1:]
        total = total + cross_entropy(logits_TV[learned_T], ids_1T[0, 1:][learned_T], reduction="sum")
    return total


@pytest.mark.parametrize(
    ("architecture", "packed", "chunked_head"),
    [
        ("llama", True, True),
        ("qwen2", True, True),
        ("qwen3", True, True),
        ("mistral", True, True),
        ("mistral_window", False, True),
        ("gemma2", False, False),
        ("gpt2", True, True),
    ],
)
def test_fast_paths_are_used_only_where_loss_and_gradient_are_the_models_own(
    architecture: str, packed: bool, chunked_head: bool
) -> None:
    plain, reference = with_random_adapter(architecture, fused=False)
    assert (plain.packed, plain.head is not None) == (packed, chunked_head)
    documents = tiny_documents(LENGTHS)
    expected = plain_loss(reference, documents)
    expected_gradient = gradient_of(reference, expected)

    objective, model = with_random_adapter(architecture, fused=True)
    batches = list(micro_batches(documents, objective.capacity, CPU))
    assert len(batches) == (1 if packed else len(documents))
    loss = torch.stack([objective.loss(batch) for batch in batches]).sum()
    gradient = gradient_of(model, loss)

    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    assert (gradient - expected_gradient).norm() / expected_gradient.norm() < 1e-5


@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], ["down_proj"], ["gate_proj", "o_proj"]])
def test_partly_adapted_blocks_give_the_models_own_gradient(targets: list[str]) -> None:
    documents = tiny_documents(LENGTHS)
    _, reference = with_random_adapter("qwen3", fused=False, targets=targets)
    expected_gradient = gradient_of(reference, plain_loss(reference, documents))
    objective, model = with_random_adapter("qwen3", fused=True, targets=targets)
    gradient = gradient_of(model, objective.loss(join(documents, CPU)))
    assert (gradient - expected_gradient).norm() / expected_gradient.norm() < 1e-5


def test_gradient_checkpointing_gives_the_same_gradient() -> None:
    objective, model = with_random_adapter("qwen2", fused=True)
    batch = join(tiny_documents(LENGTHS), CPU)
    kept = gradient_of(model, objective.loss(batch))
    objective.enable_gradient_checkpointing()
    again = gradient_of(model, objective.loss(batch))
    assert torch.equal(kept, again)


@pytest.mark.parametrize("capacity", [0, 45, 60, 111])
def test_packing_does_not_change_the_gradient(capacity: int) -> None:
    objective, model = with_random_adapter("llama", fused=True)
    documents = tiny_documents(LENGTHS)
    whole = gradient_of(model, objective.loss(join(documents, CPU)))
    parts = sum(gradient_of(model, objective.loss(batch)) for batch in micro_batches(documents, capacity, CPU))
    assert (parts - whole).norm() / whole.norm() < 1e-5


@pytest.mark.parametrize("architecture", ["llama", "qwen3", "mistral_window", "gemma2", "gpt2"])
def test_padding_to_few_shapes_changes_neither_loss_nor_gradient(
    architecture: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Imitates MPS: micro-batches are padded, and attention uses a mask."""
    documents = tiny_documents(LENGTHS)
    _, reference = with_random_adapter(architecture, fused=False)
    expected = plain_loss(reference, documents)
    expected_gradient = gradient_of(reference, expected)

    for module in (objective_module, attention):
        monkeypatch.setattr(module, "fixed_shapes", lambda _device: 32)
    objective, model = with_random_adapter(architecture, fused=False)
    batches = list(objective.batches(documents, CPU))
    assert all(batch.tokens % 32 == 0 for batch in batches)
    loss = torch.stack([objective.loss(batch) for batch in batches]).sum()
    gradient = gradient_of(model, loss)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    assert (gradient - expected_gradient).norm() / expected_gradient.norm() < 1e-5
    with torch.no_grad():
        scores = torch.cat([objective.scores(batch)[0] for batch in batches])
    assert len(scores) == sum(document.targets for document in documents)
    assert scores.sum().item() == pytest.approx(expected.item(), rel=1e-6)


def test_packed_documents_do_not_attend_to_each_other() -> None:
    objective, _ = with_random_adapter("llama", fused=True)
    first, second, other = tiny_documents((20, 20, 20))
    with torch.no_grad():
        alone = objective.loss(join([second], CPU))
        losses = [
            objective.loss(join([left, second], CPU)) - objective.loss(join([left], CPU)) for left in (first, other)
        ]
    for loss in losses:
        assert loss.item() == pytest.approx(alone.item(), rel=1e-5)


def test_reducing_memory_leaves_unpacked_documents_unpacked() -> None:
    objective = probe_fast_paths(tiny_model("mistral_window"), max_length=64)
    assert objective.reduce_memory(tokens=60, longest=40)
    assert (objective.capacity, objective.recomputes) == (0, True)


def test_reducing_memory_ends_with_padded_micro_batches() -> None:
    objective = probe_fast_paths(tiny_model(), max_length=1024)
    objective.multiple_of = 256
    assert objective.reduce_memory(tokens=1024, longest=300)
    assert (objective.capacity, objective.recomputes) == (512, False)
    assert objective.reduce_memory(tokens=512, longest=300)
    assert (objective.capacity, objective.recomputes) == (512, True)
    assert not objective.reduce_memory(tokens=512, longest=300)


def test_reducing_memory_fails_without_checkpointable_layers() -> None:
    objective = probe_fast_paths(tiny_model(), max_length=64)
    objective.model = torch.nn.Linear(1, 1)  # type: ignore[assignment]  # no layer of transformers in it
    assert not objective.reduce_memory(tokens=40, longest=40)


@pytest.mark.parametrize(("architecture", "packed"), [("gemma2", False), ("gpt_oss", False), ("deepseek_v3", True)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_unsupported_attention_is_left_to_the_model(architecture: str, packed: bool, dtype: torch.dtype) -> None:
    """In bf16, rounding hides an omitted part of attention, so that comparing logits would not find it."""
    model = tiny_model(architecture).to(dtype)
    objective = probe_fast_paths(model, max_length=64)
    assert objective.packed is packed
    documents = tiny_documents((9, 30))
    together = sum(objective.loss(batch) for batch in micro_batches(documents, objective.capacity, CPU))
    alone = plain_loss(model, documents)  # type: ignore[arg-type]  # as good as one with an adapter
    assert float(together) == pytest.approx(float(alone), rel=1e-5 if dtype == torch.float32 else 1e-2)
