"""Losses over the vocabulary, of a piece of positions at a time.

The softmax of all positions is never whole in memory: a piece's gradient is computed together with
its value, and what is kept for the backward pass is the gradient of the logits alone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

# positions whose distributions are compared at once: what they take stays in a processor's cache
PIECE = 32

Piece = Callable[..., Tensor]


def mean_over_pieces(logits: Tensor, loss: Piece, *others: Tensor) -> Tensor:
    """The mean over positions of `loss`, in fp32, with its gradient to `logits`.

    `logits` and `others` begin with the dimension [positions]; `loss` takes a piece of each and
    returns the sum over its positions.
    """
    if not len(logits):
        return logits.float().sum()
    total = cast(Tensor, _Pieces.apply(logits, loss, *others))  # type: ignore[no-untyped-call]
    return total / len(logits)


class _Pieces(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, loss: Piece, *others: Tensor) -> Tensor:
        total = logits.new_zeros((), dtype=torch.float32)
        needed = logits.requires_grad
        gradient = torch.empty_like(logits) if needed else None
        for start in range(0, len(logits), PIECE):
            rows = slice(start, start + PIECE)
            ours = logits[rows].detach().requires_grad_(needed)
            with torch.set_grad_enabled(needed):
                value = loss(ours, *(other[rows] for other in others))
            if gradient is not None:
                gradient[rows] = torch.autograd.grad(value, ours)[0]
            total += value.detach()
        ctx.gradient = gradient
        return total

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> Any:
        return (ctx.gradient * outer[0], *([None] * (len(ctx.needs_input_grad) - 1)))


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """The mean cross-entropy of the next token: logits [rows, length, vocabulary], in nats.

    Tokens whose label is -100 are no targets.
    """
    ahead = F.pad(labels[:, 1:], (0, 1), value=-100)
    targets = int((ahead >= 0).sum())
    mean = mean_over_pieces(logits.flatten(0, 1), _nats, ahead.flatten())
    return mean * (ahead.numel() / max(targets, 1))


def _nats(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits.float(), labels, reduction="sum")


def unpadded(values: Tensor, mask: Tensor) -> Tensor:
    """What stands [rows, length, ...] where the mask [rows, length] is not 0: [positions, ...]."""
    return values.flatten(0, 1) if bool(mask.all()) else values[mask.bool()]
