"""A body with exits taken apart into what runs a trip, what decides, and what fills caches."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from reroll.rewrite.analysis.state_plan import is_stateful, stateful_nodes
from reroll.rewrite.ir.exits import Exits
from reroll.rewrite.ir.ops import CACHE, HOLD, MARK_KEYS, RECURRENCE
from reroll.rewrite.ir.program import Loop
from reroll.runtime.lowering.hoisting import OWN_INPUTS


@dataclass
class LoopExits:
    """What a running loop needs to know of its exits.

    `holds`: what is carried first stays as it is for tokens that are done; `compact`: rows of them
    can be left out. `absent`: layers that they skip only have to know that they are not there;
    `caches` is how many there are in a trip. `keeps`: the test has state of its own, so that it
    needs the cache layers.
    """

    done: int
    thresholds: tuple[float, ...]
    holds: bool
    compact: bool
    absent: bool
    caches: int
    keeps: bool


@dataclass
class Split:
    """The functions beside `forward`, and what each node of the body that owns state is in them.

    `layers` is the node of the cache layers in `test`; None if it has no state.
    """

    test: fx.Graph
    fill: fx.Graph
    tested: dict[fx.Node, fx.Node]
    filled: dict[fx.Node, fx.Node]
    layers: fx.Node | None


def split_exits(loop: Loop, exits: Exits) -> Split:
    """Take the tests out of a body, in place.

    `test` takes the carry from before the trip, that from after it, and the loop's inputs, and
    returns the carry with what was decided. `fill` takes what the body takes.
    """
    body = loop.body.graph
    output = body.output_node()
    returned: Any = output.args[0]
    places, width = loop.places, len(loop.carry)
    test = fx.Graph()
    values: dict[fx.Node, fx.Node] = {}
    for number, place in enumerate(places[:width]):
        values[place] = test.placeholder(f"old_{number}")
    new = [test.placeholder(f"new_{number}") for number in range(width)]
    for place in places[width:]:
        values[place] = test.placeholder(place.name)
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
    output.args = (tuple(places[i] if i in exits.decided else n for i, n in enumerate(returned)),)
    body.eliminate_dead_code()
    fill = fx.Graph()
    filled: dict[fx.Node, fx.Node] = {}
    fill.graph_copy(body, filled)
    fill.output(tuple(filled[n] for n in stateful_nodes(body)))
    fill.eliminate_dead_code()
    return Split(test, fill, tested, filled, layers)


def loop_exits(loop: Loop, exits: Exits) -> LoopExits:
    """The exits of a loop for running it."""
    body = loop.body.graph
    returned: Any = body.output_node().args[0]
    layers = [n for n in stateful_nodes(body) if n not in exits.tests]
    # a body that is told how many rows there are cannot run for fewer
    told = any(isinstance(n, fx.Node) and _is_size(n) for n in loop.inputs)
    holds = returned[0].target is HOLD
    marks = any(n.target is MARK_KEYS for n in body.nodes)
    absent = marks and all(n.target is CACHE for n in layers)
    keeps = any(n.target is RECURRENCE for n in exits.tests)
    return LoopExits(
        exits.done, exits.thresholds, holds, holds and not told, absent, len(layers), keeps
    )


def _is_size(node: fx.Node) -> bool:
    if node.target is torch.ops.aten.sym_size.int:
        return True
    inputs = node.all_input_nodes
    # arithmetic on sizes; what makes a tensor of them is none
    own = not isinstance(node.target, torch._ops.OpOverload)
    return own and bool(inputs) and all(map(_is_size, inputs))
