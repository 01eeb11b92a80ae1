"""Split a body with exits into graphs that run a trip, decide about exits, and fill caches."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import fx

from reroll.rewrite.analysis.state_plan import stateful_nodes
from reroll.rewrite.ir.exits import Exits
from reroll.rewrite.ir.ops import CACHE, HOLD, MARK_KEYS, RECURRENCE, is_stateful
from reroll.rewrite.ir.program import Loop
from reroll.runtime.functions.exits import LoopExits
from reroll.runtime.lowering.hoisting import OWN_INPUTS, is_size


class Split(NamedTuple):
    """The `test` and `fill` graphs of a body, and the copies of its stateful nodes in each.

    `layers` is the node of the cache layers in `test`, or None if the test has no state.
    """

    test: fx.Graph
    fill: fx.Graph
    tested: dict[fx.Node, fx.Node]
    filled: dict[fx.Node, fx.Node]
    layers: fx.Node | None


def split_exits(loop: Loop, exits: Exits) -> Split:
    """Move the exit tests out of a body, in place, and return the graphs `test` and `fill`.

    `test` takes the carry before the trip, the carry after it, and the loop's inputs. It returns
    the carry with its decisions. `fill` takes the same arguments as the body.
    """
    body = loop.body.graph
    output = body.output_node()
    returned: Any = output.args[0]
    placeholders, width = loop.places, len(loop.carry)
    test = fx.Graph()
    values: dict[fx.Node, fx.Node] = {}
    for number, placeholder in enumerate(placeholders[:width]):
        values[placeholder] = test.placeholder(f"old_{number}")
    new = [test.placeholder(f"new_{number}") for number in range(width)]
    for placeholder in placeholders[width:]:
        values[placeholder] = test.placeholder(placeholder.name)
    layers = None
    if any(map(is_stateful, exits.tests)):
        layers = test.create_node("placeholder", OWN_INPUTS[0], (None,), name=OWN_INPUTS[0])
    for number, node in enumerate(returned):
        if number not in exits.decided and node.op != "placeholder":
            values[node] = new[number]
    for node in body.nodes:
        if node in exits.tests and node not in values:
            values[node] = test.node_copy(node, lambda n: values[n])
    decided = [values[n] if i in exits.decided else new[i] for i, n in enumerate(returned)]
    test.output(tuple(decided))
    tested = {node: values[node] for node in exits.tests if is_stateful(node)}
    output.args = (
        tuple(placeholders[i] if i in exits.decided else n for i, n in enumerate(returned)),
    )
    body.eliminate_dead_code()
    fill = fx.Graph()
    filled: dict[fx.Node, fx.Node] = {}
    fill.graph_copy(body, filled)
    fill.output(tuple(filled[n] for n in stateful_nodes(body)))
    fill.eliminate_dead_code()
    return Split(test, fill, tested, filled, layers)


def loop_exits(loop: Loop, exits: Exits) -> LoopExits:
    """Return the properties of a loop's exits."""
    body = loop.body.graph
    returned: Any = body.output_node().args[0]
    layers = [n for n in stateful_nodes(body) if n not in exits.tests]
    # a body that gets the number of rows as an input cannot run for fewer
    reads_batch = any(isinstance(n, fx.Node) and is_size(n) for n in loop.inputs)
    holds = returned[0].target is HOLD
    marks = any(n.target is MARK_KEYS for n in body.nodes)
    return LoopExits(
        exits.left_position,
        exits.thresholds,
        holds,
        compact=holds and not reads_batch,
        marks_absent=marks and all(n.target is CACHE for n in layers),
        caches=len(layers),
        test_has_state=any(n.target is RECURRENCE for n in exits.tests),
    )
