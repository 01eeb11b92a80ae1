"""The state of a lowered module: which cache layer each cached attention has.

transformers builds its caches from a configuration's `layer_types`, so a Program's cache layers, in
the order in which they run, are written there.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx

from reroll.errors import UsageError
from reroll.rewrite.ir.matching import argument, shape
from reroll.rewrite.ir.ops import ATTENTION, ATTENTION_MASS, CACHE, RECURRENCE
from reroll.rewrite.ir.program import Loop, Program
from reroll.rewrite.ir.visibility import Visibility

# what reads keys under a mask
MASKED = (ATTENTION, ATTENTION_MASS)

# where a configuration has the size of a cache layer
_SIZES = {
    "sliding_attention": "sliding_window",
    "hybrid_sliding": "sliding_window",
    "chunked_attention": "attention_chunk_size",
}


@dataclass(frozen=True)
class CacheLayer:
    """What one cache layer keeps: a transformers layer type, the window or chunk, and the sizes.

    `prefix` is how many first tokens it keeps beside the window. A recurrence is a layer of kind
    "hybrid_sliding": of transformers' types with a recurrent state, that is the one that also
    counts its tokens.
    """

    kind: str
    size: int | None = None
    kv_heads: int | None = None
    head_dim: int | None = None
    prefix: int = 0

    @property
    def reach(self) -> tuple[str, int | None, int]:
        """What says which tokens it keeps."""
        return self.kind, self.size, self.prefix

    @property
    def own_type(self) -> type | None:
        """The class of ours that keeps this, where transformers has none."""
        # a Program's cache layers are wanted before transformers is
        from reroll.runtime.functions.recurrences import RecurrentLayer
        from reroll.runtime.state.windows import WindowLayer

        if self.kind == "hybrid_sliding":
            return RecurrentLayer
        if self.kind == "sliding_attention" and (self.prefix or not self.size):
            return WindowLayer
        return None

    def make(self) -> Any:
        """A new layer of `own_type`."""
        own = self.own_type
        assert own is not None
        sizes = () if self.kind == "hybrid_sliding" else (self.size or 0, self.prefix)
        return own(*sizes)


def cache_nodes(graph: fx.Graph) -> list[fx.Node]:
    """The nodes of one graph that own state, in the order in which they run."""
    return [n for n in graph.nodes if owns_state(n)]


def owns_state(node: fx.Node) -> bool:
    """Whether a node reads and writes state of its own."""
    return node.op == "call_function" and node.target in (CACHE, RECURRENCE)


def cache_layers(program: Program) -> list[CacheLayer]:
    """Every cache layer of a Program, in the order in which they run."""
    return [layer for _, layer in _walk(program)]


def numbering(program: Program) -> dict[fx.Node, tuple[int, ...]]:
    """The number of the cache layer of each cache node, trip by trip."""
    numbers: dict[fx.Node, tuple[int, ...]] = {}
    for number, (node, _) in enumerate(_walk(program)):
        numbers[node] = (*numbers.get(node, ()), number)
    return numbers


def _walk(program: Program) -> Iterator[tuple[fx.Node, CacheLayer]]:
    loops = {loop.node: loop for loop in program.loops}
    for node in program.graph.nodes:
        if owns_state(node):
            yield node, _layer(node, None, 0)
        elif node in loops:
            loop = loops[node]
            inner = cache_nodes(loop.body.graph)
            for trip in range(loop.trips):
                for cache in inner:
                    yield cache, _layer(cache, loop, trip)


def _layer(node: fx.Node, loop: Loop | None, trip: int) -> CacheLayer:
    if node.target is RECURRENCE:
        return CacheLayer("hybrid_sliding", 1)
    sizes = shape(argument(node, "k"))
    heads, dim = (sizes[1], sizes[3]) if len(sizes) == 4 else (None, None)
    heads, dim = (x if isinstance(x, int) else None for x in (heads, dim))
    kind, size, prefix = "full_attention", None, 0
    reaches = {_reach(user, loop, trip) for user in _readers(node)}
    if len(reaches) == 1:
        kind, size, prefix = reaches.pop()
    return CacheLayer(kind, size, heads, dim, prefix)


def _readers(cache: fx.Node) -> list[fx.Node | None]:
    """The attentions over the keys of a cache; None stands for any other use."""
    readers: list[fx.Node | None] = []
    for item in cache.users:
        if item.target is not operator.getitem:
            readers.append(None)
            continue
        for user in item.users:
            readers.append(user if user.target in MASKED else None)
    return readers


def _reach(node: fx.Node | None, loop: Loop | None, trip: int) -> tuple[str, int | None, int]:
    """How far back an attention looks: a layer type, its size, and the first tokens it sees."""
    everything = "full_attention", None, 0
    if node is None:
        return everything
    seen = Visibility.of(node)
    if loop is not None:
        seen = seen.map(lambda value: loop.resolve(value, trip))
    if seen.causal is True and isinstance(seen.window, int) and isinstance(seen.prefix, int | None):
        return "sliding_attention", seen.window, seen.prefix or 0
    if seen.causal is True and isinstance(seen.chunk, int) and seen.prefix is None:
        return "chunked_attention", seen.chunk, 0
    return everything


def append(
    layers: Any, number: int, k: Tensor, v: Tensor, **options: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Add new keys and values to a cache layer; all of them so far, or just these without a
    cache. `options` may be the padding: see `tell_padding`.
    """
    return (k, v) if layers is None else layers[number].update(k, v, **options)


def append_exactly(
    layers: Any, number: int, k: Tensor, v: Tensor, **options: Tensor | None
) -> tuple[Tensor, Tensor]:
    """`append`, without the slots that a static layer has not filled."""
    keys, values = append(layers, number, k, v, **options)
    if layers is None or not layers[number].is_compileable:
        return keys, values
    length = int(layers[number].get_seq_length())
    return keys[:, :, :length], values[:, :, :length]


def update_function(node: fx.Node) -> Callable[..., Any]:
    """How to update the layer of a node that owns state.

    Only attention can do with slots that are empty.
    """
    if node.target is RECURRENCE:
        from reroll.runtime.functions.recurrences import recur

        return recur
    return append_exactly if None in _readers(node) else append


def tell_padding(cache: fx.Node) -> None:
    """Let a cache node take the padding, in place, if its layer has to know the first tokens."""
    if cache.target is not CACHE:
        return
    readers = [n for n in _readers(cache) if n is not None]
    prefixed = [n for n in readers if argument(n, "prefix") is not None]
    if prefixed:
        cache.kwargs = {"padding": argument(prefixed[0], "padding")}


def layer_of(layers: Any, number: int) -> Any:
    """One cache layer, or None without a cache."""
    return None if layers is None else layers[number]


class _Offloaded:
    """A layer of a cache that moves its layers between devices: it has to be updated by number."""

    def __init__(self, cache: Any, number: int) -> None:
        self.cache, self.number = cache, number
        self.is_compileable = cache.layers[number].is_compileable

    def update(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return self.cache.update(k, v, self.number)  # type: ignore[no-any-return]

    def get_mask_sizes(self, length: int) -> tuple[int, int]:
        return self.cache.layers[self.number].get_mask_sizes(length)  # type: ignore[no-any-return]

    def get_seq_length(self) -> Any:
        return self.cache.layers[self.number].get_seq_length()


def layers_of(cache: Any, plan: Sequence[CacheLayer]) -> list[Any] | None:
    """The layers of a transformers cache, made now where it makes them on demand.

    A layer that is still empty gives way to one of ours where the plan wants one.
    """
    from transformers import DynamicCache

    from reroll.runtime.state.growing import make_growing

    count = len(plan)
    if cache is None or not count:
        return None
    while cache.layer_class_to_replicate is not None and len(cache.layers) < count:
        cache.layers.append(cache.layer_class_to_replicate())
    if len(cache.layers) < count:
        raise UsageError(
            f"the cache has {len(cache.layers)} layers, and the model needs {count}",
            hint="make it from the model's own configuration: DynamicCache(config=model.config)",
        )
    for number, planned in enumerate(plan):
        own = planned.own_type
        if own is not None and type(cache.layers[number]) is not own:
            _replace(cache.layers, number, planned.make())
    if type(cache) is DynamicCache and not cache.offloading:
        make_growing(cache.layers)
    if cache.offloading:
        # layers of ours are small, and stay where they are
        return [
            cache.layers[n] if planned.own_type is not None else _Offloaded(cache, n)
            for n, planned in enumerate(plan)
        ]
    return cache.layers  # type: ignore[no-any-return]


def _replace(layers: list[Any], number: int, own: Any) -> None:
    if layers[number].get_seq_length():
        raise UsageError(
            f"layer {number} of the cache is full of what another model has put there",
            hint="begin with an empty cache: DynamicCache(config=model.config)",
        )
    own.record_past = getattr(layers[number], "record_past", False)
    layers[number] = own


def cache_config(layers: list[CacheLayer]) -> dict[str, Any]:
    """The configuration entries that make transformers build these cache layers."""
    if not layers:
        return {}
    config: dict[str, Any] = {
        "num_hidden_layers": len(layers),
        "layer_types": [layer.kind for layer in layers],
    }
    overrides: dict[str, dict[str, Any]] = {}
    for number, layer in enumerate(layers):
        own = {"num_key_value_heads": layer.kv_heads, "head_dim": layer.head_dim}
        if layer.kind in _SIZES:
            own[_SIZES[layer.kind]] = max(1, (layer.size or 0) + layer.prefix)
        for name, value in own.items():
            # the first layer that has a size says it for all that do not differ
            if value is not None and config.setdefault(name, value) != value:
                overrides.setdefault(str(number), {})[name] = value
    if overrides:
        config["per_layer_config"] = overrides
    return config
