"""Token mixers in the lowered module: in chunks for several tokens, step by step for one.

The state is in transformers' linear-attention cache layer. `RecurrentLayer` extends that layer: it
counts its tokens, can undo tokens, and holds the tokens that a delayed mixer has yet to write.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin, LinearAttentionLayer

from reroll.errors import UsageError
from reroll.kernels import dispatch
from reroll.mixers import Mixer, Tree, make
from reroll.mixers.gates import given_once, varying, with_constant
from reroll.rewrite.ir.ops.recurrence import after_first, scan, without_idle
from reroll.runtime.functions.documents import Documents
from reroll.runtime.functions.masks import visible_tokens
from reroll.runtime.state.ragged import go_back_from_padding
from reroll.runtime.state.states import Kept, Rewinding, last, number_of, padding_again
from reroll.runtime.state.static import InPlace, columns_at, fixed, write


def recur(
    layers: Any,
    number: int,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gates: list[Tensor],
    rule: str,
    options: str,
    padding: Tensor | Documents | None = None,
    delay: int = 0,
    skip: int = 0,
    active: bool = True,
    idle: Tensor | None = None,
    mixer: Mixer | None = None,
) -> Tensor:
    """Run `reroll.recurrence` on the state of a cache layer, or from the zero state without one.

    `padding` covers all tokens, past and new, or holds the documents of packed rows. `mixer` is
    that of `rule` and `options`, if it is known.
    """
    documents = None
    if isinstance(padding, Documents):
        documents, padding = padding.number, None
    if padding is not None and padding.dtype != torch.bool:
        padding = visible_tokens(padding)
    if padding is not None and padding.dim() != 2:
        raise UsageError(
            "a recurrence takes a mask [batch, tokens], not one of queries and keys",
            hint="packed sequences and prefix masks need attention",
        )
    layer = None if layers is None else layers[number]
    if not active:
        if layer is not None:
            layer.count(q.shape[2])
        return v.new_zeros(q.shape[0], q.shape[2], q.shape[1], v.shape[-1])
    mixer = make(rule, options) if mixer is None else mixer
    if layer is not None:
        out: Tensor = layer.update(mixer, q, k, v, gates, padding, delay, skip, idle)
        return out
    if padding is not None:
        padding = padding[:, -q.shape[2] :]

    def run(q: Tensor, k: Tensor, v: Tensor, gates: list[Tensor], writes: Tensor | None) -> Tensor:
        return dispatch.chunk(mixer, q, k, v, gates, padding=writes, segments=documents)[0]

    return scan(run, q, k, v, gates, padding, delay, skip, idle, documents)


@lru_cache(maxsize=256)
def recurrence_of(rule: str, options: str) -> Callable[..., Tensor]:
    """Return `recur` for one mixer, which is then made once and not by what is compiled."""
    run: Callable[..., Tensor] = partial(recur, mixer=make(rule, options))

    def recurrence(*args: Any, **kwargs: Any) -> Tensor:
        return run(*args, **kwargs)

    # the name in the generated code
    recurrence.__name__ = recur.__name__
    return recurrence


class RecurrentLayer(Rewinding, LinearAttentionLayer, CacheLayerMixin):
    """State of a mixer in `recurrent_states`, and the tokens not yet written in `waiting`.

    `waiting` holds the keys, values and gates [batch, kv_heads, time, ...] of the last `delay`
    tokens, and which of them are written [batch, time]. In trips without a mixer, the layer only
    counts.
    """

    state_names = ("recurrent_states", "waiting", "cumulative_length")
    is_compileable = False
    is_croppable = True

    recurrent_states: dict[int, Tensor]
    waiting: list[Tensor] | None

    def __init__(self) -> None:
        CacheLayerMixin.__init__(self)
        LinearAttentionLayer.__init__(self)
        self._clear()

    def _clear(self) -> None:
        self.recurrent_states, self.waiting, self._past = {}, None, None
        self.cumulative_length = 0

    def update(
        self,
        mixer: Mixer,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        gates: list[Tensor],
        padding: Tensor | None,
        delay: int,
        skip: int,
        idle: Tensor | None = None,
    ) -> Tensor:
        """Update the state with new tokens and return their outputs [batch, time, heads, d_v].

        With a `delay`, tokens are written to the state that many tokens later.
        """
        time, tree = q.shape[2], self.tree

        def again(kept: Kept, written: Tensor | None = None) -> None:
            part = padding_again(padding, written, time, kept, self.cumulative_length)
            a, b, c, *rest = [t if given_once(t) else t[:, :, kept] for t in (q, k, v, *gates)]
            now = None if idle is None else idle[:, kept]
            self.update(mixer, a, b, c, rest, part, delay, skip, now)

        self._recorded(time, again)
        # a layer of constant shapes would copy its tensors
        before = () if self.is_compileable or not delay else self.snapshot()
        if tree is not None:
            out = self._read_tree(mixer, q, k, v, gates, padding, delay, skip, idle, tree)
            self._add(time)
            return out
        writes = without_idle(self._writes(k, padding, skip), idle)
        tensors = [k, v, *gates]
        if delay:
            declared = mixer.gates(k.shape[-1], v.shape[-1])
            *late, writes = self._wait([k, v, *varying(declared, gates)], writes, delay)
            tensors = [*late[:2], *with_constant(declared, gates, late[2:])]
        run = partial(dispatch.step if time == 1 else dispatch.chunk, mixer)
        state = tuple(self.recurrent_states.values()) or None
        out, state = run(q, tensors[0], tensors[1], tensors[2:], state, writes)
        self._keep(state)
        self.has_previous_state = dict.fromkeys(self.recurrent_states, True)
        self._add(time)
        if delay:
            go_back_from_padding(self, padding, before, time, again)
        return out

    def _read_tree(
        self,
        mixer: Mixer,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        gates: list[Tensor],
        padding: Tensor | None,
        delay: int,
        skip: int,
        idle: Tensor | None,
        tree: Tree,
    ) -> Tensor:
        """Return what the tokens of a tree read; the state stays that before them."""
        # as tokens of a sequence, one of each depth; none of them is padding
        past = self.cumulative_length
        if padding is not None:
            padding = F.pad(padding[:, :past], (0, tree.height), value=True)
        writes = self._writes(k[:, :, : tree.height], padding, skip)
        if writes is not None:
            writes = writes[:, tree.depth]
        writes = without_idle(writes, idle)
        tensors = [k, v, *gates]
        if delay:
            declared = mixer.gates(k.shape[-1], v.shape[-1])
            *held, marks = self._held([k, v, *varying(declared, gates)], writes, delay)
            at = tree.before(delay, delay)
            late, writes = [t[:, :, at] for t in held], marks[:, at]
            tensors = [*late[:2], *with_constant(declared, gates, late[2:])]
        state = tuple(self.recurrent_states.values()) or None
        return mixer.tree(q, tensors[0], tensors[1], tensors[2:], tree, state, writes)

    def _keep(self, state: tuple[Tensor, ...]) -> None:
        """Store the new state."""
        self.recurrent_states = dict(enumerate(state))

    def _keep_waiting(self, waiting: list[Tensor]) -> None:
        """Store the tokens that are not written yet."""
        self.waiting = waiting

    def _add(self, time: int) -> None:
        """Count new tokens."""
        self.cumulative_length += time
        self.is_initialized = True

    def count(self, time: int) -> None:
        """Count tokens in a trip that has no active mixer."""
        self._recorded(time, lambda kept, written=None: self.count(number_of(kept)))
        self._add(time)

    def _writes(self, k: Tensor, padding: Tensor | None, skip: int) -> Tensor | None:
        """Return which new tokens are written to the state: [batch, time], or None for all."""
        past, time = self.cumulative_length, k.shape[2]
        if padding is None:
            if past >= skip:
                return None
            number = torch.arange(past, past + time, device=k.device)
            return (number >= skip).expand(k.shape[0], -1)
        writes = padding[:, : past + time]
        return (after_first(writes, k, skip) if skip else writes)[:, -time:]

    def _wait(self, tensors: list[Tensor], writes: Tensor | None, delay: int) -> list[Any]:
        """Return the tokens whose delay has passed, as many as are new; queue the new ones."""
        time = tensors[0].shape[2]
        held = self._held(tensors, writes, delay)
        self._keep_waiting([last(t, delay) for t in held[:-1]] + [held[-1][:, -delay:]])
        return [*(t[:, :, :time] for t in held[:-1]), held[-1][:, :time]]

    def _held(self, tensors: list[Tensor], writes: Tensor | None, delay: int) -> list[Tensor]:
        """Return the tokens that wait with the new ones behind them, and which of them write."""
        batch, _, time = tensors[0].shape[:3]
        if writes is None:
            writes = torch.ones(batch, time, dtype=torch.bool, device=tensors[0].device)
        old = self.waiting
        if old is None:
            # before the first token, the queue holds tokens that are never written
            old = [t.new_zeros(*t.shape[:2], delay, *t.shape[3:]) for t in tensors]
            old.append(writes.new_zeros(batch, delay))
        pairs = zip(old[:-1], tensors, strict=True)
        return [*(torch.cat(p, 2) for p in pairs), torch.cat((old[-1], writes), 1)]

    # ---- the interface of cache layers

    def get_seq_length(self) -> int:
        return int(self.cumulative_length)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.cumulative_length + query_length, 0

    def get_max_length(self) -> int:
        return -1

    def reset(self) -> None:
        self._clear()
        self.has_previous_state = {0: False}

    def _each(self, change: Callable[[Tensor], Tensor]) -> None:
        self.recurrent_states = {n: change(x) for n, x in self.recurrent_states.items()}
        if self.waiting is not None:
            self.waiting = [change(x) for x in self.waiting]
        self._past = None


class StaticRecurrentLayer(InPlace, RecurrentLayer):
    """A `RecurrentLayer` whose decoding steps are one compiled graph."""

    def _clear(self) -> None:
        super()._clear()
        self.cumulative_length, self.is_initialized = torch.tensor(0), False

    def _keep(self, state: tuple[Tensor, ...]) -> None:
        kept = self.recurrent_states
        self.recurrent_states = {n: write(kept.get(n), x) for n, x in enumerate(state)}

    def _keep_waiting(self, waiting: list[Tensor]) -> None:
        old = [None] * len(waiting) if self.waiting is None else self.waiting
        self.waiting = [write(*pair) for pair in zip(old, waiting, strict=True)]

    def _add(self, time: int) -> None:
        self.cumulative_length.add_(time)
        self.is_initialized = True

    def _move(self, device: torch.device) -> None:
        """Give the count of tokens memory of its own where the tokens are."""
        self.cumulative_length = fixed(self.cumulative_length.to(device))

    def _writes(self, k: Tensor, padding: Tensor | None, skip: int) -> Tensor | None:
        if not self.is_initialized:
            self._move(k.device)
        at = self.new_positions(k.shape[2])
        if padding is None:
            return (at >= skip).expand(k.shape[0], -1) if skip else None
        return columns_at(after_first(padding, k, skip) if skip else padding, at)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        raise NotImplementedError("no attention reads the state of a recurrence")
