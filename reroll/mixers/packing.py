"""Packed sequences: several in one row.

`apart` runs any form of a mixer on each of them as a row of its own. `in_one_row` passes all of
them as one row to a form that takes their start positions, as kernels do.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from reroll.mixers.gates import given_once

State = tuple[Tensor, ...]


def opens(segments: Tensor) -> Tensor:
    """Mark the first token of each segment, from `segments` [batch, time].

    It is a token whose number differs from that of the token before, or the first of a row.
    """
    first = torch.ones_like(segments, dtype=torch.bool)
    first[:, 1:] = segments[:, 1:] != segments[:, :-1]
    return first


def apart(
    form: Callable[..., Any],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gates: Sequence[Tensor],
    state: State,
    padding: Tensor | None,
    segments: Tensor,
) -> tuple[Tensor, State]:
    """Run `form` on each segment as a row of its own.

    A segment of `segments` [batch, time] continues as long as the number stays the same. The first
    segment of each row continues from `state`, all others from zeros. The returned state is that of
    each row's last segment. The number of segments is read from the tensor, so this does not
    compile into one graph.
    """
    batch, time = segments.shape
    first = opens(segments)
    flat = first.flatten()
    row = flat.cumsum(0) - 1  # [batch * time], the segment of each token
    starts = flat.nonzero()[:, 0]
    position = torch.arange(batch * time, device=flat.device) - starts[row]
    lengths = torch.bincount(row)
    longest = int(lengths.max())

    where = starts[:, None] + torch.arange(longest, device=flat.device)
    inside = torch.arange(longest, device=flat.device) < lengths[:, None]
    where = where.clamp(max=batch * time - 1)

    def rows(x: Tensor) -> Tensor:
        return x.transpose(1, 2).flatten(0, 1)[where].transpose(1, 2)

    mask = inside if padding is None else inside & padding.flatten()[where].bool()
    initial, last = _states(state, first)
    each = [g if given_once(g) else rows(g) for g in gates]
    out, end = form(rows(q), rows(k), rows(v), each, initial, mask)
    return out[row, position].unflatten(0, (batch, time)), tuple(s[last] for s in end)


def in_one_row(form: Callable[[Tensor], Any], segments: Tensor) -> Callable[..., Any]:
    """Make a form for packed `segments` [batch, time] out of `form(starts)`.

    `form(starts)` takes all tokens as one row; `starts`, int32 [sequences + 1], has where each
    sequence begins and where the last one ends. States continue as in `apart`, and the number of
    segments is read from the tensor as there.
    """
    first = opens(segments)
    begins = first.flatten().nonzero()[:, 0]
    starts = torch.cat([begins, begins.new_full((1,), segments.numel())]).int()
    run = form(starts)

    def one(x: Tensor, time: int) -> Tensor:
        """Reshape [batch, ..., time, ...] to [1, ..., batch * time, ...]."""
        return x.movedim(time, 1).flatten(0, 1)[None].movedim(1, time)

    def packed(
        q: Tensor, k: Tensor, v: Tensor, gates: tuple[Tensor, ...], state: State
    ) -> tuple[Tensor, State]:
        initial, last = _states(state, first)
        rest = one(k, 2), one(v, 2), tuple(one(g, 2) for g in gates)
        out, end = run(one(q, 3), *rest, initial)
        out = out[0].unflatten(2, segments.shape).movedim(2, 0)
        return out, tuple(s[last] for s in end)

    return packed


def _states(state: State, first: Tensor) -> tuple[State, Tensor]:
    """Return the initial state of each segment, and the number of each row's last segment."""
    ends = first.sum(1).cumsum(0)
    rows = torch.cat([ends.new_zeros(1), ends[:-1]])
    count = int(ends[-1])
    initial = tuple(s.new_zeros(count, *s.shape[1:]).index_copy(0, rows, s) for s in state)
    return initial, ends - 1
