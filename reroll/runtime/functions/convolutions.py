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
from reroll.runtime.state.states import Kept


def convolve(
    layers: Any, number: int, x: Tensor, weight: Tensor, bias: Tensor | None = None
) -> Tensor:
    """Run `reroll.short_convolution` on the state of a cache layer, or from zeros without one."""
    size = weight.shape[-1]
    tree = None if layers is None else layers[number].tree
    whole = recall(layers, number, x, size - 1)
    if tree is None:
        return convolved(whole, weight, bias)
    # of each token, the last inputs of its path, one token behind the other
    at = torch.stack([tree.before(size - 1 - j, size - 1) for j in range(size)], 1)
    strips = whole[..., at.flatten()]
    return F.conv1d(strips, weight.unsqueeze(1), bias, stride=size, groups=weight.shape[0])


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

        def again(which: Kept, written: Tensor | None = None) -> None:
            whole = self.recall(x[..., which], kept)
            if written is not None:
                # what a row does not have goes to the front, in place of its oldest inputs
                there = F.pad(written, (kept, 0), value=True).long()
                order = there.argsort(dim=-1, stable=True)[:, None, -kept:]
                self._keep((whole.gather(-1, order.expand(-1, whole.shape[1], -1)),))

        self._recorded(time, again)
        old = self.recurrent_states.get(0)
        before = x.new_zeros(*x.shape[:-1], kept) if old is None else old.to(x.dtype)
        whole = torch.cat((before, x), -1)
        if self.tree is None:
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
