"""H heads, K key/value heads, T tokens, D head size."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import scaled_dot_product_attention

from peft_core.modeling import attention_bf16
from peft_core.modeling.attention_bf16 import Bf16Attention

_SCALE = 0.3
_LENGTHS = st.lists(st.sampled_from([1, 2, 31, 32, 33, 64, 127, 128, 129, 200, 300]), min_size=1, max_size=4)


def inputs(lengths: list[int], heads: int, groups: int, seed: int = 0) -> list[torch.Tensor]:
    """Return query, key, value and a gradient of the result."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(1, count, sum(lengths), 16) for count in (heads, groups, groups)] + [(1, sum(lengths), heads, 16)]
    return [torch.randn(shape, generator=generator).bfloat16() for shape in shapes]


def in_bf16(lengths: list[int], heads: int, groups: int, given: list[torch.Tensor]) -> list[torch.Tensor]:
    """Return the result of the bf16 attention and its three gradients."""
    *inputs, grad = given
    inputs = [x.clone().requires_grad_() for x in inputs]
    out = Bf16Attention.apply(*inputs, tuple(lengths), _SCALE)
    return [out, *torch.autograd.grad(out, inputs, grad)]


def expected(lengths: list[int], heads: int, groups: int, given: list[torch.Tensor]) -> list[torch.Tensor]:
    """Compute the same by torch's attention in float32, one document at a time."""
    *inputs, grad = given
    inputs = [x.float().requires_grad_() for x in inputs]
    parts = zip(*(x.repeat_interleave(heads // x.shape[1], 1).split(lengths, 2) for x in inputs), strict=True)
    outs = [scaled_dot_product_attention(*part, is_causal=True, scale=_SCALE) for part in parts]
    out = torch.cat(outs, 2).transpose(1, 2)
    return [out, *torch.autograd.grad(out, inputs, grad.float())]


@pytest.mark.parametrize(("heads", "groups"), [(4, 4), (6, 2), (3, 1)])
@settings(deadline=None, max_examples=25)
@given(lengths=_LENGTHS)
def test_bf16_attention_and_gradients_match_float32_up_to_rounding(heads: int, groups: int, lengths: list[int]) -> None:
    given = inputs(lengths, heads, groups)
    names = ("result", "query", "key", "value")
    for name, mine, theirs in zip(
        names, in_bf16(lengths, heads, groups, given), expected(lengths, heads, groups, given), strict=True
    ):
        assert mine.dtype == torch.bfloat16
        assert mine.shape == theirs.shape
        # A document of one token has no gradient of its query and key: what is compared with is rounding then.
        assert (mine.float() - theirs).norm() <= 1e-2 * theirs.norm() + 1e-3, name


def test_tokens_attend_to_no_other_document_and_no_later_token() -> None:
    lengths = [40, 50, 7]
    first, other = inputs(lengths, 4, 2), inputs(lengths, 4, 2, seed=1)
    own, later = slice(40, 90), slice(60, 90)
    mixed = [x.clone() for x in other]
    for mine, source in zip(mixed[:3], first[:3], strict=True):
        mine[:, :, own] = source[:, :, own]  # the second document is the first's, all else is not
        mine[:, :, later] = 9.0
    with torch.no_grad():
        alone, among = (Bf16Attention.apply(*x[:3], tuple(lengths), _SCALE) for x in (first, mixed))
    assert torch.equal(alone[:, 40:60], among[:, 40:60])
    assert not torch.equal(alone[:, 60:90], among[:, 60:90])


def test_padding_limits_the_number_of_shapes(monkeypatch: pytest.MonkeyPatch) -> None:
    """OneDNN compiles a kernel for each shape."""
    shapes = set()
    plain = attention_bf16._weights

    def seen(query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        shapes.add((query.shape[1], key.shape[1]))
        return plain(query, key)

    monkeypatch.setattr(attention_bf16, "_weights", seen)
    for length in range(1, 513, 3):
        query, key, value, _ = inputs([length, 40], 2, 1)
        Bf16Attention.apply(query, key, value, (length, 40), _SCALE)
    assert len(shapes) == 512 // 32
