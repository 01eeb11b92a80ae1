"""Graphs that replace the embeddings of image tokens by features of pictures.

A main graph with an input of the role "pictures" reads text with pictures, such as a prompt. A part
of that graph reads new tokens, and text alone.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import fx

from reroll.errors import ProgramError
from reroll.rewrite.ir.program import copy, drop_unused
from reroll.rewrite.ir.records import Input

ROLE = "pictures"
MERGE = torch.ops.aten.masked_scatter.default


def picture_inputs(inputs: Collection[Input]) -> list[str]:
    """Return the names of the inputs that hold pictures."""
    return [item.name for item in inputs if item.role == ROLE]


def text_part(
    graph: fx.Graph, pictures: Collection[str], outputs: Collection[str], merge: Any = MERGE
) -> fx.Graph:
    """Extract the part of a main graph that reads text alone.

    Outputs that depend on pictures in another way than through `merge` become None. `merge` is the
    op that writes the features into the embeddings; its first arguments are the embeddings and the
    mask of image tokens. The placeholders of `pictures` stay, unused.

    Raises ProgramError if the logits depend on pictures in another way than through `merge`.
    """
    graph = copy(graph)
    merged: set[fx.Node] = set()
    for node in graph.nodes:
        if node.op == "placeholder" and node.target in pictures:
            merged.add(node)
        if node.op == "output" or not any(n in merged for n in node.all_input_nodes):
            continue
        if node.target is merge and not {node.args[0], node.args[1]} & merged:
            node.replace_all_uses_with(node.args[0])
        else:
            merged.add(node)
    output = next(iter(reversed(graph.nodes)))
    values: Any = output.args[0]
    for name, value in zip(outputs, values, strict=True):
        if name == "logits" and value in merged:
            raise ProgramError("the logits depend on pictures in another way than by image tokens")
    output.args = (tuple(None if value in merged else value for value in values),)
    drop_unused(graph)
    return graph


def same_text(a: fx.Graph, b: fx.Graph) -> bool:
    """Whether two graphs are equal node by node, up to unused inputs."""
    return _rows(a) == _rows(b)


def _rows(graph: fx.Graph) -> list[tuple[Any, ...]]:
    numbers: dict[fx.Node, str] = {}
    rows = []
    for node in graph.nodes:
        if node.op == "placeholder" and not node.users:
            continue
        arguments = fx.node.map_arg((node.args, node.kwargs), lambda n: numbers[n])
        if node.op == "output":
            # outputs that depend on pictures are None in the part for text
            arguments = tuple(value for value in arguments[0][0] if value is not None)
        numbers[node] = f"%{len(numbers)}"
        target = numbers[node] if node.op == "output" else str(node.target)
        rows.append((node.op, target, repr(arguments)))
    return rows
