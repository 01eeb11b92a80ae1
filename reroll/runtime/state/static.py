"""What cache layers need so that all decoding steps are one compiled graph.

Their tensors keep their shapes and their memory, and are written to in place; the number of tokens
is a tensor. A step then depends on no number that Python knows.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from reroll.runtime.state.states import Kept, Rewinding, padding_again
from reroll.runtime.state.windows import WindowLayer, taken


def fixed(tensor: Tensor) -> Tensor:
    """Return a tensor of its own memory, which compiled graphs may write to."""
    tensor = tensor.clone(memory_format=torch.contiguous_format)
    if not torch.compiler.is_compiling():
        # as transformers' static layers do, for CUDA graphs
        torch._dynamo.mark_static_address(tensor)
    return tensor


def write(old: Tensor | None, new: Tensor) -> Tensor:
    """Write new values to a tensor that is kept; the first ones get memory of their own."""
    return fixed(new) if old is None else old.copy_(new)


class InPlace(Rewinding):
    """A `Rewinding` layer whose tensors are written to: its snapshots are copies."""

    is_compileable = True
    is_initialized: bool
    cumulative_length: Any

    def snapshot(self) -> tuple[Any, ...]:
        return tuple(map(_copied, super().snapshot()))

    def restore(self, saved: tuple[Any, ...]) -> None:
        super().restore(tuple(map(_copied, saved)))

    def get_seq_length(self) -> Any:
        return self.cumulative_length if self.is_initialized else 0

    def new_positions(self, length: int) -> Tensor:
        """Return the positions [length] of tokens that are about to be added."""
        count: Tensor = self.cumulative_length
        return torch.arange(length, device=count.device) + count


def _copied(value: Any) -> Any:
    if isinstance(value, Tensor):
        return fixed(value)
    if isinstance(value, list):
        return [_copied(each) for each in value]
    return {k: _copied(v) for k, v in value.items()} if isinstance(value, dict) else value


def columns_at(padding: Tensor, at: Tensor) -> Tensor:
    """Return booleans [batch, n]: the padding at positions `at` [n]; False outside of it."""
    last = padding.shape[1] - 1
    inside = (at >= 0) & (at <= last)
    return padding.bool()[:, at.clamp(0, last)] & inside


class StaticWindowLayer(InPlace, WindowLayer):
    """A `WindowLayer` of constant shapes.

    Behind the first update, an update returns `prefix` first tokens, `window - 1` tokens before the
    new ones, and the new ones. The mask hides what there is not, and first tokens that are still
    among the others.
    """

    def __init__(self, window: int, prefix: int = 0) -> None:
        super().__init__(window, prefix)
        self.cumulative_length = torch.tensor(0)
        # the position of the first column behind the kept ones in the last update
        self.begin: Tensor | None = None

    @property
    def kept(self) -> int:
        return self.prefix if self.is_initialized else 0

    def update(
        self,
        key_states: Tensor,
        value_states: Tensor,
        *args: Any,
        padding: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor]:
        length, held = key_states.shape[2], max(self.window - 1, 0)

        def again(kept: Kept, written: Tensor | None = None) -> None:
            past = int(self.cumulative_length)
            part = padding_again(padding, written, length, kept, past)
            self.update(key_states[:, :, kept], value_states[:, :, kept], padding=part)

        self._recorded(length, again)
        self.shown, first_time = self.kept, not self.is_initialized
        if first_time:
            self._allocate(key_states, value_states, held)
        self.begin = self.cumulative_length - held
        shown = []
        tensors = (self.keys, self.first_keys), (self.values, self.first_values)
        new_tokens = key_states, value_states
        here = self._here(padding, length, key_states.shape[0]) if self.prefix else None
        for (old, first), new in zip(tensors, new_tokens, strict=True):
            assert old is not None
            columns = torch.cat((old, new), 2)
            if first_time:
                shown.append(new)
            else:
                shown.append(columns if first is None else torch.cat((first, columns), 2))
            if held:
                old.copy_(columns[:, :, -held:])
            if first is not None and here is not None:
                first.copy_(taken(first, new, here))
        self.cumulative_length.add_(length)
        keys, values = shown
        return keys, values

    def _allocate(self, k: Tensor, v: Tensor, held: int) -> None:
        self.lazy_initialization(k, v)
        self.keys, self.values = (
            fixed(t.new_zeros(*t.shape[:2], held, t.shape[3])) for t in (k, v)
        )
        if self.prefix:
            self.first_keys, self.first_values = (
                fixed(t.new_zeros(*t.shape[:2], self.prefix, t.shape[3])) for t in (k, v)
            )
        self.cumulative_length = fixed(self.cumulative_length.to(k.device))

    def _here(self, padding: Tensor | None, length: int, batch: int) -> Tensor:
        """Return which new tokens are which of the first ones: [batch, prefix, length]."""
        at = self.new_positions(length)
        if padding is None:
            number = at.expand(batch, -1)
        else:
            before = padding.bool().long().cumsum(-1)[:, at.clamp(max=padding.shape[1] - 1)] - 1
            number = torch.where(columns_at(padding, at), before, -1)
        wanted = torch.arange(self.prefix, device=at.device)
        return number[:, None, :] == wanted[:, None]

    def get_mask_sizes(self, query_length: int) -> tuple[Any, Any]:
        """Return the next update's number of columns, and the first position after `kept`."""
        if not self.is_initialized:
            return query_length, 0
        held = max(self.window - 1, 0)
        return self.prefix + held + query_length, self.cumulative_length - held

    def reset(self) -> None:
        self.is_initialized, self._past = False, None
        self.keys = self.values = self.first_keys = self.first_values = None
        self.cumulative_length = torch.zeros_like(self.cumulative_length)
