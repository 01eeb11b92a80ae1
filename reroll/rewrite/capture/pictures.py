"""Pictures beside text: a graph puts what it makes of them in the place of tokens.

A main graph with an input of the role "pictures" reads text with pictures, such as a prompt. New
tokens, and text alone, are read by a part of it.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import fx

from reroll.errors import ProgramError
from reroll.rewrite.ir.program import copy
from reroll.rewrite.ir.records import Input

ROLE = "pictures"
MERGE = torch.ops.aten.masked_scatter.default


def picture_inputs(inputs: Collection[Input]) -> list[str]:
    """The names of the inputs that hold pictures."""
    return [item.name for item in inputs if item.role == ROLE]


def text_part(
    graph: fx.Graph, pictures: Collection[str], outputs: Collection[str], merge: Any = MERGE
) -> fx.Graph:
    """The part of a main graph that reads text alone; an output made of pictures is None.

    `merge` is the function that puts them into the embeddings, with those and their places as its
    first arguments. The placeholders of `pictures` stay, unused.

    Raises ProgramError if the text depends on pictures in another way than through tokens whose
    places they take.
    """
    graph = copy(graph)
    seen: set[fx.Node] = set()
    for node in graph.nodes:
        if node.op == "placeholder" and node.target in pictures:
            seen.add(node)
        if node.op == "output" or not any(n in seen for n in node.all_input_nodes):
            continue
        if node.target is merge and not {node.args[0], node.args[1]} & seen:
            node.replace_all_uses_with(node.args[0])
        else:
            seen.add(node)
    output = next(iter(reversed(graph.nodes)))
    values: Any = output.args[0]
    for name, value in zip(outputs, values, strict=True):
        if name == "logits" and value in seen:
            raise ProgramError("the text depends on pictures that do not stand for tokens")
    output.args = (tuple(None if value in seen else value for value in values),)
    # nothing here acts beside its result
    graph.eliminate_dead_code(is_impure_node=lambda node: node.op in ("placeholder", "output"))
    return graph


def same_text(a: fx.Graph, b: fx.Graph) -> bool:
    """Whether two graphs compute the same of the inputs that they use, node by node."""
    return _rows(a) == _rows(b)


def _rows(graph: fx.Graph) -> list[tuple[Any, ...]]:
    numbers: dict[fx.Node, str] = {}
    rows = []
    for node in graph.nodes:
        if node.op == "placeholder" and not node.users:
            continue
        arguments = fx.node.map_arg((node.args, node.kwargs), lambda n: numbers[n])
        if node.op == "output":
            # without what pictures alone make
            arguments = tuple(value for value in arguments[0][0] if value is not None)
        numbers[node] = f"%{len(numbers)}"
        target = numbers[node] if node.op == "output" else str(node.target)
        rows.append((node.op, target, repr(arguments)))
    return rows
