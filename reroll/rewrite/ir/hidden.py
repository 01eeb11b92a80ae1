"""Marks on the nodes whose values are the original's `hidden_states`, set by capture.

A mark is in a node's metadata, under `HIDDEN`: the names of the outputs that the value is an entry
of. In a loop's body it holds for every trip; on a placeholder it marks the input of every trip. The
entries of an output are the marked values in the order in which they are computed.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from torch import fx

if TYPE_CHECKING:
    from reroll.rewrite.ir.program import Program


HIDDEN = "hidden"
# the names of these outputs in transformers
NAMES = ("hidden_states", "encoder_hidden_states", "decoder_hidden_states")


def marks(node: fx.Node) -> tuple[str, ...]:
    """Return the outputs that a node's value is an entry of."""
    names: tuple[str, ...] = node.meta.get(HIDDEN, ())
    return names


def mark(node: fx.Node, names: tuple[str, ...]) -> None:
    """Add these marks to those of a node."""
    if names:
        node.meta[HIDDEN] = (*marks(node), *names)


def unmark(node: fx.Node) -> tuple[str, ...]:
    """Remove and return a node's marks."""
    names: tuple[str, ...] = node.meta.pop(HIDDEN, ())
    return names


def stand_in(node: fx.Node, new: fx.Node) -> None:
    """Replace a node by another in all uses, and move its marks."""
    mark(new, unmark(node))
    node.replace_all_uses_with(new)


def count(graph: fx.Graph) -> int:
    """Count the marks on the nodes of a graph."""
    return sum(len(marks(node)) for node in graph.nodes)


def hidden_names(program: Program) -> Iterator[str]:
    """Yield the outputs of which the Program has marks, in the order of `NAMES`."""
    marked = {name for _, graph in program.graphs() for node in graph.nodes for name in marks(node)}
    yield from (name for name in NAMES if name in marked)


def drop_marks(program: Program) -> None:
    """Remove all marks, in place: with one missing, the entries would be numbered wrongly."""
    for _, graph in program.graphs():
        for node in graph.nodes:
            unmark(node)


def keep_complete(program: Program, before: Program) -> None:
    """Remove all marks, in place, if a rewrite of `before` has lost some of them."""
    old = {name: count(graph) for name, graph in before.graphs()}
    if any(count(graph) < old.get(name, 0) for name, graph in program.graphs()):
        drop_marks(program)


def take_marks(graph: fx.Graph, outputs: tuple[str, ...]) -> tuple[str, ...]:
    """Turn hidden states among a flat graph's outputs into marks, in place; return the others.

    The name of an entry is `NAME.<number>`. Nothing is marked if an entry is no computed value, or
    if dead-code elimination removes one.
    """
    node = graph.output_node()
    pairs = list(zip(outputs, node.args[0], strict=True))  # type: ignore[arg-type]
    entries = [(name, value) for name, value in pairs if name.split(".")[0] in NAMES]
    for name, value in entries:
        mark(value, (name.split(".")[0],))
    kept = [(name, value) for name, value in pairs if name.split(".")[0] not in NAMES]
    node.args = (tuple(value for _, value in kept),)
    graph.eliminate_dead_code()
    whole = all(value.op == "call_function" for _, value in entries)
    if not whole or count(graph) != len(entries):
        for each in graph.nodes:
            unmark(each)
    return tuple(name for name, _ in kept)
