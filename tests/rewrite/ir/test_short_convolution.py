"""The op of short convolutions: its reference, its state in a cache, and its costs."""

from __future__ import annotations

import pytest
import torch

from reroll.rewrite.ir.ops import recent, short_convolution
from reroll.runtime.functions.convolutions import RecentLayer, StaticRecentLayer, convolve, recall


def example(dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    shapes = (2, 3, 9), (3, 4), (3,)
    return tuple(torch.randn(s, generator=generator, dtype=dtype) for s in shapes)


def test_each_token_is_a_sum_over_the_filter() -> None:
    x, weight, bias = example()
    out = short_convolution(x, weight, bias)
    for t in range(9):
        for j in range(4):
            if t - 3 + j >= 0:
                out[:, :, t] -= weight[:, j] * x[:, :, t - 3 + j]
    torch.testing.assert_close(out, bias[:, None].expand_as(out))


@pytest.mark.parametrize("has_bias", [True, False])
def test_gradients(has_bias: bool) -> None:
    given = [t.requires_grad_() for t in example()[: 3 if has_bias else 2]]
    assert torch.autograd.gradcheck(short_convolution, given)
    torch.library.opcheck(torch.ops.reroll.short_convolution.default, tuple(given))


@pytest.mark.parametrize("layer", [RecentLayer, StaticRecentLayer])
@pytest.mark.parametrize("pieces", [(9,), (1,) * 9, (2, 1, 6), (5, 4)])
def test_the_state_continues_a_sequence(pieces: tuple[int, ...], layer: type) -> None:
    x, weight, bias = example()
    layers = [layer()]
    outs = [convolve(layers, 0, piece, weight, bias) for piece in x.split(pieces, -1)]
    torch.testing.assert_close(torch.cat(outs, -1), short_convolution(x, weight, bias))
    assert int(layers[0].get_seq_length()) == 9


def test_tokens_are_taken_back() -> None:
    x, weight, bias = example()
    layer = RecentLayer()
    layer.activate_past_recording()
    convolve([layer], 0, x[..., :4], weight, bias)
    convolve([layer], 0, x[..., 4:8], weight, bias)
    layer.crop(-2)
    out = convolve([layer], 0, x[..., 6:], weight, bias)
    torch.testing.assert_close(out, short_convolution(x, weight, bias)[..., 6:])


def test_the_last_inputs_alone() -> None:
    x, _, _ = example()
    layers = [RecentLayer()]
    outs = [recall(layers, 0, piece, 3) for piece in x.split((5, 4), -1)]
    assert torch.equal(outs[0], recent(x[..., :5], 3))
    assert torch.equal(outs[1], x[..., 2:])
