"""Which tokens leave a loop."""

from __future__ import annotations

import torch
from torch import Tensor


@torch.library.custom_op("reroll::exit", mutates_args=())
def exit(done: Tensor, score: Tensor, threshold: float) -> Tensor:
    """Which tokens [batch, time] are done: those that were, and those whose score is higher.

    Stands in the body of a loop, with a threshold for each trip; at an infinite one nobody leaves,
    and what is computed for the score alone need not be computed. The score has the shape of
    `done`.
    """
    return done | (score > threshold)


@exit.register_fake
def _(done: Tensor, score: Tensor, threshold: float) -> Tensor:
    return torch.empty_like(done)


EXIT = torch.ops.reroll.exit.default
