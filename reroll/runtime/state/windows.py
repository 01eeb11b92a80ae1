"""A cache layer of constant size for attention over a window and the first tokens."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicSlidingWindowLayer

from reroll.runtime.functions.masks import visible_tokens
from reroll.runtime.state.ragged import go_back_from_padding
from reroll.runtime.state.states import Kept, Rewinding, last, padding_again


class WindowLayer(Rewinding, DynamicSlidingWindowLayer):
    """Keys and values of the last tokens, and of the first `prefix` tokens that are not padding.

    `keys` and `values` [batch, kv_heads, time, head_dim] hold the last `window - 1` tokens, as
    transformers' sliding layer does. The first tokens are in `first_keys` and `first_values`. Once
    the window has moved past the start, `update` returns these in front, as `kept` columns. Keys
    keep the positions with which they were computed.
    """

    state_names = (
        "keys", "values", "first_keys", "first_values", "filled", "cumulative_length",
        "is_initialized",
    )  # fmt: skip

    keys: Tensor | None
    values: Tensor | None
    first_keys: Tensor | None = None
    first_values: Tensor | None = None
    # whether all `prefix` first tokens of every row are stored
    filled = False
    # the value of `kept` at the last update
    shown = 0

    def __init__(self, window: int, prefix: int = 0) -> None:
        super().__init__(max(window, 1))
        self.window, self.prefix = window, prefix
        self.filled = not prefix

    @property
    def kept(self) -> int:
        """Number of leading columns in the next update that hold tokens from before the window."""
        return self.prefix if self.cumulative_length > self._held() else 0

    def update(
        self,
        key_states: Tensor,
        value_states: Tensor,
        *args: Any,
        padding: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor]:
        """Store new keys and values, and return all that the new tokens may see.

        These are the kept first tokens, past tokens and the new ones, in this order. `padding`
        [batch, tokens], over past and new tokens, is False at padding.
        """
        length, past = key_states.shape[2], self.cumulative_length

        def again(kept: Kept, written: Tensor | None = None) -> None:
            part = padding_again(padding, written, length, kept, past)
            self.update(key_states[:, :, kept], value_states[:, :, kept], padding=part)

        if padding is not None and padding.dtype != torch.bool:
            padding = visible_tokens(padding)
        self._recorded(length, again)
        before = () if self.is_compileable else self.snapshot()
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        assert self.keys is not None
        assert self.values is not None
        keys, values = _join(self.keys, key_states), _join(self.values, value_states)
        shown, self.shown = (keys, values), self.kept
        if self.shown:
            assert self.first_keys is not None
            assert self.first_values is not None
            shown = _join(self.first_keys, keys), _join(self.first_values, values)
        if self.tree is not None:
            # which of them stay is told to `keep`
            self.cumulative_length += length
            return shown
        if not self.filled:
            self._keep_first(key_states, value_states, padding)
        self.cumulative_length += length
        count = max(self.window - 1, 0)
        self.keys, self.values = last(keys, count), last(values, count)
        go_back_from_padding(self, padding, before, length, again)
        return shown

    def _keep_first(self, keys: Tensor, values: Tensor, padding: Tensor | None) -> None:
        """Store those of the new tokens that are among the first of their rows."""
        batch, _, length, _ = keys.shape
        past, wanted = self.cumulative_length, torch.arange(self.prefix, device=keys.device)
        if padding is None:
            number = torch.arange(past, past + length, device=keys.device).expand(batch, -1)
            self.filled = past + length >= self.prefix
        else:
            visible = padding[:, : past + length]
            number = torch.where(visible, visible.long().cumsum(-1) - 1, -1)[:, -length:]
            self.filled = bool((visible.sum(-1) >= self.prefix).all())
        here = number[:, None, :] == wanted[:, None]  # [batch, prefix, time]
        self.first_keys = taken(self.first_keys, keys, here)
        self.first_values = taken(self.first_values, values, here)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return the next update's number of columns, and the first position after `kept`."""
        held = self._held()
        return self.kept + held + query_length, self.cumulative_length - held

    def get_max_length(self) -> int:
        return self.window + self.prefix

    def offload(self) -> None:
        self._each(lambda x: x.to("cpu", non_blocking=True))

    def prefetch(self) -> None:
        if self.is_initialized:
            self._each(lambda x: x.to(self.device, non_blocking=True))

    def reset(self) -> None:
        super().reset()
        self.first_keys = self.first_values = None
        self.filled, self._past = not self.prefix, None

    def _held(self) -> int:
        return 0 if self.keys is None or not self.keys.numel() else self.keys.shape[2]

    def _each(self, change: Callable[[Tensor], Tensor]) -> None:
        for name in ("keys", "values", "first_keys", "first_values"):
            tensor = getattr(self, name)
            if tensor is not None and tensor.numel():
                setattr(self, name, change(tensor))
        self._past = None


def _join(old: Tensor, new: Tensor) -> Tensor:
    return torch.cat((old, new), 2) if old.numel() else new


def taken(old: Tensor | None, new: Tensor, here: Tensor) -> Tensor:
    """Take the tokens of `new` that `here` marks for each column, else keep those of `old`.

    `new` is [batch, heads, time, size], `here` [batch, n, time]. Returns [batch, heads, n, size].
    """
    index = here.long().argmax(-1)[:, None, :, None]
    selected = new.gather(2, index.expand(-1, new.shape[1], -1, new.shape[3]))
    if old is None:
        old = torch.zeros_like(selected)
    return torch.where(here.any(-1)[:, None, :, None], selected, old)
