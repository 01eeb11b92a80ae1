"""A cache layer that grows in place.

transformers' dynamic layer copies all keys and values so far at every token. This one allocates
spare room behind them and writes new ones there, so that a token costs only its own copy.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from reroll.errors import UsageError
from reroll.mixers.trees import Tree
from reroll.runtime.state.states import Rewinding, last

# spare room is a quarter of the tokens, and at least this many
_ROOM = 64


class GrowingLayer(DynamicLayer):
    """A dynamic layer whose `keys` and `values` are the filled part of larger tensors.

    If anything replaces `keys` and `values` (cropping, reordering beams, moving to another device),
    the next update allocates new tensors. So does a copy of the layer. Where gradients flow, and in
    compiled code, it does what `DynamicLayer` does.
    """

    keys: Tensor | None
    values: Tensor | None
    tree: Tree | None = None
    _whole: tuple[Tensor, Tensor] | None = None
    _filled: tuple[Tensor, Tensor] | None = None

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling() or key_states.requires_grad or value_states.requires_grad:
            return super().update(key_states, value_states, *args, **kwargs)
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        assert self.keys is not None
        assert self.values is not None
        past = self.keys.shape[-2] if self.keys.numel() else 0
        total = past + key_states.shape[-2]
        if not self._has_room(total):
            self._whole = (
                _enlarged(self.keys, past, key_states, total),
                _enlarged(self.values, past, value_states, total),
            )
        assert self._whole is not None
        for whole, new in zip(self._whole, (key_states, value_states), strict=True):
            whole[:, :, past:total] = new
        self.keys, self.values = (whole[:, :, :total] for whole in self._whole)
        self._filled = self.keys, self.values
        return self.keys, self.values

    def take_back(self, count: int) -> None:
        """Remove the last tokens, as `crop` does; later ones are written in their place.

        So what was taken out of the layer before changes with them.
        """
        own = self._filled is not None and self.keys is self._filled[0]
        self.crop(-count)
        if own:
            self._filled = self.keys, self.values  # type: ignore[assignment]

    def keep(self, kept: Tensor, of: int) -> None:
        """Remove the last `of` tokens but those numbered `kept` [n], in this order, in place."""
        keys, values = self.keys, self.values
        assert keys is not None
        assert values is not None
        past = keys.shape[2] - of
        moved = tuple(x[:, :, past + kept] for x in (keys, values))
        self.take_back(of - len(kept))
        if self._has_room(past + len(kept)):
            for x, new in zip((self.keys, self.values), moved, strict=True):
                x[:, :, past:] = new  # type: ignore[index]
        else:
            _set_behind(self, past, moved)

    def write_behind(self, other: GrowingLayer) -> None:
        """Write new tokens into the spare room of another layer, which does not show them."""
        if other._filled is not None and other.keys is other._filled[0]:
            self._whole, self._filled = other._whole, (self.keys, self.values)  # type: ignore[assignment]

    def _has_room(self, total: int) -> bool:
        """Whether keys and values are in the layer's own tensors, with room for `total` tokens."""
        if self._whole is None or self._filled is None or self._whole[0].shape[2] < total:
            return False
        if self.keys is not self._filled[0] or self.values is not self._filled[1]:
            return False
        # inference tensors cannot be written to outside of inference mode
        return torch.is_inference_mode_enabled() or not self._whole[0].is_inference()

    def reset(self) -> None:
        self._whole = self._filled = None
        super().reset()

    def __copy__(self) -> GrowingLayer:
        new = type(self)()
        new.__dict__.update(self.__dict__, _whole=None, _filled=None)
        return new


def take_back(cache: Any, count: int) -> None:
    """Remove the last tokens of a cache whose tensors nobody else holds."""
    for layer in cache.layers:
        if isinstance(layer, GrowingLayer):
            layer.take_back(count)
        else:
            layer.crop(-count)


def keep(cache: Any, kept: Tensor, of: int, written: Tensor | None = None) -> None:
    """Keep of the last `of` tokens of a cache, one update, those numbered `kept` [n], in order.

    They are then all that has come: behind a tree of tokens, those of the path that is accepted.
    `written` [batch, n] is False where a row does not have a token, which its states leave out; the
    padding mask of later tokens says so, too. Recorded past is dropped, as by `take_back`.
    """
    for layer in cache.layers:
        layer.tree = None
        if not layer.is_initialized:
            continue
        if isinstance(layer, Rewinding):
            layer.keep(kept, of, written)
        elif isinstance(layer, GrowingLayer):
            layer.keep(kept, of)
        elif isinstance(layer, DynamicSlidingWindowLayer):
            _keep_in_window(layer, kept, of)
        else:
            past = layer.keys.shape[2] - of
            _set_behind(
                layer, past, tuple(x[:, :, past + kept] for x in (layer.keys, layer.values))
            )


def _set_behind(layer: Any, past: int, new: tuple[Tensor, ...]) -> None:
    """Set the keys and values of a layer from its first `past` tokens and new ones."""
    layer.keys, layer.values = (
        torch.cat((old[:, :, :past], x), 2)
        for old, x in zip((layer.keys, layer.values), new, strict=True)
    )


def _keep_in_window(layer: DynamicSlidingWindowLayer, kept: Tensor, of: int) -> None:
    """Run `keep` on transformers' sliding layer, which holds more tokens while it records."""
    assert layer.keys is not None
    assert layer.values is not None
    past, length = layer.keys.shape[2] - of, layer.cumulative_length - of
    wanted = layer.sliding_window - 1
    if not layer.record_past or past < min(length, wanted):
        raise UsageError(
            f"{of} tokens of a window of {layer.sliding_window} cannot be undone",
            where=type(layer).__name__,
            hint="call activate_past_recording before the tokens come",
        )
    _set_behind(layer, past, tuple(x[:, :, past + kept] for x in (layer.keys, layer.values)))
    layer.keys, layer.values = last(layer.keys, wanted), last(layer.values, wanted)
    layer.cumulative_length = length + len(kept)


def _enlarged(old: Tensor, past: int, new: Tensor, total: int) -> Tensor:
    """Allocate a tensor with spare room, and copy the past into it."""
    room = total + max(total // 4, _ROOM)
    whole = new.new_empty(*new.shape[:2], room, new.shape[3])
    if past:
        whole[:, :, :past] = old
    return whole
