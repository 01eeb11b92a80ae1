"""Short convolutions over time, one filter for each channel; the state is their last inputs.

y_t = b + sum_j w_j x_{t-K+1+j}, j = 0 ... K-1, with a filter of K tokens of which the last is the
token itself: Gu and Dao, 2023 (arXiv 2312.00752), section 3.4; Dao and Gu, 2024 (arXiv 2405.21060),
section 7. An activation behind it is an ordinary operation.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from reroll.rewrite.ir.matching import argument, shape
from reroll.rewrite.ir.ops.base import Place, count, register


@torch.library.custom_op("reroll::short_convolution", mutates_args=())
def short_convolution(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Convolve each channel with its filter; before the first token there are zeros.

    `x`: [batch, channels, time] of the new tokens; `weight`: [channels, K]; `bias`: [channels].
    Returns [batch, channels, time], a part of the convolution with zeros on both sides, as
    transformers computes it: what follows rounds by the layout. This reference has no past.
    """
    return convolved(x, weight, bias, weight.shape[-1] - 1)[..., : x.shape[-1]]


def convolved(x: Tensor, weight: Tensor, bias: Tensor | None, padding: int = 0) -> Tensor:
    """Convolve with `padding` zeros before and behind `x`."""
    return F.conv1d(x, weight.unsqueeze(1), bias, padding=padding, groups=weight.shape[0])


@short_convolution.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    batch, channels, time = x.shape
    return x.new_empty(batch, channels, time + weight.shape[-1] - 1)[..., :time]


def _keep(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor | None], output: Tensor) -> None:
    x, weight, bias = inputs
    ctx.has_bias = bias is not None
    ctx.save_for_backward(x, weight)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    x, weight = (t.detach().requires_grad_() for t in ctx.saved_tensors)
    with torch.enable_grad():
        out = convolved(x, weight, None, weight.shape[-1] - 1)[..., : x.shape[-1]]
    dx, dw = torch.autograd.grad(out, (x, weight), grad)
    return dx, dw, grad.sum((0, 2)) if ctx.has_bias else None


short_convolution.register_autograd(_backward, setup_context=_keep)

SHORT_CONVOLUTION = torch.ops.reroll.short_convolution.default


def _flops(node: fx.Node, place: Place) -> int:
    return 2 * count(shape(node.args[1]))


def _state(node: fx.Node, place: Place) -> int:
    channels, size = shape(argument(node, "weight"))
    itemsize = int(node.args[0].meta["type"].dtype.itemsize)  # type: ignore[union-attr]
    return int(channels) * (int(size) - 1) * itemsize


register(SHORT_CONVOLUTION, flops=_flops, state=_state)
