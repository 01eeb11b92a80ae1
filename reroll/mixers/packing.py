"""Packed sequences: several in one row, taken apart into rows of their own and put back."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor


def apart(
    form: Callable[..., Any],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gates: Sequence[Tensor],
    state: tuple[Tensor, ...],
    padding: Tensor | None,
    segments: Tensor,
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Run `form` on each segment as a row of its own.

    `segments` [batch, time]: a segment goes on as long as the number stays the same. The first
    segment of each row goes on from `state`, every other one from zeros; the state that comes back
    is that of each row's last segment. The number of segments is read from the tensor, so this
    does not compile into one graph.
    """
    batch, time = segments.shape
    first = torch.ones_like(segments, dtype=torch.bool)
    first[:, 1:] = segments[:, 1:] != segments[:, :-1]
    flat = first.flatten()
    row = flat.cumsum(0) - 1  # [batch * time], the segment that a token is in
    starts = flat.nonzero()[:, 0]
    place = torch.arange(batch * time, device=flat.device) - starts[row]
    lengths = torch.bincount(row)
    longest = int(lengths.max())

    where = starts[:, None] + torch.arange(longest, device=flat.device)
    inside = torch.arange(longest, device=flat.device) < lengths[:, None]
    where = where.clamp(max=batch * time - 1)

    def rows(x: Tensor) -> Tensor:
        return x.transpose(1, 2).flatten(0, 1)[where].transpose(1, 2)

    seen = inside if padding is None else inside & padding.flatten()[where].bool()
    heads = first.sum(1).cumsum(0)  # one past each row's last segment
    opens = torch.cat([heads.new_zeros(1), heads[:-1]])
    begin = tuple(s.new_zeros(len(starts), *s.shape[1:]).index_copy(0, opens, s) for s in state)
    out, end = form(rows(q), rows(k), rows(v), [rows(g) for g in gates], begin, seen)
    return out[row, place].unflatten(0, (batch, time)), tuple(s[heads - 1] for s in end)
