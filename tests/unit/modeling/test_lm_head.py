"""N positions, D model size, V vocabulary."""

import pytest
import torch
from torch.nn.functional import cross_entropy

from peft_core.modeling.batches import IGNORED
from peft_core.modeling.lm_head import ChunkedLMHead
from peft_core.modeling.quantised import Bf16Matrix, QuantisedMatrix
from peft_core.planning.cost_model import LOGITS_IN_FLOAT32


@pytest.mark.parametrize("positions", [1, 256, 700])
def test_loss_and_gradient_equal_those_of_plain_cross_entropy(positions: int) -> None:
    torch.manual_seed(0)
    hidden_ND = torch.randn(positions, 32, requires_grad=True)
    head_VD = torch.randn(1000, 32)
    target_N = torch.randint(0, 1000, (positions,))

    loss = ChunkedLMHead(QuantisedMatrix.from_tensor(head_VD)).cross_entropy(hidden_ND, target_N)
    (grad_ND,) = torch.autograd.grad(3.0 * loss, hidden_ND)
    expected = cross_entropy(hidden_ND @ head_VD.T, target_N, reduction="sum")
    (expected_ND,) = torch.autograd.grad(3.0 * expected, hidden_ND)

    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    assert (grad_ND - expected_ND).norm() / expected_ND.norm() < 1e-5


@pytest.mark.parametrize(("positions", "vocabulary"), [(600, 1000), (7, LOGITS_IN_FLOAT32 // 3)])
def test_a_bf16_head_rounds_only_the_logits_and_their_gradient(positions: int, vocabulary: int) -> None:
    """Covers several chunks, and chunks converted to float32 in several pieces."""
    torch.manual_seed(0)
    hidden_ND = torch.randn(positions, 8, requires_grad=True)
    head_VD = torch.randn(vocabulary, 8).bfloat16()
    target_N = torch.randint(0, vocabulary, (positions,))
    target_N[1] = IGNORED

    head = ChunkedLMHead(Bf16Matrix(head_VD))
    loss = head.cross_entropy(hidden_ND, target_N)
    (grad_ND,) = torch.autograd.grad(loss, hidden_ND)
    logits_NV = (hidden_ND.detach().bfloat16() @ head_VD.T).float().requires_grad_()
    expected = cross_entropy(logits_NV, target_N, reduction="sum", ignore_index=IGNORED)
    (grad_NV,) = torch.autograd.grad(expected, logits_NV)
    expected_ND = (grad_NV.bfloat16() @ head_VD).float()
    with torch.no_grad():
        losses_N, likeliest_N = head.scores(hidden_ND, target_N.clamp(min=0))

    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    assert (grad_ND - expected_ND).norm() / expected_ND.norm() < 1e-3
    assert losses_N[target_N >= 0].sum().item() == pytest.approx(loss.item(), rel=1e-5)
    assert torch.equal(likeliest_N, logits_NV.argmax(-1))


def test_a_target_of_vanishing_probability_has_a_finite_loss_and_gradient() -> None:
    hidden_ND = torch.tensor([[1.0]], requires_grad=True)
    head_VD = torch.tensor([[300.0], [0.0]])  # softmax of the second is below the smallest float32
    loss = ChunkedLMHead(QuantisedMatrix.from_tensor(head_VD)).cross_entropy(hidden_ND, torch.tensor([1]))
    loss.backward()
    assert loss.item() == pytest.approx(300.0)
    assert hidden_ND.grad is not None
    assert hidden_ND.grad.item() == pytest.approx(300.0)


def test_without_gradients_the_head_computes_only_the_loss() -> None:
    hidden_ND, head_VD, target_N = torch.randn(5, 8), torch.randn(20, 8), torch.randint(0, 20, (5,))
    with torch.no_grad():
        loss = ChunkedLMHead(QuantisedMatrix.from_tensor(head_VD)).cross_entropy(hidden_ND, target_N)
    assert loss.item() == pytest.approx(
        cross_entropy(hidden_ND @ head_VD.T, target_N, reduction="sum").item(), rel=1e-6
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_loss_without_targets_is_zero(dtype: torch.dtype) -> None:
    head_VD = torch.randn(20, 8).to(dtype)
    head = ChunkedLMHead(Bf16Matrix(head_VD) if dtype == torch.bfloat16 else QuantisedMatrix.from_tensor(head_VD))
    none_N = torch.zeros(0, dtype=torch.long)
    assert head.cross_entropy(torch.randn(0, 8), none_N).item() == 0.0
    assert [len(scores) for scores in head.scores(torch.randn(0, 8), none_N)] == [0, 0]
