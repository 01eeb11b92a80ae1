"""Exit of tokens from a loop."""

from __future__ import annotations

import torch
from torch import Tensor


@torch.library.custom_op("reroll::exit", mutates_args=())
def exit(done: Tensor, score: Tensor, threshold: float) -> Tensor:
    """Compute which tokens [batch, time] have exited: already `done`, or score above threshold.

    The op is in the body of a loop, with a threshold for each trip. At an infinite threshold no
    token exits, and nodes that only compute the score need not run. The score has the shape of
    `done`.
    """
    return done | (score > threshold)


@exit.register_fake
def _(done: Tensor, score: Tensor, threshold: float) -> Tensor:
    return torch.empty_like(done)


EXIT = torch.ops.reroll.exit.default
