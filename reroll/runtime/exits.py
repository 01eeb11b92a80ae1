"""Running a loop with exits: tokens that are done make no more trips.

A body with exits is compiled to three functions: `forward` runs the layer, `test` decides who is
done, and is called only after trips where somebody may leave, and `fill` computes keys and values
alone, for the caches of layers that a token skips.

While one token per row is decoded, rows that are done are taken out of the batch: `forward` runs
for the others only. In longer inputs every trip runs for all tokens, and those that are done keep
their hidden state, which gives the same.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from transformers.cache_utils import DynamicLayer

from reroll.rewrite.program import Loop
from reroll.rewrite.rolling.exits import HOLD, Exits
from reroll.runtime.caches import CACHE, cache_nodes


@dataclass
class LoopExits:
    """What a running loop needs to know of its exits.

    `holds`: what is carried first stays as it is for tokens that are done; `compact`: rows of them
    can be left out.
    """

    done: int
    thresholds: tuple[float, ...]
    holds: bool
    compact: bool


def split_exits(loop: Loop, exits: Exits) -> tuple[fx.Graph, fx.Graph, dict[fx.Node, fx.Node]]:
    """Take the tests out of a body, in place; returns `test`, `fill`, and the nodes of `fill`.

    `test` takes the carry from before the trip, that from after it, and the loop's inputs, and
    returns the carry with what was decided. `fill` takes what the body takes.
    """
    body = loop.body.graph
    output = body.output_node()
    returned: Any = output.args[0]
    places, width = loop.places, len(loop.carry)
    test = fx.Graph()
    values: dict[fx.Node, fx.Node] = {}
    for number, place in enumerate(places[:width]):
        values[place] = test.placeholder(f"old_{number}")
    new = [test.placeholder(f"new_{number}") for number in range(width)]
    for place in places[width:]:
        values[place] = test.placeholder(place.name)
    for number, node in enumerate(returned):
        if number not in exits.decided and node.op != "placeholder":
            values[node] = new[number]
    for node in body.nodes:
        if node in exits.tests and node not in values:
            values[node] = test.node_copy(node, lambda n: values[n])
    decided = [values[n] if i in exits.decided else new[i] for i, n in enumerate(returned)]
    test.output(tuple(decided))
    output.args = (tuple(places[i] if i in exits.decided else n for i, n in enumerate(returned)),)
    body.eliminate_dead_code()
    fill = fx.Graph()
    nodes: dict[fx.Node, fx.Node] = {}
    fill.graph_copy(body, nodes)
    fill.output(tuple(nodes[n] for n in cache_nodes(body)))
    fill.eliminate_dead_code()
    return test, fill, nodes


def loop_exits(loop: Loop, exits: Exits) -> LoopExits:
    """The exits of a loop for running it."""
    returned: Any = loop.body.graph.output_node().args[0]
    plain = all(n.target is CACHE for n in cache_nodes(loop.body.graph))
    # a body that is told how many rows there are cannot run for fewer
    plain = plain and not any(isinstance(n, fx.Node) and _is_size(n) for n in loop.inputs)
    holds = returned[0].target is HOLD
    return LoopExits(exits.done, exits.thresholds, holds, plain and holds)


def _is_size(node: fx.Node) -> bool:
    if node.target is torch.ops.aten.sym_size.int:
        return True
    inputs = node.all_input_nodes
    # arithmetic on sizes; what makes a tensor of them is none
    own = not isinstance(node.target, torch._ops.OpOverload)
    return own and bool(inputs) and all(map(_is_size, inputs))


def can_compact(exits: LoopExits, carry: tuple[Any, ...], layers: Sequence[Any]) -> bool:
    """Whether rows that are done can be left out of this forward."""
    return (
        exits.compact
        and carry[0].shape[1] == 1
        and not torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
        and all(isinstance(layer, DynamicLayer) and not layer.is_sliding for layer in layers)
    )


def run_compacted(
    trip: nn.Module,
    exits: LoopExits,
    carry: tuple[Tensor, ...],
    values: Sequence[Any],
    layers: Sequence[Any],
) -> tuple[Tensor, ...]:
    """One trip for the rows that are not done; the others put keys and values into the caches."""
    done = carry[exits.done][:, 0]
    batch = done.shape[0]
    rest = done.nonzero()[:, 0]
    if len(rest) == 0:
        return trip(*carry, *values, past_key_values=layers)  # type: ignore[no-any-return]
    if len(rest) == batch:
        trip.fill(*carry, *values, past_key_values=layers)  # type: ignore[operator]
        return carry
    live = (~done).nonzero()[:, 0]
    shared = [_Shared(layer, batch, rest, live) for layer in layers]

    def rows(items: Sequence[Any], index: Tensor) -> list[Any]:
        return [
            item[index] if isinstance(item, Tensor) and item.shape[:1] == (batch,) else item
            for item in items
        ]

    trip.fill(  # type: ignore[operator]
        *rows(carry, rest), *rows(values, rest), past_key_values=[s.filling() for s in shared]
    )
    new = trip(*rows(carry, live), *rows(values, live), past_key_values=shared)
    merged = []
    for old, part in zip(carry, new, strict=True):
        whole = old.clone()
        whole[live] = part
        merged.append(whole)
    return tuple(merged)


class _Shared:
    """A cache layer that takes the keys and values of done rows first, then those of the others."""

    def __init__(self, layer: Any, batch: int, rest: Tensor, live: Tensor) -> None:
        self.layer, self.batch, self.rest, self.live = layer, batch, rest, live
        self.is_compileable = False
        self.held: tuple[Tensor, Tensor] | None = None

    def filling(self) -> _Filling:
        return _Filling(self)

    def update(self, k: Tensor, v: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
        assert self.held is not None
        whole = [self._merged(old, new) for old, new in zip(self.held, (k, v), strict=True)]
        keys, values = self.layer.update(*whole, **options)
        return keys[self.live], values[self.live]

    def _merged(self, rest: Tensor, live: Tensor) -> Tensor:
        whole = live.new_empty(self.batch, *live.shape[1:])
        whole[self.rest], whole[self.live] = rest, live
        return whole

    def get_mask_sizes(self, length: int) -> Any:
        return self.layer.get_mask_sizes(length)

    def get_seq_length(self) -> Any:
        return self.layer.get_seq_length()


class _Filling:
    """The side of a `_Shared` layer that done rows write to; nobody reads what it returns."""

    def __init__(self, shared: _Shared) -> None:
        self.shared = shared
        self.is_compileable = False

    def update(self, k: Tensor, v: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
        del options
        self.shared.held = k, v
        return k, v

    def get_mask_sizes(self, length: int) -> Any:
        return self.shared.get_mask_sizes(length)

    def get_seq_length(self) -> Any:
        return self.shared.get_seq_length()


@dataclass(frozen=True)
class DepthReport:
    """How many trips tokens made: a count of tokens for each number of trips."""

    histogram: Mapping[int, int]

    @property
    def tokens(self) -> int:
        return sum(self.histogram.values())

    @property
    def mean(self) -> float:
        """Trips per token; 0 without tokens."""
        total = sum(depth * count for depth, count in self.histogram.items())
        return total / max(self.tokens, 1)

    def __str__(self) -> str:
        counts = ", ".join(f"{depth}: {count}" for depth, count in self.histogram.items())
        return f"{self.mean:.4g} trips per token ({counts})"


def depth_report(depths: Sequence[Tensor]) -> DepthReport:
    """The report of the `depth` outputs of several forwards."""
    counts: dict[int, int] = {}
    for depth in torch.cat([d.flatten() for d in depths]).tolist() if depths else []:
        counts[depth] = counts.get(depth, 0) + 1
    return DepthReport(dict(sorted(counts.items())))
