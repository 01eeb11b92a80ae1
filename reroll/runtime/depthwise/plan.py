"""Run a graph for rows of which each may be in another trip of the loop.

Rows are sorted by trip, and the rows of one trip are a segment. A weight that all trips in the
batch share is applied once to all rows. A weight that differs, such as a norm or a low-rank factor,
is applied by segment. Where the dispatcher chooses kernels, a linear layer with its low-rank
residual is one launch for all segments.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from reroll.rewrite.analysis.state_plan import behind_cache
from reroll.rewrite.ir.matching import argument
from reroll.rewrite.ir.ops import ATTENTION, CACHE, RMS_NORM
from reroll.rewrite.ir.program import ancestors
from reroll.runtime.depthwise.fused import Depths, fusions_of
from reroll.runtime.functions.functions import BINARY, FUNCTIONS, METHODS, rms_norm


@dataclass(frozen=True)
class PerSegment:
    """A value that differs by segment."""

    values: tuple[Any, ...]


@dataclass(frozen=True)
class Segments:
    """Rows of one run: the size of each segment, and access to their caches.

    `store(number, k, v)` stores new keys and values, and `attend(number, q, node)` computes an
    attention; `number` counts the caches of one trip. With `depths`, kernels may run.
    """

    sizes: tuple[int, ...]
    store: Callable[[int, Tensor, Tensor], None] | None = None
    attend: Callable[[int, Tensor, fx.Node], Tensor] | None = None
    depths: Depths | None = None


class Plan:
    """A graph, or the part of it that computes some of its values, prepared to run."""

    def __init__(self, graph: fx.Graph, outputs: Sequence[fx.Node] | None = None) -> None:
        returned: Any = graph.output_node().args[0]
        self.outputs = list(returned if outputs is None else outputs)
        caches = [n for n in graph.nodes if n.target is CACHE]
        self.caches = {node: number for number, node in enumerate(caches)}
        # the number of the cache whose keys each attention reads
        self.attentions = {
            node: self.caches[cache]
            for node in graph.nodes
            if node.target is ATTENTION and (cache := behind_cache(argument(node, "k"))) is not None
        }
        needed = ancestors(self.outputs)
        self.placeholders = [n for n in graph.nodes if n.op == "placeholder"]
        self.nodes = [n for n in graph.nodes if n in needed and n.op != "placeholder"]
        self.calls = {n: _function(n) for n in self.nodes if n.op == "call_function"}
        self.fusions = fusions_of(self.nodes, self.outputs)

    def run(
        self, inputs: Iterable[Any], weight: Callable[[str], Any], segments: Segments
    ) -> tuple[Any, ...]:
        """Compute the outputs from placeholder values; `weight` returns weights by name."""
        values: dict[fx.Node, Any] = dict(zip(self.placeholders, inputs, strict=True))
        depths = segments.depths
        fusions = {} if depths is None else self.fusions
        fused = {node: fusion for node, fusion in fusions.items() if fusion.runs(weight)}
        inside = {n for fusion in fused.values() for n in fusion.inside}
        for node in self.nodes:
            if node in inside:
                continue
            if node in fused:
                assert depths is not None
                values[node] = fused[node].run(values[fused[node].x], weight, depths)
            elif node.op == "get_attr":
                values[node] = weight(str(node.target))
            elif node in self.caches:
                assert segments.store is not None
                k, v = (values[a] for a in node.args[:2])
                segments.store(self.caches[node], k, v)
                values[node] = (k, v)
            elif node in self.attentions:
                assert segments.attend is not None
                q: Any = node.args[0]
                values[node] = segments.attend(self.attentions[node], values[q], node)
            else:
                values[node] = self._call(node, values, segments.sizes)
        return tuple(values[n] for n in self.outputs)

    def _call(self, node: fx.Node, values: dict[fx.Node, Any], sizes: tuple[int, ...]) -> Any:
        function = self.calls[node]
        args = [_value(a, values) for a in node.args]
        kwargs = {k: _value(v, values) for k, v in node.kwargs.items()}
        if not any(isinstance(a, PerSegment) for a in (*args, *kwargs.values())):
            return function(*args, **kwargs)
        if node.target is RMS_NORM and isinstance(args[1], PerSegment) and not kwargs:
            return _norm(args[0], args[1], sizes, *args[2:])
        rows, start, parts = sum(sizes), 0, []
        for number, size in enumerate(sizes):

            def of_segment(
                value: Any, number: int = number, start: int = start, stop: int = start + size
            ) -> Any:
                if isinstance(value, PerSegment):
                    return value.values[number]
                if isinstance(value, Tensor) and value.dim() and value.shape[0] == rows:
                    return value[start:stop]
                return value

            options = {k: of_segment(v) for k, v in kwargs.items()}
            parts.append(function(*map(of_segment, args), **options))
            start += size
        if isinstance(parts[0], tuple):
            return tuple(map(torch.cat, zip(*parts, strict=True)))
        return torch.cat(parts)


def _norm(
    x: Tensor, weight: PerSegment, sizes: tuple[int, ...], eps: float, offset: float = 0.0
) -> Tensor:
    """Compute `rms_norm` of all rows at once, each with the weight of its segment."""
    counts = torch.tensor(sizes, device=x.device)
    every = torch.stack(weight.values)
    gains = every.repeat_interleave(counts, 0, output_size=sum(sizes)).float() + offset
    gains = gains.view(-1, *[1] * (x.dim() - 2), gains.shape[-1])
    return (rms_norm(x.float(), None, eps) * gains).to(x.dtype)


def _value(item: Any, values: dict[fx.Node, Any]) -> Any:
    if isinstance(item, fx.Node):
        return values[item]
    if isinstance(item, list | tuple):
        return fx.node.map_arg(item, lambda n: values[n])
    return item


def _function(node: fx.Node) -> Callable[..., Any]:
    target: Any = node.target
    if target in METHODS:
        name = METHODS[target]
        return lambda x, *args, **kwargs: getattr(x, name)(*args, **kwargs)
    if target in BINARY and len(node.args) == 2 and not node.kwargs:
        return BINARY[target]
    function: Callable[..., Any] = FUNCTIONS.get(target, target)
    return function
