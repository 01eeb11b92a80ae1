"""Give every attention of a Program its mask, made as early and as rarely as possible.

Afterwards, each attention is a call of `attend` with a mask made by `make_mask`. If the main graph
knows everything that the mask depends on, the mask is made there before any state is updated. All
layers of one kind then share it. Otherwise it is made in the body, right before the layer's own
cache update.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from torch import fx

from reroll.errors import ProgramError
from reroll.rewrite.analysis.state_plan import MASKED, behind_cache, plan_states, stateful_nodes
from reroll.rewrite.ir.matching import argument, bind, shape
from reroll.rewrite.ir.ops import ATTENTION, is_stateful
from reroll.rewrite.ir.program import Loop, Program
from reroll.rewrite.ir.visibility import Visibility
from reroll.runtime.functions.attention import attend
from reroll.runtime.functions.attention import mass as masses
from reroll.runtime.functions.masks import kept_bias, make_mask, visible_tokens
from reroll.runtime.lowering.hoisting import outer_values, placeholders
from reroll.runtime.lowering.padding import READERS
from reroll.runtime.state.caches import layer_of

_UNKNOWN = object()


def place_masks(program: Program, layers: dict[str, fx.Node]) -> None:
    """Rewrite all attentions in place; `layers` is the node of each graph's cache layers."""
    placer = _Placer(program, layers["main"])
    loops = {loop.node: loop for loop in program.loops}
    # in running order, so that a mask made for one attention can be reused by later ones
    for node in list(program.graph.nodes):
        if node.target in MASKED:
            placer.rewrite(node, None, layers["main"])
        elif node in loops:
            loop = loops[node]
            for inner in [n for n in loop.body.graph.nodes if n.target in MASKED]:
                placer.rewrite(inner, loop, layers[loop.name])
            loop.body.graph.eliminate_dead_code()
            loop.drop_unused_inputs()


class _Placer:
    def __init__(self, program: Program, layers: fx.Node) -> None:
        self.program = program
        self.layers = layers
        self.plan = plan_states(program)
        self.masks: dict[Any, fx.Node] = {}
        loops = {loop.node for loop in program.loops if stateful_nodes(loop.body.graph)}
        stateful = (n for n in program.graph.nodes if is_stateful(n) or n in loops)
        self.first_state = next(stateful, None)

    def rewrite(self, node: fx.Node, loop: Loop | None, layers: fx.Node) -> None:
        """Turn one attention into a call of `attend`.

        `layers` is the node of its graph's cache layers.
        """
        cache = behind_cache(argument(node, "k"))
        limits = Visibility.of(node)
        mask: fx.Node | None = None
        number = None
        if cache is not None:
            # a body gets its trip's part of the layers, so numbers count within the body
            of_trip = stateful_nodes(cache.graph).index
            number = self.plan.number(cache) if loop is None else of_trip(cache)
        if _can_need_mask(node, limits, cache):
            masks = self._outer_masks(node, limits, cache, loop)
            if any(m is _UNKNOWN for m in masks):
                mask = _inner_mask(node, limits, cache, layers, number)
            elif loop is None:
                mask = masks[0]
            else:
                same = all(m is masks[0] for m in masks)
                mask = loop.add_input("mask", masks[0] if same else tuple(masks))
        if number is not None and limits.prefix is not None:
            _fit_bias(node, layers, number)
        _set_mask(node, mask)

    def _outer_masks(
        self, node: fx.Node, limits: Visibility, cache: fx.Node | None, loop: Loop | None
    ) -> list[Any]:
        """Make the mask of each trip as a node of the main graph; `_UNKNOWN` if impossible."""
        if loop is None:
            number = None if cache is None else self.plan.number(cache)
            return [self._outer_mask(node, limits, number, cache or node)]
        known = outer_values(loop)
        masks = []
        for trip in range(loop.trips):
            outer = limits.map(partial(_outside, known, trip))
            number = None if cache is None else self.plan.number(cache, trip)
            masks.append(self._outer_mask(node, outer, number, loop.node))
        return masks

    def _outer_mask(
        self, node: fx.Node, limits: Visibility, number: int | None, point: fx.Node
    ) -> Any:
        """Make a mask before the first stateful node if possible, else before `point`."""
        length = self._length(node, limits, number)
        inputs = [v for v in limits.values() if isinstance(v, fx.Node)]
        if length is _UNKNOWN or _UNKNOWN in limits.values() or any(not n < point for n in inputs):
            return _UNKNOWN
        first = self.first_state
        if first is not None and first < point and all(n < first for n in inputs):
            point = first
        if number is not None and (first is None or not first < point):
            # no layer has been updated there, so all of one kind hold keys at the same positions
            number = [layer.reach for layer in self.plan.layers].index(
                self.plan.layers[number].reach
            )
        key = (limits, number, length)
        if key not in self.masks:
            graph = self.program.graph
            with graph.inserting_before(point):
                layer = (
                    None if number is None else graph.call_function(layer_of, (self.layers, number))
                )
                like = None if length is None else placeholders(graph)[0]
                if isinstance(length, tuple):
                    like, length = length[0], graph.call_method("size", length)
                self.masks[key] = _make(graph, layer, limits, like, length, None)
        return self.masks[key]

    def _length(self, node: fx.Node, limits: Visibility, number: int | None) -> Any:
        """Return the number of queries: a constant, (input, dimension), None or `_UNKNOWN`.

        It is None where the mask does not depend on it.
        """
        if limits.is_by_key:
            return None
        q, k = shape(argument(node, "q")), shape(argument(node, "k"))
        if len(q) != 4 or (number is None and k[2:3] != q[2:3]):
            return _UNKNOWN
        if isinstance(q[2], int):
            return q[2]
        nodes = {str(n.target): n for n in placeholders(self.program.graph)}
        for item in self.program.inputs:
            if item.role == "data" and q[2] in item.type.shape:
                return nodes[item.name], item.type.shape.index(q[2])
        return _UNKNOWN


def _outside(known: Mapping[fx.Node, Sequence[Any]], trip: int, value: Any) -> Any:
    """Return the value outside the loop that a value of its body has in one trip."""
    if value in known:
        return known[value][trip]
    return _UNKNOWN if isinstance(value, fx.Node) else value


def _can_need_mask(node: fx.Node, limits: Visibility, cache: fx.Node | None) -> bool:
    """Whether an attention may need a mask that `is_causal` does not express."""
    if limits.is_limited:
        return True
    if limits.causal is False:
        return False
    q, k = shape(argument(node, "q")), shape(argument(node, "k"))
    return cache is not None or not q or q[2:3] != k[2:3]


def _inner_mask(
    node: fx.Node, limits: Visibility, cache: fx.Node | None, layers: fx.Node, number: int | None
) -> fx.Node:
    """Make a mask in the attention's own graph, before the layer's cache update.

    Raises ProgramError if it depends on a value that is computed after the update.
    """
    graph, q, k = node.graph, argument(node, "q"), argument(node, "k")
    inputs = [q, *(v for v in limits.values() if isinstance(v, fx.Node))]
    late = [n.name for n in inputs if cache is not None and not n < cache]
    if late:
        raise ProgramError(
            f"the mask depends on {late[0]}, which is computed after the cache is updated",
            where=node.name,
        )
    with graph.inserting_before(cache or node):
        layer = keys = None
        if cache is not None:
            layer = graph.call_function(layer_of, (layers, number))
        length = graph.call_method("size", (q, 2))
        if cache is None:
            keys = graph.call_method("size", (k, 2))
        return _make(graph, layer, limits, q, length, keys)


def _make(
    graph: fx.Graph, layer: Any, limits: Visibility, like: Any, length: Any, keys: Any
) -> fx.Node:
    padding = limits.padding
    if isinstance(padding, fx.Node) and padding.target not in READERS:
        padding = graph.call_function(visible_tokens, (padding,))
    values = replace(limits, padding=padding).values()
    return graph.call_function(make_mask, (layer, like, length, keys, *values))


def _fit_bias(node: fx.Node, layers: fx.Node, number: int) -> None:
    """Fit an attention's bias to the keys that its cache layer returns."""
    graph, bias, padding = node.graph, argument(node, "bias"), argument(node, "padding")
    if bias is None:
        return
    with graph.inserting_before(node):
        layer = graph.call_function(layer_of, (layers, number))
        fitted = graph.call_function(kept_bias, (layer, bias, padding, argument(node, "k")))
    node.replace_input_with(bias, fitted)


def _set_mask(node: fx.Node, mask: fx.Node | None) -> None:
    get = bind(node.target, node.args, node.kwargs)
    extra = [get["softcap"], get["sinks"], get["bias"]]
    while extra and extra[-1] is None:
        extra.pop()
    tensors = [get[name] for name in ("q", "k", "v") if name in get]
    node.target = attend if node.target is ATTENTION else masses
    node.args = (*tensors, get["scale"], get["causal"], mask, *extra)
    node.kwargs = {"log": True} if get.get("log") else {}
