"""Which values of a Program are the original's `hidden_states`: marks on nodes, found by capture.

A mark is in a node's metadata, under `HIDDEN`: the names of the outputs whose next entry the value
is. In a loop's body it holds for every trip, and on a placeholder for what a trip is given. The
entries of an output are the marked values in the order in which they are computed.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from torch import fx

if TYPE_CHECKING:
    from reroll.rewrite.ir.program import Program


HIDDEN = "hidden"
# what transformers calls these outputs
NAMES = ("hidden_states", "encoder_hidden_states", "decoder_hidden_states")


def marks(node: fx.Node) -> tuple[str, ...]:
    """The outputs that a node's value is an entry of."""
    found: tuple[str, ...] = node.meta.get(HIDDEN, ())
    return found


def mark(node: fx.Node, names: tuple[str, ...]) -> None:
    """Give a node these marks beside those that it has."""
    if names:
        node.meta[HIDDEN] = (*marks(node), *names)


def unmark(node: fx.Node) -> tuple[str, ...]:
    """Take a node's marks from it; returns them."""
    found: tuple[str, ...] = node.meta.pop(HIDDEN, ())
    return found


def stand_in(node: fx.Node, new: fx.Node) -> None:
    """Let one node be used in the place of another, also as a hidden state."""
    mark(new, unmark(node))
    node.replace_all_uses_with(new)


def count(graph: fx.Graph) -> int:
    """How many marks the nodes of a graph have."""
    return sum(len(marks(node)) for node in graph.nodes)


def named(program: Program) -> Iterator[str]:
    """The outputs that the Program has marks of, in order."""
    found = {name for _, graph in program.graphs() for node in graph.nodes for name in marks(node)}
    yield from (name for name in NAMES if name in found)


def drop_marks(program: Program) -> None:
    """Take all marks away, in place: with one missing, the others would be counted wrongly."""
    for _, graph in program.graphs():
        for node in graph.nodes:
            unmark(node)


def keep_complete(program: Program, before: Program) -> None:
    """Take all marks away, in place, if a rewrite of `before` has lost some of a graph."""
    old = {name: count(graph) for name, graph in before.graphs()}
    if any(count(graph) < old.get(name, 0) for name, graph in program.graphs()):
        drop_marks(program)


def take_marks(graph: fx.Graph, outputs: tuple[str, ...]) -> tuple[str, ...]:
    """Turn the entries among a flat graph's outputs into marks, in place; returns the others.

    The name of an entry is `NAME.<number>`. Nothing is marked if an entry is no value of its own.
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
