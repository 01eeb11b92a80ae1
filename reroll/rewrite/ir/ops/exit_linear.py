"""One of several matrices for each token."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from reroll.rewrite.ir.matching import shape
from reroll.rewrite.ir.ops.base import Place, count, register


@torch.library.custom_op("reroll::exit_linear", mutates_args=())
def exit_linear(
    x: Tensor, depth: Tensor, stops: list[int], weights: list[Tensor], biases: list[Tensor]
) -> Tensor:
    """A product with one of several matrices for each token, by how deep it went.

    `x` [batch, time, in]; `weights` [out, in] and `biases` [out], of which there may be none. A
    token of depth `stops[i]` ([batch, time] in `depth`) takes those numbered i + 1, any other the
    first. Returns [batch, time, out].
    """
    out = F.linear(x, weights[0], biases[0] if biases else None)
    for number, stop in enumerate(stops, 1):
        own = F.linear(x, weights[number], biases[number] if biases else None)
        out = torch.where((depth == stop)[..., None], own, out)
    return out


@exit_linear.register_fake
def _(
    x: Tensor, depth: Tensor, stops: list[int], weights: list[Tensor], biases: list[Tensor]
) -> Tensor:
    return x.new_empty(*x.shape[:-1], weights[0].shape[0])


EXIT_LINEAR = torch.ops.reroll.exit_linear.default


def _exit_linear(node: fx.Node, place: Place) -> int:
    # a token has one head, whichever it is
    x, weight = shape(node.args[0]), shape(node.args[3][0])  # type: ignore[index]
    return 2 * count(x[:-1]) * count(weight)


register(EXIT_LINEAR, flops=_exit_linear)
