"""Linear layer with one of several matrices for each token."""

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
    """Apply one of several linear layers to each token, by the depth of its exit.

    `x` is [batch, time, in]; `weights` are [out, in], and `biases` [out] may be empty. `depth` is
    [batch, time]. A token with depth `stops[i]` uses weight and bias i + 1, any other the first.
    Returns [batch, time, out].
    """
    out = F.linear(x, weights[0], biases[0] if biases else None)
    for number, stop in enumerate(stops, 1):
        logits = F.linear(x, weights[number], biases[number] if biases else None)
        out = torch.where((depth == stop)[..., None], logits, out)
    return out


@exit_linear.register_fake
def _(
    x: Tensor, depth: Tensor, stops: list[int], weights: list[Tensor], biases: list[Tensor]
) -> Tensor:
    return x.new_empty(*x.shape[:-1], weights[0].shape[0])


EXIT_LINEAR = torch.ops.reroll.exit_linear.default


def _exit_linear(node: fx.Node, place: Place) -> int:
    # each token uses exactly one of the matrices
    x, weight = shape(node.args[0]), shape(node.args[3][0])  # type: ignore[index]
    return 2 * count(x[:-1]) * count(weight)


register(EXIT_LINEAR, flops=_exit_linear)
