"""Plan of the states that nodes of a Program keep from one call to the next.

A state is a cache of keys and values, the state of a recurrence, or the last inputs of a short
convolution. States are numbered in the order in which their nodes run: a node in a loop's body has
one for each trip. The lowered module, the exporters, and the configuration from which transformers
makes its caches are built from the plan.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import fx

from reroll.errors import ProgramError
from reroll.rewrite.ir.matching import argument, shape
from reroll.rewrite.ir.ops import (
    ATTENTION,
    ATTENTION_MASS,
    CACHE,
    RECENT,
    RECURRENCE,
    SHORT_CONVOLUTION,
    is_stateful,
)
from reroll.rewrite.ir.program import Loop, Program
from reroll.rewrite.ir.visibility import Visibility

# ops that read keys under a mask
MASKED = (ATTENTION, ATTENTION_MASS)
# ops whose state are the last inputs of a short convolution
CONVOLVED = (RECENT, SHORT_CONVOLUTION)


@dataclass(frozen=True)
class CacheLayer:
    """Layout of one state: its layer type, window and sizes.

    Attributes:
        layer_type: a layer type of transformers. A recurrence is "hybrid_sliding": of the types
            with a recurrent state, that is the one that also counts its tokens.
        size: tokens of the window or chunk; None for all tokens.
        kv_heads: number of key-value heads, if it is a constant.
        head_dim: size of a key, if it is a constant.
        prefix: how many first tokens are kept beside the window.
        recent: how many inputs of a short convolution are kept; None for another state.
    """

    layer_type: str
    size: int | None = None
    kv_heads: int | None = None
    head_dim: int | None = None
    prefix: int = 0
    recent: int | None = None

    @property
    def reach(self) -> tuple[str, int | None, int]:
        """Layer type, size and prefix, which together determine the tokens that it keeps."""
        return self.layer_type, self.size, self.prefix


@dataclass(frozen=True)
class StatePlan:
    """States of a Program, with the number of each node's state in each trip.

    Attributes:
        layers: the layout of each state, in the order in which they run.
        numbers: the numbers of a node's states, trip by trip.
    """

    layers: tuple[CacheLayer, ...]
    numbers: dict[fx.Node, tuple[int, ...]]

    def number(self, node: fx.Node, trip: int = 0) -> int:
        """Return the number of a node's state in a trip."""
        return self.numbers[node][trip]


def plan_states(program: Program) -> StatePlan:
    """Number the states of a Program and find the layout of each.

    Raises ProgramError for an op with a state that is neither a cache nor a recurrence.
    """
    layers: list[CacheLayer] = []
    numbers: dict[fx.Node, tuple[int, ...]] = {}
    for node, layer in _walk(program):
        numbers[node] = (*numbers.get(node, ()), len(layers))
        layers.append(layer)
    return StatePlan(tuple(layers), numbers)


def stateful_nodes(graph: fx.Graph) -> list[fx.Node]:
    """Return the nodes of one graph that keep state, in the order in which they run."""
    return [n for n in graph.nodes if is_stateful(n)]


def kept_inputs(node: fx.Node) -> Any:
    """Return how many last inputs of a short convolution a node keeps: of `CONVOLVED`."""
    if node.target is RECENT:
        return argument(node, "kept")
    return shape(argument(node, "weight"))[1] - 1


def behind_cache(value: Any) -> fx.Node | None:
    """Return the cache node whose output `value` is; None if it is no output of a cache."""
    if not isinstance(value, fx.Node) or value.target is not operator.getitem:
        return None
    source = value.args[0]
    return source if isinstance(source, fx.Node) and source.target is CACHE else None


def before_cache(value: fx.Node) -> fx.Node:
    """Return the keys or values of the new tokens alone if `value` is an output of a cache.

    Other values are returned unchanged.
    """
    cache = behind_cache(value)
    source: Any = value if cache is None else cache.args[value.args[1]]  # type: ignore[index]
    return source  # type: ignore[no-any-return]


def readers(cache: fx.Node) -> list[fx.Node | None]:
    """Return the attention nodes that read the outputs of a cache; None for any other use."""
    attentions: list[fx.Node | None] = []
    for item in cache.users:
        if item.target is not operator.getitem:
            attentions.append(None)
            continue
        for user in item.users:
            attentions.append(user if user.target in MASKED else None)
    return attentions


def _walk(program: Program) -> Iterator[tuple[fx.Node, CacheLayer]]:
    loops = {loop.node: loop for loop in program.loops}
    for node in program.graph.nodes:
        if is_stateful(node):
            yield node, _layer(node, None, 0)
        elif node in loops:
            loop = loops[node]
            inner = stateful_nodes(loop.body.graph)
            for trip in range(loop.trips):
                for state in inner:
                    yield state, _layer(state, loop, trip)


def _layer(node: fx.Node, loop: Loop | None, trip: int) -> CacheLayer:
    if node.target is RECURRENCE:
        return CacheLayer("hybrid_sliding", 1)
    if node.target in CONVOLVED:
        kept = kept_inputs(node)
        kept = kept if loop is None else loop.resolve(kept, trip)
        return CacheLayer("hybrid_sliding", 1, recent=kept)
    if node.target is not CACHE:
        raise ProgramError(
            f"{node.target} keeps state, and only caches, recurrences and the last inputs of "
            "convolutions have a place for it",
            where=node.name,
            hint="keep it in a reroll.cache, a reroll.recurrence, a reroll.short_convolution or a "
            "reroll.recent",
        )
    sizes = shape(argument(node, "k"))
    heads, dim = (sizes[1], sizes[3]) if len(sizes) == 4 else (None, None)
    heads, dim = (x if isinstance(x, int) else None for x in (heads, dim))
    layer_type, size, prefix = "full_attention", None, 0
    reaches = {_reach(reader, loop, trip) for reader in readers(node)}
    if len(reaches) == 1:
        layer_type, size, prefix = reaches.pop()
    return CacheLayer(layer_type, size, heads, dim, prefix)


def _reach(node: fx.Node | None, loop: Loop | None, trip: int) -> tuple[str, int | None, int]:
    """Return the layer type of an attention, its size, and the number of first tokens kept."""
    everything = "full_attention", None, 0
    if node is None:
        return everything
    visibility = Visibility.of(node)
    if loop is not None:
        visibility = visibility.map(lambda value: loop.resolve(value, trip))
    if (
        visibility.causal is True
        and isinstance(visibility.window, int)
        and isinstance(visibility.prefix, int | None)
    ):
        return "sliding_attention", visibility.window, visibility.prefix or 0
    if (
        visibility.causal is True
        and isinstance(visibility.chunk, int)
        and visibility.prefix is None
    ):
        return "chunked_attention", visibility.chunk, 0
    return everything
