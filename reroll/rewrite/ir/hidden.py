"""Marks on nodes for the original's `hidden_states` and `attentions`, set by capture.

A mark is in a node's metadata, under `HIDDEN`: the names of the outputs that the node gives an
entry of. With a name of `STATES`, the entry is the node's value. With a name of `WEIGHTS`, it is
the attention weights of an attention op, and the value of any other node. In a loop's body a mark
holds for every trip; on a placeholder it marks the input of every trip. The entries of an output
are in the order in which they are computed.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import TYPE_CHECKING

from torch import fx

if TYPE_CHECKING:
    from reroll.rewrite.ir.program import Program


HIDDEN = "hidden"
# the names of these outputs in transformers
STATES = ("hidden_states", "encoder_hidden_states", "decoder_hidden_states")
WEIGHTS = ("attentions", "encoder_attentions", "decoder_attentions", "cross_attentions")
NAMES = (*STATES, *WEIGHTS)
# in the remark of a pass that leaves a model without attention weights
NO_WEIGHTS = "no attention weights"


def marks(node: fx.Node, among: Collection[str] = NAMES) -> tuple[str, ...]:
    """Return the outputs that a node gives an entry of."""
    names: tuple[str, ...] = node.meta.get(HIDDEN, ())
    return tuple(name for name in names if name in among)


def mark(node: fx.Node, names: tuple[str, ...]) -> None:
    """Add these marks to those of a node."""
    if names:
        node.meta[HIDDEN] = (*marks(node), *names)


def unmark(node: fx.Node, among: Collection[str] = NAMES) -> tuple[str, ...]:
    """Remove and return a node's marks."""
    names = marks(node, among)
    kept = tuple(name for name in marks(node) if name not in among)
    node.meta.pop(HIDDEN, None)
    mark(node, kept)
    return names


def stand_in(node: fx.Node, new: fx.Node) -> None:
    """Replace a node by another in all uses, and move its marks."""
    mark(new, unmark(node))
    node.replace_all_uses_with(new)


def count(graph: fx.Graph, among: Collection[str] = NAMES) -> int:
    """Count the marks on the nodes of a graph."""
    return sum(len(marks(node, among)) for node in graph.nodes)


def marked_names(program: Program, among: Collection[str] = NAMES) -> Iterator[str]:
    """Yield the outputs of which the Program has marks, in the order of `NAMES`."""
    marked = {name for _, graph in program.graphs() for node in graph.nodes for name in marks(node)}
    yield from (name for name in NAMES if name in marked and name in among)


def drop_marks(program: Program, among: Collection[str] = NAMES) -> None:
    """Remove all marks, in place: with one missing, the entries would be numbered wrongly."""
    for _, graph in program.graphs():
        for node in graph.nodes:
            unmark(node, among)


def keep_complete(program: Program, before: Program) -> None:
    """Remove all marks of a kind, in place, if a rewrite of `before` has lost some of them."""
    for among in (STATES, WEIGHTS):
        old = {name: count(graph, among) for name, graph in before.graphs()}
        if any(count(graph, among) < old.get(name, 0) for name, graph in program.graphs()):
            drop_marks(program, among)
