"""State of constant size that can be rewound: snapshots of a cache, and layers that undo tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import copy
from typing import Any, ClassVar, Protocol, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.cache_utils import DynamicSlidingWindowLayer, StaticLayer

from reroll.errors import UsageError
from reroll.mixers.trees import Tree

# which of some new tokens are kept: a part of them, or their numbers [n] in a new order
Kept: TypeAlias = slice | Tensor


class Again(Protocol):
    """Adds the kept ones of some tokens to a state once more, as if no others had come.

    `written` [batch, kept] is False at tokens that a row does not have; None for all.
    """

    def __call__(self, kept: Kept, written: Tensor | None = None, /) -> Any:
        """Add the tokens."""


class Rewinding:
    """A cache layer that replaces its tensors at every update and never writes into them.

    `state_names` are the attributes that hold its state, so a snapshot is a few references. While
    `record_past` is on (transformers' `activate_past_recording`), `crop` can undo tokens. It
    restores the state before an update and repeats that update with fewer tokens. So does `keep`,
    with any of them.

    While `tree` is set, new tokens are nodes of a tree: each sees its ancestors only. No one state
    is the one after them, so `keep` is to follow.
    """

    state_names: ClassVar[tuple[str, ...]]
    record_past: bool = False
    is_compileable = False
    is_croppable = True
    tree: Tree | None = None
    # while rows go back from padding behind them
    goes_back: bool = False
    _past: list[tuple[tuple[Any, ...], int, Again]] | None = None

    def snapshot(self) -> tuple[Any, ...]:
        """Return the present state, for `restore`."""
        return tuple(getattr(self, name) for name in self.state_names)

    def restore(self, saved: tuple[Any, ...]) -> None:
        """Go back to a snapshot."""
        for name, value in zip(self.state_names, saved, strict=True):
            setattr(self, name, value)
        self._past = None

    def activate_past_recording(self) -> None:
        self.record_past = True

    def _recorded(self, length: int, again: Again) -> None:
        """Record the present state before `length` tokens are added, and how to add them again."""
        if self.record_past or self.tree is not None:
            self._past = [*(self._past or ()), (self.snapshot(), length, again)]

    def _each(self, change: Callable[[Tensor], Tensor]) -> None:
        """Replace every tensor of the state by `change` of it.

        `change` selects, repeats or moves rows of the batch, which are the first dimension.
        """
        raise NotImplementedError

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._each(lambda x: x.index_select(0, beam_idx.to(x.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._each(lambda x: x.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        self._each(lambda x: x[indices])

    def crop(self, tokens_to_remove: int) -> None:
        """Undo the last -`tokens_to_remove` tokens, and drop the recorded past.

        Raises UsageError for a positive number, and if that many tokens were not recorded.
        """
        if tokens_to_remove > 0:
            raise UsageError("crop takes the tokens to remove as a negative number")
        if self.tree is not None:
            raise UsageError(
                "of a tree of tokens, those of one path are kept",
                where=type(self).__name__,
                hint="call reroll.runtime.state.growing.keep",
            )
        remove, past = -tokens_to_remove, self._past or []
        if remove > sum(length for _, length, _ in past):
            raise UsageError(
                f"{remove} tokens of a state of constant size cannot be undone",
                where=type(self).__name__,
                hint="call activate_past_recording before the tokens come, or take a snapshot",
            )
        while remove:
            saved, length, again = past.pop()
            self.restore(saved)
            if remove < length:
                self._repeat(again, slice(0, length - remove))
            remove = max(remove - length, 0)
        self._past = None

    def keep(self, kept: Tensor, of: int, written: Tensor | None = None) -> None:
        """Undo the last `of` tokens, an update, but those numbered `kept` [n], in this order.

        What was recorded is dropped. `written` [batch, n] is False where a row does not have a
        token; such tokens leave the state alone. Raises UsageError if the update was not recorded.
        """
        saved, length, again = self._past[-1] if self._past else ((), -1, None)
        if again is None or length != of:
            raise UsageError(
                f"the last {of} tokens were not recorded as one update",
                where=type(self).__name__,
                hint="call activate_past_recording before the tokens come, and keep all of them",
            )
        self.tree = None
        self.restore(saved)
        if len(kept):
            self._repeat(again, kept, written)
        self._past = None

    def _repeat(self, again: Again, kept: Kept, written: Tensor | None = None) -> None:
        recording, self.record_past = self.record_past, False
        again(kept, written)
        self.record_past = recording


def number_of(kept: Kept) -> int:
    """Count kept tokens; a slice has a start and an end."""
    return len(kept) if isinstance(kept, Tensor) else int(kept.stop - kept.start)


def padding_again(
    padding: Tensor | None, written: Tensor | None, length: int, kept: Kept, past: int
) -> Tensor | None:
    """Return the padding [batch, past + kept] of an update that is repeated with fewer tokens.

    `padding` [batch, past + length] is that of the update, and `past` the tokens before it.
    """
    if padding is None:
        return None if written is None else F.pad(written, (past, 0), value=True)
    new = padding[:, past : past + length][:, kept]
    return torch.cat((padding[:, :past], new if written is None else new & written), 1)


def last(tensor: Tensor, count: int) -> Tensor:
    """Return the last tokens of [batch, heads, time, ...]."""
    start = max(tensor.shape[2] - count, 0)
    part = tensor[:, :, start:]
    # a view would keep the memory of a long prompt allocated
    return part.clone() if start > part.shape[2] else part


# ---- rows of a batch

# the state attributes of transformers' sliding layer, which replaces its tensors
_SLIDING = ("keys", "values", "cumulative_length", "is_initialized")
_FLAGS = ("has_previous_state", "is_initialized")


def can_split(layer: Any) -> bool:
    """Whether a layer replaces its tensors at every update, so that it can be split by rows."""
    kinds = (Rewinding, DynamicSlidingWindowLayer)
    replaces = isinstance(layer, kinds) and not layer.is_compileable
    return replaces and not getattr(layer, "record_past", False)


def rows_of(layer: Any, rows: Tensor, batch: int) -> Any:
    """Copy a layer with the state of some rows of a batch."""
    part = copy(layer)
    for name in _names(layer):
        value = getattr(layer, name)
        setattr(part, name, _mapped(lambda x: x[rows] if x.shape[:1] == (batch,) else x, [value]))
    return part


def join_rows(layer: Any, parts: Sequence[tuple[Tensor, Any]], batch: int) -> None:
    """Set a layer's state from layers that hold some rows each, and together the whole batch."""

    def joined(*tensors: Tensor) -> Tensor:
        whole = tensors[0].new_empty(batch, *tensors[0].shape[1:])
        for (rows, _), tensor in zip(parts, tensors, strict=True):
            if tensor.shape[:1] != rows.shape:
                return tensor
            whole[rows] = tensor
        return whole

    for name in _names(layer):
        setattr(layer, name, _mapped(joined, [getattr(part, name) for _, part in parts]))


def state_attributes(layer: Any) -> dict[str, Any]:
    """Return the attributes that hold a layer's state, with their values."""
    return {name: getattr(layer, name) for name in _names(layer)}


def _names(layer: Any) -> list[str]:
    names = dict.fromkeys((*getattr(layer, "state_names", _SLIDING), *_FLAGS))
    return [name for name in names if hasattr(layer, name)]


def _mapped(function: Callable[..., Tensor], values: Sequence[Any]) -> Any:
    """Apply a function to the tensors of values of one structure; join booleans by `all`."""
    first = values[0]
    if isinstance(first, Tensor):
        return function(*values)
    if isinstance(first, list):
        return [_mapped(function, each) for each in zip(*values, strict=True)]
    if isinstance(first, dict):
        return {key: _mapped(function, [value[key] for value in values]) for key in first}
    return all(values) if isinstance(first, bool) else first


def snapshot(cache: Any) -> list[Any]:
    """Return the present state of a transformers cache that this model has filled."""
    return [_state(layer) for layer in cache.layers]


def restore(cache: Any, saved: list[Any]) -> None:
    """Return a cache to the state of a snapshot, any number of tokens later."""
    for layer, state in zip(cache.layers, saved, strict=True):
        if isinstance(layer, Rewinding):
            layer.restore(state)
        elif isinstance(layer, StaticLayer):
            _restore_static(layer, state)
        elif isinstance(state, int):
            layer.crop(state - layer.get_seq_length())
        else:
            layer.keys, layer.values, layer.cumulative_length = state


def _state(layer: Any) -> Any:
    if isinstance(layer, Rewinding):
        return layer.snapshot()
    if isinstance(layer, StaticLayer):
        length = layer.cumulative_length.clone()
        if not layer.is_sliding or not layer.is_initialized:
            return (length,)
        return length, layer.cumulative_length_int, layer.keys.clone(), layer.values.clone()
    if isinstance(layer, DynamicSlidingWindowLayer):
        return layer.keys, layer.values, layer.cumulative_length
    return layer.get_seq_length()


def _restore_static(layer: Any, state: tuple[Any, ...]) -> None:
    """Write a state back to a layer of transformers that is written in place.

    Of a layer that holds all tokens, the number of them is enough: later ones are overwritten.
    """
    length, *window = state
    layer.cumulative_length.copy_(length)
    if window:
        layer.cumulative_length_int = window[0]
        layer.keys.copy_(window[1])
        layer.values.copy_(window[2])
    elif layer.is_sliding:
        layer.cumulative_length_int = int(length)
