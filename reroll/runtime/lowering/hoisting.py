"""Move values that are the same in every trip out of a loop's body, to compute them once.

A body computes some values from the loop's inputs alone: `cos.unsqueeze(1)`, a slice of a bias, a
cast of the padding mask. They are computed before the loop, and the body takes them as inputs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx
from torch._ops import OpOverload

from reroll.rewrite.ir.ops import is_pure
from reroll.rewrite.ir.program import Loop, Program


def hoist_invariants(program: Program) -> Program:
    """Return a Program whose bodies compute no value that is the same in every trip."""
    program = program.edit()
    for loop in program.loops:
        _hoist(program.graph, loop)
        loop.body.graph.eliminate_dead_code()
        loop.drop_unused_inputs()
    program.graph.eliminate_dead_code()
    return program


# the arguments that lowering adds: a body's cache layers, and the main graph's `ForwardState`
OWN_INPUTS = ("past_key_values", "state")


def placeholders(graph: fx.Graph) -> list[fx.Node]:
    """Return the placeholders that a graph had in the Program, in order."""
    return [n for n in graph.nodes if n.op == "placeholder" and n.target not in OWN_INPUTS]


def is_size(node: fx.Node) -> bool:
    """Whether a node is a size of a tensor or its device, or arithmetic on sizes.

    Another tensor of the same size can provide it. A tensor that is made of sizes is none.
    """
    if node.op == "call_method":
        return node.target == "size"
    if node.target is getattr:
        return node.args[1] == "device"
    if node.target is torch.ops.aten.sym_size.int:
        return True
    inputs = node.all_input_nodes
    python = node.op == "call_function" and not isinstance(node.target, OpOverload)
    return python and bool(inputs) and all(map(is_size, inputs))


def outer_values(loop: Loop) -> dict[fx.Node, tuple[Any, ...]]:
    """Return the value, trip by trip, that each input placeholder of a body has outside of it."""
    inputs = loop.places[len(loop.carry) :]
    return {
        node: tuple(loop.input_for(position, trip) for trip in range(loop.trips))
        for position, node in enumerate(inputs)
    }


def _hoist(main: fx.Graph, loop: Loop) -> None:
    known = outer_values(loop)
    moved: dict[fx.Node, fx.Node] = {}
    for node in loop.body.graph.nodes:
        if node.op != "call_function" or not is_pure(node):
            continue
        if not all(argument in known for argument in node.all_input_nodes):
            continue
        calls = []
        for trip in range(loop.trips):
            values = {n: known[n][trip] for n in node.all_input_nodes}
            calls.append(fx.node.map_arg((node.args, node.kwargs), values.__getitem__))
        if any(call != calls[0] for call in calls):
            continue
        with main.inserting_before(loop.node):
            new = main.create_node("call_function", node.target, *calls[0], name=node.name)
        new.meta.update(node.meta)
        moved[node], known[node] = new, (new,) * loop.trips
    for node, new in moved.items():
        if any(user not in moved for user in node.users):
            node.replace_all_uses_with(
                loop.add_input(node.name, new), delete_user_cb=lambda user: user not in moved
            )
    for node in reversed(moved):
        loop.body.graph.erase_node(node)
