"""Inputs that a caller leaves out, and what stands in their place.

Most follow from the sizes of other inputs, and an input's role says how. What a model computes from
the values of other inputs, such as positions counted behind its padding token, is a small graph,
`Input.default`. It is part of the Program like the main graph: interpreters run it, the lowered
module compiles it, exporters write it out.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from torch import Tensor, fx

from reroll.rewrite.ir.program import Program, ancestors
from reroll.rewrite.ir.records import Input

SIZE = torch.ops.aten.sym_size.int

# ids in the place of tokens that are given as embeddings, the first that no default asks for
_IDS = range(2**10)


def reads(item: Input) -> tuple[str, ...]:
    """The inputs that an input's default is computed from."""
    if item.default is None:
        return ()
    return tuple(str(n.target) for n in item.default.nodes if n.op == "placeholder")


def looks_into(item: Input) -> frozenset[str]:
    """The inputs whose values an input's default is computed from, and not their sizes alone."""
    graph = fx.Graph() if item.default is None else item.default
    return frozenset(
        str(n.target)
        for n in graph.nodes
        if n.op == "placeholder" and any(u.target is not SIZE for u in n.users)
    )


def run_default(item: Input, given: Mapping[str, Any]) -> Any:
    """The default of an input, computed from the other inputs by name."""
    assert item.default is not None
    (output,) = item.default.output_node().all_input_nodes
    return evaluate(output, given)


def evaluate(
    node: fx.Node, given: Mapping[str, Any], constants: Mapping[str, Tensor] | None = None
) -> Any:
    """What a node of a graph is, given the inputs and the weights that it depends on.

    Raises KeyError for one that is not given.
    """
    needed = ancestors([node])
    values: dict[fx.Node, Any] = {}
    for each in node.graph.nodes:
        if each not in needed:
            continue
        if each.op == "placeholder":
            values[each] = given[str(each.target)]
        elif each.op == "get_attr":
            values[each] = (constants or {})[str(each.target)]
        else:
            function: Callable[..., Any] = each.target
            args = fx.node.map_arg(each.args, values.__getitem__)
            kwargs = fx.node.map_arg(each.kwargs, values.__getitem__)
            values[each] = function(*args, **kwargs)
    return values[node]


def fitted(item: Input, tensor: Tensor, batch: int) -> Tensor:
    """A value of an input for a whole batch: one row stands for all, as it does in transformers."""
    rank = len(item.type.shape)
    if (item.role == "data" and item.default is None) or item.type.shape[:1] != ("b",):
        return tensor
    if tensor.dim() < rank or (tensor.dim() == rank and tensor.shape[0] == 1 != batch):
        return tensor.expand(batch, *tensor.shape[1 if tensor.dim() >= rank else 0 :])
    return tensor


def ordinary_token(program: Program) -> int:
    """A token id that neither the model nor a default takes for padding or anything else."""
    graphs = [program.graph, *(i.default for i in program.inputs if i.default is not None)]
    special = {program.origin.config.get("pad_token_id"), *(n for g in graphs for n in numbers(g))}
    return next(i for i in _IDS if i not in special)


def numbers(graph: fx.Graph) -> set[int]:
    """The whole numbers that stand in a graph."""
    found: set[int] = set()

    def look(value: Any) -> None:
        if isinstance(value, tuple | list):
            for item in value:
                look(item)
        elif isinstance(value, int) and not isinstance(value, bool):
            found.add(value)

    for node in graph.nodes:
        if node.op == "call_function":
            look((*node.args, *node.kwargs.values()))
    return found


def first_position(item: Input) -> int | None:
    """Where positions begin if they count the tokens wherever nothing is padded, else None."""
    if not item.counts or item.default is None:
        return 0 if item.counts else None
    special = numbers(item.default)
    ids = torch.full((1, 5), next(i for i in _IDS if i not in special))
    names = reads(item)
    past = 2 if any("mask" in name for name in names) else 0
    seen = torch.ones(1, 5 + past, dtype=torch.long)
    positions = run_default(item, {name: seen if "mask" in name else ids for name in names})
    first = int(positions[0, 0]) - past
    return first if bool((positions == torch.arange(5) + past + first).all()) else None


def counts_from_zero(item: Input) -> bool:
    """Whether an input holds positions that are 0, 1, 2, ... wherever nothing is padded."""
    return first_position(item) == 0


def extract(node: fx.Node, order: Collection[str]) -> fx.Graph:
    """The graph of one node over the inputs that it depends on, which come in `order`."""
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
    """These inputs, and those that their defaults are computed from."""
    found = set(names)
    for item in reversed(program.inputs):
        if item.name in found:
            found.update(reads(item))
    return found
