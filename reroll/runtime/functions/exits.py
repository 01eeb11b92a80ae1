"""Run a loop with exits: tokens that have left run no more trips.

A body with exits is compiled to three functions. `forward` runs the layer. `test` decides which
tokens leave, and is called only after trips at which tokens can leave. `fill` computes only the
keys and values, or the state update, of a layer that a token skips.

While one token per row is decoded, rows that have left are taken out of the batch, and `forward`
runs for the others only. In longer inputs every trip runs for all tokens, and tokens that have left
keep their hidden state; the result is the same.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicLayer

from reroll.rewrite.ir.ops import ABSENT
from reroll.runtime.state.states import can_split, join_rows, rows_of


@dataclass(frozen=True)
class LoopExits:
    """Properties of a loop's exits that running it depends on.

    `left_position` is the position of the carried flag of tokens that have left. `holds` says that
    the first carried value stays unchanged for these tokens, and `compact` that their rows can be
    dropped. `marks_absent` says that skipped layers only need to know which tokens are absent.
    `caches` counts the layers with state in a trip. `test_has_state` says that the exit test needs
    the cache layers.
    """

    left_position: int
    thresholds: tuple[float, ...]
    holds: bool
    compact: bool
    marks_absent: bool
    caches: int
    test_has_state: bool


def can_compact(exits: LoopExits, carry: tuple[Any, ...], layers: Sequence[Any]) -> bool:
    """Whether rows that have left can be taken out of the batch in this forward."""
    return (
        exits.compact
        and carry[0].shape[1] == 1
        and not torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
        and all(
            can_split(layer) or (isinstance(layer, DynamicLayer) and not layer.is_sliding)
            for layer in layers
        )
    )


def run_compacted(
    trip: nn.Module,
    exits: LoopExits,
    carry: tuple[Tensor, ...],
    values: Sequence[Any],
    layers: Sequence[Any],
) -> tuple[Tensor, ...]:
    """Run one trip for the rows that have not left, and only the cache updates for the others."""
    has_left = carry[exits.left_position][:, 0]
    batch = has_left.shape[0]
    left = has_left.nonzero()[:, 0]
    if len(left) == 0:
        return trip(*carry, *values, past_key_values=layers)  # type: ignore[no-any-return]
    # the exit test's own state follows the layers of the body, and can be split
    plain = [layer for layer in layers if not can_split(layer)]
    marks_absent = exits.marks_absent and len(plain) == exits.caches
    marks_absent = marks_absent and all(layer.get_seq_length() for layer in plain)
    if len(left) == batch:
        if marks_absent:
            for layer in plain:
                layer.update(*_absent(layer, batch))
        else:
            trip(*carry, *values, past_key_values=layers, function="fill")
        return carry
    live = (~has_left).nonzero()[:, 0]
    shared = [
        (_Parts if can_split(layer) else _Shared)(layer, batch, left, live) for layer in layers
    ]

    def rows(items: Sequence[Any], index: Tensor) -> list[Any]:
        return [
            item[index] if isinstance(item, Tensor) and item.shape[:1] == (batch,) else item
            for item in items
        ]

    if marks_absent:
        for each in shared:
            each.leave_out()
    else:
        filling = [each.filling() for each in shared]
        trip(*rows(carry, left), *rows(values, left), past_key_values=filling, function="fill")
    new = trip(
        *rows(carry, live), *rows(values, live), past_key_values=[s.running() for s in shared]
    )
    for each in shared:
        each.finish()
    merged = []
    for old, part in zip(carry, new, strict=True):
        whole = old.clone()
        whole[live] = part
        merged.append(whole)
    return tuple(merged)


def _absent(layer: Any, rows: int) -> tuple[Tensor, Tensor]:
    """Return the key and value of an absent token for each row.

    No query attends to such a key.
    """
    k, v = (t.new_zeros(rows, t.shape[1], 1, t.shape[3]) for t in (layer.keys, layer.values))
    k[..., -1] = ABSENT
    return k, v


class _Parts:
    """A layer that replaces its tensors, split by rows into those that have left and the others."""

    def __init__(self, layer: Any, batch: int, left: Tensor, live: Tensor) -> None:
        self.layer, self.batch = layer, batch
        self.parts = [(rows, rows_of(layer, rows, batch)) for rows in (left, live)]

    def leave_out(self) -> None:
        """Do nothing: only the state of the exit test gets here, which `fill` does not update."""

    def filling(self) -> Any:
        return self.parts[0][1]

    def running(self) -> Any:
        return self.parts[1][1]

    def finish(self) -> None:
        join_rows(self.layer, self.parts, self.batch)


class _Shared:
    """A cache layer that is updated by rows that have left first, then by the others.

    Both parts are written in one update of the whole batch. What the first one gets is not read.
    """

    def __init__(self, layer: Any, batch: int, left: Tensor, live: Tensor) -> None:
        self.layer, self.batch, self.left, self.live = layer, batch, left, live
        self.is_compileable = False
        self.left_states: tuple[Tensor, Tensor] | None = None

    def filling(self) -> _Shared:
        return self

    def running(self) -> _Shared:
        assert self.left_states is not None
        return self

    def leave_out(self) -> None:
        """Mark the tokens of rows that have left as absent."""
        self.left_states = _absent(self.layer, len(self.left))

    def finish(self) -> None:
        """Do nothing: `update` has already written to the shared layer."""

    def update(self, k: Tensor, v: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
        if self.left_states is None:
            self.left_states = k, v
            return k, v
        whole = []
        for left, live in zip(self.left_states, (k, v), strict=True):
            merged = live.new_empty(self.batch, *live.shape[1:])
            merged[self.left], merged[self.live] = left, live
            whole.append(merged)
        keys, values = self.layer.update(*whole, **options)
        return keys[self.live], values[self.live]

    def get_mask_sizes(self, length: int) -> Any:
        return self.layer.get_mask_sizes(length)

    def get_seq_length(self) -> Any:
        return self.layer.get_seq_length()


@dataclass(frozen=True)
class DepthReport:
    """Histogram of the number of trips per token."""

    histogram: Mapping[int, int]

    @classmethod
    def of(cls, depths: Iterable[int]) -> DepthReport:
        """Count tokens by their numbers of trips."""
        return cls(dict(sorted(Counter(depths).items())))

    @property
    def tokens(self) -> int:
        return sum(self.histogram.values())

    @property
    def mean(self) -> float:
        """Mean number of trips per token; 0 without tokens."""
        total = sum(depth * count for depth, count in self.histogram.items())
        return total / max(self.tokens, 1)

    def as_data(self) -> dict[str, Any]:
        """Return JSON data: the mean, and the number of tokens by number of trips."""
        return {"mean": self.mean, "histogram": dict(self.histogram)}

    def __str__(self) -> str:
        counts = ", ".join(f"{depth}: {count}" for depth, count in self.histogram.items())
        return f"{self.mean:.4g} trips per token ({counts})"


def depth_report(depths: Sequence[Tensor]) -> DepthReport:
    """Count tokens by trips from the `depth` outputs of several forwards."""
    return DepthReport.of(depth for each in depths for depth in each.flatten().tolist())
