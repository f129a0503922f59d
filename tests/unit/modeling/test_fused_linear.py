"""T tokens, I input features, O output features."""

from __future__ import annotations

import pytest
import torch

from peft_core.modeling.fused_linear import Adapters, ConcatenatedLora, Layer, Projections, SeparateLora, project
from peft_core.modeling.quantised import Bf16Matrix, QuantisedMatrix

TOKENS, INPUTS = 9, 12
SIZES = (10, 4, 7)
SCALING = 0.7


def layers(ranks: tuple[int, ...], *, in_bfloat16: bool, biases: bool = True) -> list[Layer]:
    generator = torch.Generator().manual_seed(0)
    made = []
    for size, rank in zip(SIZES, ranks, strict=True):
        W_OI = torch.randn(size, INPUTS, generator=generator).bfloat16()
        bias_O = torch.randn(size, generator=generator).bfloat16().float() if biases and size != 4 else None
        stored = Bf16Matrix(W_OI) if in_bfloat16 else QuantisedMatrix.from_tensor(W_OI.float())
        made.append(Layer(stored, bias_O, rank, SCALING))
    return made


def adapters(ranks: tuple[int, ...]) -> list[torch.Tensor | None]:
    generator = torch.Generator().manual_seed(1)
    made: list[torch.Tensor | None] = []
    for size, rank in zip(SIZES, ranks, strict=True):
        shapes = [(rank, INPUTS), (size, rank)]
        made += [torch.randn(shape, generator=generator) for shape in shapes] if rank else [None, None]
    return made


def plain(made: list[Layer], x_TI: torch.Tensor, matrices: Adapters) -> torch.Tensor:
    """Compute W x + bias + s B A x layer by layer, as PEFT does."""
    outs = []
    for layer, A, B in zip(made, matrices[::2], matrices[1::2], strict=True):
        out_TO = x_TI @ layer.W.dequantise_all().T + (0.0 if layer.bias_O is None else layer.bias_O)
        outs.append(out_TO if A is None or B is None else out_TO + layer.scaling * x_TI @ A.T @ B.T)
    return torch.cat(outs, 1)


def near(mine: torch.Tensor, theirs: torch.Tensor, projections: Projections) -> bool:
    tolerance = 1e-5 if projections.dtype == torch.float32 else 2e-2
    return bool((mine.float() - theirs).norm() <= tolerance * theirs.norm())


@pytest.mark.parametrize("in_bfloat16", [False, True])
@pytest.mark.parametrize("biases", [False, True])
@pytest.mark.parametrize("ranks", [(3, 3, 3), (3, 0, 2), (0, 0, 4), (0, 0, 0)])
def test_joint_outputs_and_gradients_equal_those_of_single_layers(
    ranks: tuple[int, ...], biases: bool, in_bfloat16: bool
) -> None:
    made, matrices = layers(ranks, in_bfloat16=in_bfloat16, biases=biases), adapters(ranks)
    projections = project(made)
    assert type(projections) is (ConcatenatedLora if in_bfloat16 else SeparateLora)
    generator = torch.Generator().manual_seed(2)
    x_TI, grad_TO = (torch.randn(TOKENS, size, generator=generator) for size in (INPUTS, sum(SIZES)))
    leaves = [x_TI.requires_grad_(), *(m.requires_grad_() for m in matrices if m is not None)]
    expected_TO = plain(made, x_TI, matrices)
    expected = torch.autograd.grad(expected_TO, leaves, grad_TO)

    with torch.no_grad():
        bf16_TI = x_TI.detach().to(projections.dtype)
        out_TO, down_TR = projections.forward(projections.to_buffer(bf16_TI), matrices)
        arguments = (grad_TO.to(projections.dtype), bf16_TI, down_TR, matrices)
        grad_x, grads = projections.backward(*arguments, grad_x=True)
        no_grad_x, same_grads = projections.backward(*arguments, grad_x=False)

    assert near(out_TO, expected_TO.detach(), projections)
    assert grad_x is not None
    assert no_grad_x is None
    assert [grad is None for grad in grads] == [matrix is None for matrix in matrices]
    found = [grad_x, *(grad for grad in grads if grad is not None)]
    assert all(near(mine, theirs, projections) for mine, theirs in zip(found, expected, strict=True))
    for grad, same in zip(grads, same_grads, strict=True):
        assert (grad is None and same is None) or torch.allclose(grad, same, rtol=2e-2, atol=2e-2)


def test_forward_uses_the_current_adapter_weights() -> None:
    ranks = (3, 3, 3)
    matrices = adapters(ranks)
    projections = ConcatenatedLora(layers(ranks, in_bfloat16=True))
    x_TI = torch.ones(TOKENS, INPUTS, dtype=torch.bfloat16)
    before, _ = projections.forward(projections.to_buffer(x_TI), matrices)
    zeros = [matrix * 0 for matrix in matrices if matrix is not None]
    after, _ = projections.forward(projections.to_buffer(x_TI), zeros)
    assert not torch.equal(before, after)
    assert near(after, plain(layers(ranks, in_bfloat16=True), x_TI.float(), zeros), projections)


def test_concatenated_weights_are_shared_views_for_single_layers() -> None:
    ranks = (3, 0, 2)
    made = layers(ranks, in_bfloat16=True)
    projections = ConcatenatedLora(made)
    projections.forward(projections.to_buffer(torch.ones(TOKENS, INPUTS, dtype=torch.bfloat16)), adapters(ranks))
    alone = projections.weights()
    assert [
        torch.equal(mine.dequantise_all(), layer.W.dequantise_all()) for mine, layer in zip(alone, made, strict=True)
    ] == [True] * 3
    assert len({mine.storage.untyped_storage().data_ptr() for mine in alone}) == 1
    x_TI = torch.randn(TOKENS, INPUTS)
    assert torch.equal(alone[1].matmul(x_TI), made[1].W.matmul(x_TI))
    assert torch.equal(alone[1].matmul_t(x_TI[:, :4]), made[1].W.matmul_t(x_TI[:, :4]))
