"""Short convolutions in the lowered module; the state, their last inputs, is in cache layers.

`RecentLayer` is the layer of a recurrence whose state are these inputs.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from reroll.rewrite.ir.ops.short_convolution import convolved
from reroll.runtime.functions.recurrences import RecurrentLayer, StaticRecurrentLayer


def convolve(
    layers: Any, number: int, x: Tensor, weight: Tensor, bias: Tensor | None = None
) -> Tensor:
    """Run `reroll.short_convolution` on the state of a cache layer, or from zeros without one."""
    return convolved(recall(layers, number, x, weight.shape[-1] - 1), weight, bias)


def recall(layers: Any, number: int, x: Tensor, kept: int) -> Tensor:
    """Run `reroll.recent` on the state of a cache layer, or from zeros without one."""
    if layers is None:
        return F.pad(x, (kept, 0))
    result: Tensor = layers[number].recall(x, kept)
    return result


class RecentLayer(RecurrentLayer):
    """Keeps the last inputs [batch, channels, kept] of a short convolution."""

    def recall(self, x: Tensor, kept: int) -> Tensor:
        """Return the inputs kept and the new ones [batch, channels, time], and keep the last."""
        time = x.shape[-1]
        self._recorded(time, lambda count: self.recall(x[..., :count], kept))
        old = self.recurrent_states.get(0)
        before = x.new_zeros(*x.shape[:-1], kept) if old is None else old.to(x.dtype)
        whole = torch.cat((before, x), -1)
        # a view would keep the memory of a long prompt allocated
        self._keep((whole[..., time:].clone(),))
        self.has_previous_state = {0: True}
        self._add(time)
        return whole


class StaticRecentLayer(StaticRecurrentLayer, RecentLayer):
    """A `RecentLayer` whose decoding steps are one compiled graph."""

    def recall(self, x: Tensor, kept: int) -> Tensor:
        if not self.is_initialized:
            self._move(x.device)
        return super().recall(x, kept)
