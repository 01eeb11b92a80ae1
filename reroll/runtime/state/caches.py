"""The state of a lowered module, in cache layers of transformers and of reroll.

transformers builds its caches from a configuration's `layer_types`. That entry therefore lists the
cache layers of a Program, in the order in which they run.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from reroll.errors import UsageError
from reroll.rewrite.analysis.state_plan import CacheLayer, readers
from reroll.rewrite.ir.matching import argument
from reroll.rewrite.ir.ops import CACHE, RECENT, RECURRENCE, SHORT_CONVOLUTION
from reroll.runtime.functions.convolutions import (
    RecentLayer,
    StaticRecentLayer,
    convolve,
    recall,
)
from reroll.runtime.functions.recurrences import (
    RecurrentLayer,
    StaticRecurrentLayer,
    recur,
    recurrence_of,
)
from reroll.runtime.state.growing import GrowingLayer
from reroll.runtime.state.static import StaticWindowLayer
from reroll.runtime.state.windows import WindowLayer

# the configuration entry that holds a cache layer's size, by kind
_SIZES = {
    "sliding_attention": "sliding_window",
    "hybrid_sliding": "sliding_window",
    "chunked_attention": "attention_chunk_size",
}


def reroll_class(layer: CacheLayer, static: bool = False) -> type | None:
    """Return reroll's class for a cache layer, or None where transformers has one for it.

    `static` says that the cache is one of constant shapes.
    """
    if layer.recent is not None:
        return StaticRecentLayer if static else RecentLayer
    if layer.layer_type == "hybrid_sliding":
        return StaticRecurrentLayer if static else RecurrentLayer
    if layer.layer_type == "sliding_attention" and (layer.prefix or not layer.size):
        return StaticWindowLayer if static else WindowLayer
    return None


def append(
    layers: Any, number: int, k: Tensor, v: Tensor, **options: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Add new keys and values to a cache layer, and return all of them so far.

    Without a cache, returns the new ones. `options` may be the padding: see `tell_padding`.
    """
    return (k, v) if layers is None else layers[number].update(k, v, **options)


def append_exactly(
    layers: Any, number: int, k: Tensor, v: Tensor, **options: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Run `append`, and cut off the slots that a static layer has not filled."""
    keys, values = append(layers, number, k, v, **options)
    if layers is None or not layers[number].is_compileable:
        return keys, values
    length = int(layers[number].get_seq_length())
    return keys[:, :, :length], values[:, :, :length]


def update_function(node: fx.Node) -> Callable[..., Any]:
    """Return the function that updates the layer of a stateful node.

    Only attention can take keys that include unfilled slots.
    """
    if node.target is RECURRENCE:
        mixer = argument(node, "rule"), argument(node, "options")
        return recurrence_of(*mixer) if all(isinstance(x, str) for x in mixer) else recur
    if node.target is RECENT:
        return recall
    if node.target is SHORT_CONVOLUTION:
        return convolve
    return append_exactly if None in readers(node) else append


def tell_padding(cache: fx.Node) -> None:
    """Pass the padding to a cache node, in place, if its layer has to find the first tokens."""
    if cache.target is not CACHE:
        return
    prefixed = [n for n in readers(cache) if n is not None and argument(n, "prefix") is not None]
    if prefixed:
        cache.kwargs = {"padding": argument(prefixed[0], "padding")}


def layer_of(layers: Any, number: int) -> Any:
    """Return one cache layer, or None without a cache."""
    return None if layers is None else layers[number]


class _Offloaded:
    """A layer of a cache that moves its layers between devices: it is updated through the cache."""

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
    """Return the layers of a transformers cache, creating those that it creates on demand.

    An empty layer is replaced by one of reroll's where the plan requires it. Raises UsageError if
    the cache has too few layers, or if a layer to be replaced is not empty.
    """
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
        old = cache.layers[number]
        layer_class = reroll_class(planned, old.is_compileable)
        if layer_class is None or type(old) is layer_class:
            continue
        if old.get_seq_length():
            raise UsageError(
                f"layer {number} of the cache holds tokens, in another format than this model's",
                hint="begin with an empty cache: DynamicCache(config=model.config)",
            )
        is_recurrent = planned.layer_type == "hybrid_sliding"
        new = layer_class() if is_recurrent else layer_class(planned.size or 0, planned.prefix)
        new.record_past = getattr(old, "record_past", False)
        cache.layers[number] = new
    if type(cache) is DynamicCache and not (cache.offloading or torch.compiler.is_compiling()):
        # the empty layers of full attention
        for layer in cache.layers:
            if type(layer) is DynamicLayer and not layer.is_initialized:
                layer.__class__ = GrowingLayer
    if cache.offloading:
        # reroll's own layers are small, so they are not offloaded
        return [
            cache.layers[n] if reroll_class(planned) is not None else _Offloaded(cache, n)
            for n, planned in enumerate(plan)
        ]
    return cache.layers  # type: ignore[no-any-return]


def cache_config(layers: Sequence[CacheLayer]) -> dict[str, Any]:
    """Return the configuration entries that make transformers build these cache layers."""
    if not layers:
        return {}
    config: dict[str, Any] = {
        "num_hidden_layers": len(layers),
        "layer_types": [layer.layer_type for layer in layers],
    }
    overrides: dict[str, dict[str, Any]] = {}
    for number, layer in enumerate(layers):
        entries = {"num_key_value_heads": layer.kv_heads, "head_dim": layer.head_dim}
        if layer.layer_type in _SIZES:
            entries[_SIZES[layer.layer_type]] = max(1, (layer.size or 0) + layer.prefix)
        for name, value in entries.items():
            # the first layer with this entry sets the default; layers that differ override it
            if value is not None and config.setdefault(name, value) != value:
                overrides.setdefault(str(number), {})[name] = value
    if overrides:
        config["per_layer_config"] = overrides
    return config
