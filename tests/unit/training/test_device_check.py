"""The parts of the check of a device that compute: what is compared, and by how much it differs."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from peft_core.modeling.batches import Document
from peft_core.training.device_check import Step, difference_of, heaviest, round_to, rounded_products, shorten
from tests.tiny_models import tiny_documents

A, B = "base_model.model.model.layers.0.mlp.up_proj.lora_A.default.weight", "y.lora_B.default.weight"


def step(a: float, b: float, loss: float = 2.0) -> Step:
    return Step(loss, {A: torch.tensor([a, a]), B: torch.tensor([b])})


def test_the_difference_is_relative_to_the_reference() -> None:
    found = difference_of(step(1.1, 3.0, loss=2.02), step(1.0, 3.0))
    assert found.loss == pytest.approx(0.01)
    assert found.gradient == pytest.approx(math.sqrt(0.02 / 11), rel=1e-5)
    assert (found.worst, found.worst_tensor) == (pytest.approx(0.1, rel=1e-5), "layers.0.mlp.up_proj, A")
    assert found.scale == pytest.approx(0.2 / 11, rel=1e-5)


def test_a_missing_gradient_differs_completely_and_nan_in_every_way() -> None:
    missing = Step(2.0, {B: torch.tensor([3.0])})
    assert difference_of(missing, step(1.0, 3.0)).worst == pytest.approx(1.0)
    broken = difference_of(step(math.nan, 3.0, loss=math.nan), step(1.0, 3.0))
    assert min(broken.loss, broken.gradient, broken.worst, broken.scale) > 1e6


def test_a_tensor_with_a_tiny_gradient_is_not_held_to_its_own_size() -> None:
    assert difference_of(step(2e-6, 3.0), step(1e-6, 3.0)).worst < 1e-4


@pytest.mark.parametrize(("bits", "dtype"), [(8, torch.bfloat16), (11, torch.float16)])
def test_rounding_gives_the_nearest_number_of_the_format(bits: int, dtype: torch.dtype) -> None:
    x = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    assert torch.equal(round_to(x, bits), x.to(dtype).float())


def test_products_are_rounded_forwards_and_backwards_only_inside_the_context() -> None:
    layer = nn.Linear(64, 64, bias=False)
    x = torch.randn(8, 64, requires_grad=True)
    exact = layer(x)
    with rounded_products(layer, 8, everywhere=False):
        rounded = layer(x)
        (grad,) = torch.autograd.grad(rounded.sum(), x)
    assert torch.equal(rounded, rounded.bfloat16().float())
    assert torch.equal(grad, grad.bfloat16().float())
    assert 1e-4 < (rounded - exact).norm() / exact.norm() < 1e-2
    assert torch.equal(layer(x), exact)


def test_a_shortened_document_ends_with_a_target_and_begins_without_one() -> None:
    document = Document(ids_T=torch.arange(100, dtype=torch.int32), learn_T=torch.arange(100) == 70)
    short = shorten(document, 32)
    assert short.ids_T.tolist() == list(range(39, 71))
    assert short.learn_T.nonzero()[:, 0].tolist() == [31]
    early = shorten(Document(ids_T=document.ids_T, learn_T=torch.arange(100) == 3), 32)
    assert (len(early), early.targets) == (32, 1)


def test_the_heaviest_micro_batch_is_full_but_of_one_step() -> None:
    documents = tiny_documents((100, 30, 80, 60, 20))
    assert [len(document) for document in heaviest(documents, 200, 8)] == [100, 80, 20]
    assert [len(document) for document in heaviest(documents, 200, 2)] == [100, 80]
    assert [len(document) for document in heaviest(documents, 0, 8)] == [100]
