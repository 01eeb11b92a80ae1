"""The last inputs of a short convolution: the state of one.

The convolution behind it stays ATen's, over what this op returns.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from reroll.rewrite.ir.matching import argument
from reroll.rewrite.ir.ops.base import Place, count, register


@torch.library.custom_op("reroll::recent", mutates_args=())
def recent(x: Tensor, kept: int) -> Tensor:
    """Put the last `kept` tokens before the new ones; before the first token they are zeros.

    `x`: [batch, channels, time] of the new tokens. Returns [batch, channels, kept + time]. This
    reference has no past.
    """
    return F.pad(x, (kept, 0))


@recent.register_fake
def _(x: Tensor, kept: int) -> Tensor:
    return x.new_empty(*x.shape[:-1], kept + x.shape[-1])


def _keep(ctx: object, inputs: tuple[Tensor, int], output: Tensor) -> None:
    ctx.kept = inputs[1]  # type: ignore[attr-defined]


def _backward(ctx: object, grad: Tensor) -> tuple[Tensor, None]:
    return grad[..., ctx.kept :], None  # type: ignore[attr-defined]


recent.register_autograd(_backward, setup_context=_keep)

RECENT = torch.ops.reroll.recent.default


def _state(node: fx.Node, place: Place) -> int:
    type_ = node.args[0].meta["type"]  # type: ignore[union-attr]
    kept = int(place.resolve(argument(node, "kept")))
    channels: int = count((type_.shape[1],))
    return channels * kept * int(type_.dtype.itemsize)


register(RECENT, state=_state)
