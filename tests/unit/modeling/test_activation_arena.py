"""The activation arena copies saved tensors, and changes nothing but their address."""

from __future__ import annotations

from random import Random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from peft_core.modeling import activation_arena as saved_tensors
from peft_core.modeling.activation_arena import ActivationArena


def test_saved_weights_are_not_copied() -> None:
    layer = nn.Linear(1000, 3)
    saved = ActivationArena(layer)
    x = torch.randn(2, 1000, requires_grad=True)
    with saved.of_one_pass():
        y = layer(x)
    y.sum().backward()
    assert saved.nbytes == x.nbytes


def test_each_pass_reuses_the_blocks_of_the_one_before(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(saved_tensors, "_BLOCK_BYTES", 4096)
    saved = ActivationArena(nn.Identity())
    places = []
    for sizes in ((600, 600), (100, 900), (2000, 10), (600, 600), (2000, 10)):  # float32: some fit into one block
        with saved.of_one_pass():
            of_pass = [saved._unpack(saved._pack(torch.ones(size))) for size in sizes]
        places.append([tensor.data_ptr() for tensor in of_pass])
    assert places[3] == places[0]
    assert places[4] == places[2]
    assert places[1][0] == places[0][0]


def test_a_backward_pass_after_the_next_forward_pass_is_refused() -> None:
    """Its tensors have been overwritten, and a wrong gradient would go unnoticed."""
    saved = ActivationArena(nn.Identity())
    x = torch.ones(3, requires_grad=True)
    with saved.of_one_pass():
        first = x.exp().sum()
    with saved.of_one_pass():
        second = x.exp().sum()
    with pytest.raises(RuntimeError, match="Forward pass 2 has overwritten the tensors of pass 1"):
        first.backward()
    second.backward()


@given(
    shape=st.lists(st.integers(0, 5), max_size=4), order=st.randoms(), kind=st.sampled_from([torch.float32, torch.int8])
)
def test_a_saved_tensor_keeps_its_values_type_shape_and_strides(
    shape: list[int], order: Random, kind: torch.dtype
) -> None:
    axes = list(range(len(shape)))
    order.shuffle(axes)
    tensor = torch.randint(-100, 100, shape).to(kind).permute(axes)
    saved = ActivationArena(nn.Identity())
    with saved.of_one_pass():
        again = saved._unpack(saved._pack(tensor))
    assert torch.equal(again, tensor)
    assert (again.dtype, again.stride()) == (tensor.dtype, torch.empty_like(tensor).stride())
    assert again.data_ptr() != tensor.data_ptr() or not tensor.numel()
    assert again.data_ptr() % 64 == 0
