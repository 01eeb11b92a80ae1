"""Write a Program's graphs as Python: one function for each, line by line.

Weights are read from a dictionary `w`; `run` is the bundle's `Prefill` or `Decode`, which holds the
states. Nodes that only serve masks are left out: `run` knows the tokens of each row.
"""

from __future__ import annotations

import json
import keyword
import operator
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import fx

from reroll.errors import ExportError
from reroll.export.triton.linears import Fused, kinds_of
from reroll.export.triton.sites import Site
from reroll.rewrite.analysis.state_plan import before_cache, behind_cache
from reroll.rewrite.ir import ops
from reroll.rewrite.ir.defaults import counts_from_zero
from reroll.rewrite.ir.matching import argument
from reroll.rewrite.ir.ops import (
    ATTENTION,
    CACHE,
    GLU,
    RECURRENCE,
    RMS_NORM,
    ROPE,
    SHORT_CONVOLUTION,
)
from reroll.rewrite.ir.program import Program
from reroll.runtime.functions.functions import BINARY, METHODS, makes_tensor_from_nothing

aten = torch.ops.aten

FUNCTIONS: dict[Any, str] = {
    RMS_NORM: "norm",
    ROPE: "turned",
    GLU: "gated",
    aten.linear.default: "F.linear",
    aten.embedding.default: "embedding",
    aten.log_sigmoid.default: "F.logsigmoid",
    aten.silu.default: "F.silu",
    aten.gelu.default: "F.gelu",
    aten.softplus.default: "F.softplus",
    aten.cat.default: "torch.cat",
    aten.cos.default: "torch.cos",
    aten.sin.default: "torch.sin",
    aten.neg.default: "torch.neg",
    aten.unflatten.int: "torch.unflatten",
    aten.flatten.using_ints: "torch.flatten",
}
SYMBOLS = {"add": "+", "sub": "-", "mul": "*", "truediv": "/"}
# the output of the program that a host needs; others are left out
LOGITS = "logits"


class GraphWriter:
    """Writer of the functions of a Program's graphs."""

    def __init__(
        self, program: Program, sites: Mapping[fx.Node, Site], linears: Mapping[fx.Node, Fused]
    ) -> None:
        self.program, self.sites, self.linears = program, sites, linears
        self.kinds = [f.key for f in kinds_of(list(linears.values()))]
        self.norms = {f.norm for f in linears.values()}
        places = zip(program.graph.find_nodes(op="placeholder"), program.inputs, strict=True)
        self.masks = {place for place, item in places if item.role == "padding"}
        self.names = {
            name: f"trip_of_{_safe(name)}" if name != "main" else "main"
            for name, _ in program.graphs()
        }
        # bodies first: which inputs a loop needs depends on its body
        self.live: dict[str, set[fx.Node]] = {}
        for name, graph in reversed(list(program.graphs())):
            self.live[name] = self._live(graph)

    def source(self) -> str:
        """Return the source of all functions, bodies of loops first."""
        bodies = [self._function(name, g) for name, g in self.program.graphs() if name != "main"]
        return "\n\n\n".join([*bodies, self._function("main", self.program.graph)])

    def _live(self, graph: fx.Graph) -> set[fx.Node]:
        """Return the nodes that the output depends on, without arguments for masks."""
        found: set[fx.Node] = set()
        stack: list[Any] = [next(iter(reversed(graph.nodes)))]
        while stack:
            node = stack.pop()
            if node not in found:
                found.add(node)
                fx.node.map_arg(self._needed(node), stack.append)
        return found

    def _needed(self, node: fx.Node) -> Any:
        """Return the arguments of a node on which the value of its function depends."""
        if node.target in (RECURRENCE, ATTENTION):
            gates = argument(node, "gates") if node.target is RECURRENCE else []
            return [*_qkv(node), *gates]
        if self._masks_new(node):
            return []
        if node in self.linears:
            layers = self.linears[node].layers
            return [layers[0].source, [layer.weights for layer in layers]]
        if node.target is ops.loop:
            name, carry, inputs = str(node.args[0]), node.args[1], node.args[2]
            places = self.program.bodies[name].graph.find_nodes(op="placeholder")
            rest = zip(places[len(carry) :], inputs, strict=True)  # type: ignore[arg-type]
            return [carry, [value for place, value in rest if place in self.live[name]]]
        return [node.args, node.kwargs]

    def _masks_new(self, node: fx.Node) -> bool:
        """Whether a node takes the columns of the new tokens from a padding mask."""
        if node.target is not aten.index_select.default or node.args[0] not in self.masks:
            return False
        mask, dim, columns = node.args
        total = _call_of(_call_of(columns, aten.add.Tensor, 1), operator.sub, 0)
        count = _call_of(_call_of(columns, aten.add.Tensor, 0), aten.arange.default, 0)
        behind = _call_of(_call_of(columns, aten.add.Tensor, 1), operator.sub, 1)
        sized = _call_of(total, aten.sym_size.int, 0), _call_of(total, aten.sym_size.int, 1)
        alike = isinstance(count, fx.Node) and count is behind and sized == (mask, 1)
        return alike and bool(dim == 1)

    def _function(self, name: str, graph: fx.Graph) -> str:
        live = self.live[name]
        places = [n for n in graph.nodes if n.op == "placeholder"]
        given = ["w", "run"] if name == "main" else ["w", "run", "trip"]
        if name == "main":
            given.append("input_ids")
        else:
            given += [p.name for p in places if p in live]
        lines = [f"def {self.names[name]}({', '.join(given)}):"]
        if name == "main":
            lines += self._inputs(places, live)
        for node in graph.nodes:
            if node.op == "output":
                lines.append(f"    return {self._returned(name, node)}")
            elif node in live and node.op not in ("placeholder", "get_attr"):
                lines += [f"    {line}" for line in self._lines(node)]
        return "\n".join(lines)

    def _inputs(self, places: list[fx.Node], live: set[fx.Node]) -> list[str]:
        lines = []
        for place, item in zip(places, self.program.inputs, strict=True):
            if place not in live:
                continue
            value = {"data": "input_ids"}.get(item.role)
            value = "run.position" if counts_from_zero(item) else value
            if value is None or (item.role == "data" and item.name != "input_ids"):
                raise ExportError(f"a bundle cannot provide the input {item.name}")
            if place.name != value:
                lines.append(f"    {place.name} = {value}")
        return lines

    def _returned(self, name: str, node: fx.Node) -> str:
        value: Any = node.args[0]
        if name == "main" and isinstance(value, tuple | list):
            value = value[self.program.outputs.index(LOGITS)]
        elif name != "main" and isinstance(value, fx.Node):
            value = (value,)
        return self._text(value)

    def _lines(self, node: fx.Node) -> list[str]:
        target, args, kwargs = node.target, list(node.args), dict(node.kwargs)
        if target is ops.loop:
            return self._loop(node)
        if node in self.sites:
            return [f"{node.name} = {self._state_op(node)}"]
        if self._masks_new(node):
            return [f"{node.name} = run.mask.to({node.meta['type'].dtype})"]
        if node in self.linears:
            return [f"{node.name} = {self._linear(self.linears[node])}"]
        if target is CACHE or behind_cache(node) is not None:
            # `run` holds the caches
            return []
        if node.op == "call_method":
            text = self._method(str(target), args, kwargs)
        elif target in METHODS:
            text = self._method(METHODS[target], args, kwargs)
        elif target in BINARY and len(args) == 2 and not kwargs:
            left, right = map(self._text, args)
            text = f"{left} {SYMBOLS[BINARY[target].__name__.strip('_')]} {right}"
        elif target is operator.neg:
            text = f"-{self._text(args[0])}"
        elif getattr(target, "__name__", "") == "getitem":
            text = f"{self._text(args[0])}[{self._text(args[1])}]"
        else:
            if makes_tensor_from_nothing(target):
                kwargs["device"] = _Raw("run.number.device")
            name = "Normed" if node in self.norms else self._name(target)
            text = self._call(node, name, args, kwargs)
        return [f"{node.name} = {text}"]

    def _name(self, target: Any) -> str:
        if target in FUNCTIONS:
            return FUNCTIONS[target]
        if isinstance(target, torch._ops.OpOverload) and target.namespace == "aten":
            return f"torch.ops.{str(target).replace('::', '.')}"
        raise ExportError(
            f"a bundle has no {target}",
            hint="export --target onnx knows more ops, and the saved model runs them all",
        )

    def _loop(self, node: fx.Node) -> list[str]:
        name, carry, inputs, trips = (node.args[i] for i in range(4))
        body = self.program.bodies[str(name)]
        places = [n for n in body.graph.nodes if n.op == "placeholder"]
        live = self.live[str(name)]
        carried = [p.name for p in places[: len(carry)]]  # type: ignore[arg-type]
        lines = [f"{n} = {self._text(v)}" for n, v in zip(carried, carry, strict=True)]  # type: ignore[arg-type]
        given = list(carried)
        for place, value in zip(places[len(carried) :], inputs, strict=True):  # type: ignore[arg-type]
            if place in live:
                text = self._text(value)
                given.append(f"{text}[trip]" if isinstance(value, tuple) else text)
        call = f"{self.names[str(name)]}(w.trips[{json.dumps(name)}][trip], run, trip, "
        lines += [
            f"for trip in range({trips}):",
            f"    ({', '.join(carried)},) = {call}{', '.join(given)})",
            f"{node.name} = ({', '.join(carried)},)",
        ]
        return lines

    def _state_op(self, node: fx.Node) -> str:
        site = self.sites[node]
        trip = "trip" if site.loop else "0"
        if node.target is SHORT_CONVOLUTION:
            given = [argument(node, name) for name in ("x", "weight", "bias")]
        else:
            given = [before_cache(t) for t in _qkv(node)]
        if node.target is RECURRENCE:
            given.append(argument(node, "gates"))
        tensors = ", ".join(map(self._text, given))
        return f"run.{site.kind.lower()}({site.number}, {trip}, {tensors})"

    def _linear(self, fused: Fused) -> str:
        given = [self._text(fused.layers[0].source)]
        for layer in fused.layers:
            weights = list(layer.weights)
            while weights[-1] is None:
                weights.pop()
            given.append(f"Layer({', '.join(map(self._text, weights))})")
        return f"run_linear_{self.kinds.index(fused.key)}({', '.join(given)})"

    def _method(self, name: str, args: list[Any], kwargs: dict[str, Any]) -> str:
        return self._call(None, f"{self._text(args[0])}.{name}", args[1:], kwargs)

    def _call(
        self, node: fx.Node | None, name: str, args: list[Any], kwargs: dict[str, Any]
    ) -> str:
        if name == "embedding":
            return f"F.embedding({self._text(args[1])}, {self._text(args[0])})"
        given = [self._text(a) for a in args]
        given += [f"{key}={self._text(value)}" for key, value in kwargs.items()]
        return f"{name}({', '.join(given)})"

    def _text(self, value: Any) -> str:
        if isinstance(value, fx.Node):
            if value.op == "get_attr":
                return f"w[{json.dumps(str(value.target))}]"
            return _safe(value.name)
        if isinstance(value, list | tuple):
            inner = ", ".join(map(self._text, value))
            if isinstance(value, list):
                return f"[{inner}]"
            return f"({inner},)" if len(value) == 1 else f"({inner})"
        if isinstance(value, float) and value in (float("inf"), float("-inf")):
            return f'float("{value}")'
        return str(value) if isinstance(value, torch.dtype | _Raw) else repr(value)


class _Raw(str):
    pass


def _call_of(node: Any, target: Any, argument: int) -> Any:
    """Return an argument of a call of `target`; None for anything else."""
    return node.args[argument] if isinstance(node, fx.Node) and node.target is target else None


def _qkv(node: fx.Node) -> list[Any]:
    return [argument(node, name) for name in "qkv"]


def _safe(name: str) -> str:
    found = re.sub(r"\W", "_", name)
    return f"{found}_" if keyword.iskeyword(found) else found
