"""Build ONNX graphs: values with dtypes, nested scopes, and no repeated computation.

A node goes to the outermost scope that has all its inputs, and two equal nodes become one. So
values that are the same in every trip of a loop are computed once in front of it. Values that all
layers share (masks, rotary tables) are computed once, without further work by lowerings.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
import torch
from onnx import AttributeProto, GraphProto, NodeProto, TensorProto, ValueInfoProto, helper
from torch import Tensor

Shape = tuple[int | str | None, ...]

# the name under which lowerings to ONNX are registered
TARGET = "onnx"

ELEMENT: dict[torch.dtype, int] = {
    torch.float32: TensorProto.FLOAT,
    torch.float64: TensorProto.DOUBLE,
    torch.float16: TensorProto.FLOAT16,
    torch.bfloat16: TensorProto.BFLOAT16,
    torch.int64: TensorProto.INT64,
    torch.int32: TensorProto.INT32,
    torch.int16: TensorProto.INT16,
    torch.int8: TensorProto.INT8,
    torch.uint8: TensorProto.UINT8,
    torch.bool: TensorProto.BOOL,
}


@dataclass(frozen=True, eq=False)
class Value:
    """A tensor in an ONNX graph.

    `scope` is the graph that computes it, and graphs inside that one can read it, too. `repeated`
    says that its last dimension is one half twice, as in rotary tables. `columns` says which tokens
    the keys of a window are (see `windows`). `appended` are the tensors of which a cache was
    concatenated (see `heads`). `heads` is the value before its heads were split (see `heads`).
    """

    name: str
    dtype: torch.dtype
    scope: Graph
    repeated: bool = False
    columns: Any = None
    appended: Any = None
    heads: Any = None


@dataclass(eq=False)
class Graph:
    """One ONNX graph under construction: a model's, or the body of a Loop inside `outer`."""

    outer: Graph | None = None
    # nodes of a branch of an If stay in it if they read the outer graph, to run only if taken
    is_branch: bool = False
    nodes: list[NodeProto] = field(default_factory=list)
    inputs: list[ValueInfoProto] = field(default_factory=list)
    outputs: list[ValueInfoProto] = field(default_factory=list)
    initializers: dict[str, TensorProto] = field(default_factory=dict)
    functions: dict[str, Any] = field(default_factory=dict)
    _known: dict[Any, tuple[Value, ...]] = field(default_factory=dict)
    _names: set[str] = field(default_factory=set)

    @property
    def root(self) -> Graph:
        """Graph of the model itself."""
        return self if self.outer is None else self.outer.root

    @property
    def depth(self) -> int:
        """Number of graphs around this one."""
        return 0 if self.outer is None else 1 + self.outer.depth

    # ---- nodes

    def op(self, kind: str, *inputs: Value | None, hint: str = "", **attributes: Any) -> Value:
        """Add one node with one output; `dtype` is the output's, by default the first input's."""
        return self.ops(kind, *inputs, hints=(hint or kind.lower(),), **attributes)[0]

    def ops(
        self,
        kind: str,
        *inputs: Value | None,
        hints: Sequence[str] = (),
        dtype: torch.dtype | None = None,
        domain: str = "",
        **attributes: Any,
    ) -> tuple[Value, ...]:
        """Add one node with an output for each hint, or return the outputs of an equal one.

        Absent inputs are None. `dtype` is the outputs', by default the first input's.
        """
        # fusions of ONNX Runtime crash on an empty name at the end; a function needs all its inputs
        while not domain and inputs and inputs[-1] is None:
            inputs = inputs[:-1]
        given = [v for v in inputs if v is not None]
        place = max((v.scope for v in given), key=lambda g: g.depth, default=self.root)
        if self.is_branch and place is self.outer:
            place = self
        key = (
            kind,
            domain,
            tuple(v and v.name for v in inputs),
            _frozen({k: v for k, v in attributes.items() if v is not None}),
        )
        known = place._known.get(key)
        if known is not None and len(known) == len(hints):
            return known
        if dtype is None:
            dtype = given[0].dtype
        outputs = tuple(Value(place.fresh(hint), dtype, place) for hint in hints)
        place.nodes.append(
            helper.make_node(
                kind,
                [v.name if v is not None else "" for v in inputs],
                [v.name for v in outputs],
                name=f"{outputs[0].name}/{kind}",
                domain=domain,
                **{k: v for k, v in attributes.items() if v is not None},
            )
        )
        place._known[key] = outputs
        return outputs

    def fresh(self, hint: str) -> str:
        """Return a name that no other value of the model has."""
        hint = re.sub(r"[^\w.]", "_", hint) or "value"
        names = self.root._names
        name = hint
        for number in itertools.count(1):
            if name not in names:
                break
            name = f"{hint}_{number}"
        names.add(name)
        return name

    def reserve(self, names: Iterable[str]) -> None:
        """Reserve names for later use."""
        self.root._names.update(names)

    # ---- constants, inputs and outputs

    def constant(self, data: Any, dtype: torch.dtype) -> Value:
        """Return a small tensor inside the file; equal tensors are stored once."""
        root = self.root
        tensor = torch.as_tensor(data).to(dtype)
        array = array_of(tensor)
        key = ("constant", str(dtype), array.shape, array.tobytes())
        if key not in root._known:
            name = root.fresh("constant")
            proto = helper.make_tensor(
                name, ELEMENT[dtype], list(array.shape), array.tobytes(), raw=True
            )
            root.initializers[name] = proto
            root._known[key] = (Value(name, dtype, root),)
        return root._known[key][0]

    def stored(self, name: str, proto: TensorProto, dtype: torch.dtype) -> Value:
        """Return a tensor of the weight file, under its name there."""
        root = self.root
        key = ("stored", name)
        if key not in root._known:
            root._names.add(name)
            root.initializers[name] = proto
            root._known[key] = (Value(name, dtype, root),)
        return root._known[key][0]

    def input(self, name: str, dtype: torch.dtype, shape: Shape | None) -> Value:
        """Add an input of this graph."""
        self.root._names.add(name)
        self.inputs.append(type_of(name, dtype, shape))
        return Value(name, dtype, self)

    def default_input(self, name: str, tensor: Tensor) -> Value:
        """Add an input of the model that may be left out."""
        if name not in self.initializers:
            array = array_of(tensor)
            self.initializers[name] = helper.make_tensor(
                name, ELEMENT[tensor.dtype], list(array.shape), array.tobytes(), raw=True
            )
            self.input(name, tensor.dtype, tuple(tensor.shape))
        return Value(name, tensor.dtype, self)

    def output(self, value: Value, name: str, shape: Shape | None) -> None:
        """Make a value an output of this graph, under a separate name."""
        self.reserve([name])
        # an Identity node, because a value may be two outputs, or also an input
        self.nodes.append(helper.make_node("Identity", [value.name], [name], name=f"{name}/output"))
        self.outputs.append(type_of(name, value.dtype, shape))

    def finish(self, name: str) -> GraphProto:
        """Build the graph, without nodes and initializers that no output depends on."""
        nodes = live(self.nodes, {o.name for o in self.outputs})
        used = {name for node in nodes for name in reads(node)}
        return helper.make_graph(
            nodes,
            name,
            self.inputs,
            self.outputs,
            initializer=[t for n, t in self.initializers.items() if n in used],
        )


def type_of(name: str, dtype: torch.dtype, shape: Shape | None) -> ValueInfoProto:
    """Return the type of a graph's input or output; symbolic dimensions are names."""
    return helper.make_tensor_value_info(name, ELEMENT[dtype], shape)


def array_of(tensor: Tensor) -> Any:
    """Convert a tensor to numpy; bfloat16, which numpy lacks, becomes its bits."""
    tensor = tensor.detach().contiguous()
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy()
    return tensor.numpy()


def nodes_of(graph: GraphProto) -> Iterable[NodeProto]:
    """Yield all nodes of a graph, including those of bodies."""
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            if attribute.type == AttributeProto.GRAPH:
                yield from nodes_of(attribute.g)


def reads(node: NodeProto) -> Iterable[str]:
    """Yield the names that a node reads, including those that its bodies read from outside."""
    yield from (n for n in node.input if n)
    for attribute in node.attribute:
        if attribute.type == AttributeProto.GRAPH:
            made = {i.name for i in attribute.g.input}
            made |= {o for inner in attribute.g.node for o in inner.output}
            inner_reads = {n for inner in attribute.g.node for n in reads(inner)}
            inner_reads |= {o.name for o in attribute.g.output}
            yield from inner_reads - made


def live(nodes: Sequence[NodeProto], wanted: set[str]) -> list[NodeProto]:
    """Return the nodes on which a wanted value depends, in the same order."""
    wanted = set(wanted)
    kept = []
    for node in reversed(nodes):
        if any(output in wanted for output in node.output):
            kept.append(node)
            wanted.update(reads(node))
    return kept[::-1]


def _frozen(attributes: dict[str, Any]) -> Any:
    return tuple(
        (key, tuple(value) if isinstance(value, list) else id(value) if _is_proto(value) else value)
        for key, value in sorted(attributes.items())
    )


def _is_proto(value: Any) -> bool:
    return isinstance(value, onnx.GraphProto | onnx.TensorProto | np.ndarray)
