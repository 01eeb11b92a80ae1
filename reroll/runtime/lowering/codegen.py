"""Generate Python from a graph: straight-line code of PyTorch functions and module calls."""

from __future__ import annotations

import linecache
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from reroll.rewrite.ir import ops
from reroll.rewrite.ir.ops import CACHE, is_stateful
from reroll.runtime.functions.functions import BINARY, FUNCTIONS, METHODS, makes_tensor_from_nothing
from reroll.runtime.functions.loops import look_up, run_loop
from reroll.runtime.functions.weights import read
from reroll.runtime.lowering.hoisting import OWN_INPUTS
from reroll.runtime.lowering.modules import Reading
from reroll.runtime.lowering.placement import PRODUCTS

aten = torch.ops.aten

# the function that updates a stateful node's cache layer, and the number of that layer
Update = tuple[Callable[..., Any], int]


def runnable(
    graph: fx.Graph,
    readings: Mapping[str, Reading],
    layers: fx.Node | None = None,
    caches: Mapping[fx.Node, Update] | None = None,
    state: fx.Node | None = None,
) -> fx.Graph:
    """Copy a graph so that it calls only functions that are fast to call.

    `layers` is the node of its cache layers, `caches` gives the update of each stateful node, and
    `state` is the node of the main graph's `ForwardState`. Weights are read from the modules that
    hold them, or these are called for what is computed with the weights. Ops become functions and
    methods of PyTorch. Ops that make a tensor from no tensor get the device of the graph's first
    input.
    """
    return _Rewriter(graph, readings, layers, caches or {}, state).run()


def compile_graph(graph: fx.Graph, name: str) -> tuple[Callable[..., Any], str]:
    """Compile a graph to a function, and return it with its source.

    The function's first argument is the module that holds the weights.
    """
    code = graph.python_code("self")
    source = code.src
    filename = f"<reroll {name}>"
    # lets tracebacks and debuggers show the source lines
    linecache.cache[filename] = (len(source), None, source.splitlines(keepends=True), filename)
    namespace = dict(code.globals)
    exec(compile(source, filename, "exec"), namespace)
    function = namespace["forward"]
    function.__qualname__ = function.__name__ = "forward"
    return function, source


@dataclass
class _Rewriter:
    old: fx.Graph
    readings: Mapping[str, Reading]
    layers: fx.Node | None
    caches: Mapping[fx.Node, Update]
    state: fx.Node | None
    new: fx.Graph = field(default_factory=fx.Graph)
    values: dict[fx.Node, fx.Node] = field(default_factory=dict)
    weights: dict[str, fx.Node] = field(default_factory=dict)
    device: fx.Node | None = None

    def run(self) -> fx.Graph:
        for node in self.old.nodes:
            if node.op == "placeholder":
                # the target is the argument's name in the source: one that fx has made safe
                new = self.new.create_node("placeholder", "x", node.args, name=node.name)
                new.target = node.target if node.target in OWN_INPUTS else new.name
                new.meta.update(node.meta)
                self.values[node] = new
            elif node.op == "output":
                self.new.output(self._map(node.args[0]))
            elif node.op != "get_attr":
                self.values[node] = self._call(node)
        return self.new

    def _map(self, value: Any) -> Any:
        return fx.node.map_arg(value, self._value)

    def _value(self, node: fx.Node) -> fx.Node:
        if node.op != "get_attr":
            return self.values[node]
        name = str(node.target)
        if name not in self.weights:
            self.weights[name] = self._read(self.readings[name], node.name)
        return self.weights[name]

    def _read(self, reading: Reading, name: str) -> fx.Node:
        if reading.owned:
            return self.new.create_node("get_attr", reading.weight, name=name)
        owner, _, leaf = reading.weight.rpartition(".")
        module = self.new.get_attr(owner)
        return self.new.create_node("call_function", read, (module, leaf), name=name)

    def _call(self, node: fx.Node) -> fx.Node:
        target, args, kwargs = node.target, node.args, dict(node.kwargs)
        if node.op == "call_method":
            return self._emit(node, "call_method", str(target), args, kwargs)
        if target in PRODUCTS and (module := self._module(args[1], "linear")):
            return self._emit(node, "call_module", module, args[:1], {})
        if target is look_up:
            table = self.new.get_attr(self._module(args[0], "lookup"))  # type: ignore[arg-type]
            args = (table, *self._map(args[1:]))
            return self.new.call_function(look_up, args)
        if target is aten.embedding.default and (module := self._module(args[0], "lookup")):
            return self._emit(node, "call_module", module, args[1:2], {})
        if target is CACHE:
            update, number = self.caches[node]
            told = {name: kwargs[name] for name in ("padding",) if name in kwargs}
            return self._emit(node, "call_function", update, (self.layers, number, *args[:2]), told)
        if is_stateful(node):
            update, number = self.caches[node]
            args = (self.layers, number, *args)
            return self._emit(node, "call_function", update, args, kwargs)
        if target is ops.loop:
            args = (self.state, *args[:3])
            return self._emit(node, "call_function", run_loop, args, {})
        if target in METHODS:
            return self._emit(node, "call_method", METHODS[target], args, kwargs)
        if target in BINARY and len(args) == 2 and not kwargs:
            target = BINARY[target]
        elif makes_tensor_from_nothing(target):
            kwargs["device"] = self._device()
        return self._emit(node, "call_function", FUNCTIONS.get(target, target), args, kwargs)

    def _emit(self, node: fx.Node, op: str, target: Any, args: Any, kwargs: Any) -> fx.Node:
        new = self.new.create_node(op, target, self._map(args), self._map(kwargs), name=node.name)
        new.meta.update(node.meta)
        return new

    def _module(self, weight: Any, attribute: str) -> str | None:
        if not isinstance(weight, fx.Node) or weight.op != "get_attr":
            return None
        module: str | None = getattr(self.readings[str(weight.target)], attribute)
        return module

    def _device(self) -> Any:
        """Return the device of the first input, as a node that `_map` does not change."""
        if self.device is None:
            first = next(iter(self.new.nodes))
            self.device = self.new.call_function(getattr, (first, "device"))
            self.values[self.device] = self.device
        return self.device
