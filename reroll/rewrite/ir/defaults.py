"""Defaults of inputs that a caller leaves out.

Most follow from the sizes of other inputs, by the input's role. A default that depends on the
values of other inputs, such as positions counted from the padding token on, is a small graph,
`Input.default`. It is part of the Program like the main graph: the interpreter runs it, the lowered
module compiles it, and exporters write it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils._pytree import tree_leaves

from reroll.rewrite.ir.program import Program, ancestors
from reroll.rewrite.ir.records import Input

SIZE = torch.ops.aten.sym_size.int

# candidates for an ordinary token id; the first that no default tests for is used
_IDS = range(2**10)


def reads(item: Input) -> tuple[str, ...]:
    """Return the inputs that an input's default is computed from."""
    if item.default is None:
        return ()
    return tuple(str(n.target) for n in item.default.nodes if n.op == "placeholder")


def looks_into(item: Input) -> frozenset[str]:
    """Return the inputs whose values, and not only sizes, an input's default is computed from."""
    graph = fx.Graph() if item.default is None else item.default
    return frozenset(
        str(n.target)
        for n in graph.nodes
        if n.op == "placeholder" and any(u.target is not SIZE for u in n.users)
    )


def run_default(item: Input, inputs: Mapping[str, Any]) -> Any:
    """Compute the default of an input from the other inputs by name."""
    assert item.default is not None
    (output,) = item.default.output_node().all_input_nodes
    return evaluate(output, inputs)


def evaluate(
    node: fx.Node, inputs: Mapping[str, Any], constants: Mapping[str, Tensor] | None = None
) -> Any:
    """Compute the value of a node, given the inputs and the weights that it depends on.

    Raises KeyError for an input or weight that is not given.
    """
    needed = ancestors([node])
    values: dict[fx.Node, Any] = {}
    for each in node.graph.nodes:
        if each not in needed:
            continue
        if each.op == "placeholder":
            values[each] = inputs[str(each.target)]
        elif each.op == "get_attr":
            values[each] = (constants or {})[str(each.target)]
        else:
            function: Callable[..., Any] = each.target
            args = fx.node.map_arg(each.args, values.__getitem__)
            kwargs = fx.node.map_arg(each.kwargs, values.__getitem__)
            values[each] = function(*args, **kwargs)
    return values[node]


def fitted(item: Input, tensor: Tensor, batch: int) -> Tensor:
    """Expand one row of an input's value to the whole batch, as transformers does."""
    rank = len(item.type.shape)
    if (item.role == "data" and item.default is None) or item.type.shape[:1] != ("b",):
        return tensor
    if tensor.dim() < rank or (tensor.dim() == rank and tensor.shape[0] == 1 != batch):
        return tensor.expand(batch, *tensor.shape[1 if tensor.dim() >= rank else 0 :])
    return tensor


def ordinary_token(program: Program) -> int:
    """Return a token id that is not the padding token and that no graph tests for."""
    graphs = [program.graph, *(i.default for i in program.inputs if i.default is not None)]
    special = {program.origin.config.get("pad_token_id"), *(n for g in graphs for n in numbers(g))}
    return next(i for i in _IDS if i not in special)


def numbers(graph: fx.Graph) -> set[int]:
    """Return the integer constants among a graph's arguments."""
    return {
        leaf
        for node in graph.nodes
        if node.op == "call_function"
        for leaf in tree_leaves((node.args, node.kwargs))
        if isinstance(leaf, int) and not isinstance(leaf, bool)
    }


def first_position(item: Input) -> int | None:
    """Return the first position if positions count the unpadded tokens, else None."""
    if not item.counts or item.default is None:
        return 0 if item.counts else None
    special = numbers(item.default)
    ids = torch.full((1, 5), next(i for i in _IDS if i not in special))
    names = reads(item)
    past = 2 if any("mask" in name for name in names) else 0
    mask = torch.ones(1, 5 + past, dtype=torch.long)
    positions = run_default(item, {name: mask if "mask" in name else ids for name in names})
    first = int(positions[0, 0]) - past
    return first if bool((positions == torch.arange(5) + past + first).all()) else None


def counts_from_zero(item: Input) -> bool:
    """Whether an input holds positions 0, 1, 2, ... if there is no padding."""
    return first_position(item) == 0


def extract(node: fx.Node, order: Collection[str]) -> fx.Graph:
    """Extract the graph of one node, over the inputs that it depends on, in `order`."""
    needed = ancestors([node])
    places = {str(n.target): n for n in needed if n.op == "placeholder"}
    graph = fx.Graph()
    values: dict[fx.Node, fx.Node] = {}
    for name in order:
        if name in places:
            values[places[name]] = new = graph.create_node("placeholder", name, name=name)
            new.meta.update(places[name].meta)
    for each in node.graph.nodes:
        if each in needed and each not in values:
            values[each] = graph.node_copy(each, values.__getitem__)
    graph.output((values[node],))
    return graph


def needed_inputs(program: Program, names: Collection[str]) -> set[str]:
    """Return these inputs and those that their defaults are computed from."""
    needed = set(names)
    for item in reversed(program.inputs):
        if item.name in needed:
            needed.update(reads(item))
    return needed
