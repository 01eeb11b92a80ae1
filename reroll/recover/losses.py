"""Compute losses over the vocabulary for a few positions at a time.

The softmax of all positions is never in memory at once. The gradient of each piece is computed with
its value, and only the gradient of the logits is kept for the backward pass.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

# positions per piece: few, so that their distributions stay in the processor's cache
PIECE = 32

Piece = Callable[..., Tensor]


def mean_over_pieces(logits: Tensor, loss: Piece, *others: Tensor) -> Tensor:
    """Compute the mean of `loss` over positions, in fp32, with its gradient for `logits`.

    `logits` and `others` begin with the dimension [positions]. `loss` takes a piece of each and
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
            piece = logits[rows].detach().requires_grad_(needed)
            with torch.set_grad_enabled(needed):
                value = loss(piece, *(other[rows] for other in others))
            if gradient is not None:
                gradient[rows] = torch.autograd.grad(value, piece)[0]
            total += value.detach()
        ctx.gradient = gradient
        return total

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> Any:
        return (ctx.gradient * outer[0], *([None] * (len(ctx.needs_input_grad) - 1)))


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Compute the mean cross-entropy of the next token, in nats; logits [rows, length, vocabulary].

    Tokens with the label -100 are not counted.
    """
    ahead = F.pad(labels[:, 1:], (0, 1), value=-100)
    targets = int((ahead >= 0).sum())
    mean = mean_over_pieces(logits.flatten(0, 1), _nats, ahead.flatten())
    return mean * (ahead.numel() / max(targets, 1))


def _nats(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits.float(), labels, reduction="sum")


def unpadded(values: Tensor, mask: Tensor) -> Tensor:
    """Select the positions of `values` [rows, length, ...] where `mask` is not 0."""
    return values.flatten(0, 1) if bool(mask.all()) else values[mask.bool()]
