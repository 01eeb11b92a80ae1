"""Split a depth loop into several, and pack several of its trips into one.

    program, (before, window, after) = split_loop(program, loop, [10, 20])
    program, window = pack_trips(program, window, 10)

After this the window is a loop of one trip that runs ten layers. A pass can repeat it, or change
its carry, without changing the layers before and after it. Both rewrites are exact: the same ops
run on the same weights in the same order.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

from torch import fx

from reroll.errors import ProgramError
from reroll.rewrite.ir import ops
from reroll.rewrite.ir.hidden import mark, marks, unmark
from reroll.rewrite.ir.program import Loop, Program, weight_nodes
from reroll.rewrite.ir.records import Body
from reroll.rewrite.ir.weights import Weight, WeightTable


def find_loop(program: Program, name: str | None = None) -> Loop:
    """Find the loop of this name; without a name, the loop with the most layers.

    Raises ProgramError if there is no such loop.
    """
    loops = {loop.name: loop for loop in program.loops}
    if name is not None and name in loops:
        return loops[name]
    if not loops or name is not None:
        known = ", ".join(loops) or "there are none"
        raise ProgramError(f"there is no loop {name or ''}".rstrip(), hint=f"loops: {known}")
    return max(loops.values(), key=lambda loop: loop.layers)


def split_loop(program: Program, loop: Loop, at: Sequence[int]) -> tuple[Program, list[Loop]]:
    """Cut a loop before the trips `at`; return the Program, edited in place, and the pieces.

    The first piece keeps the loop's name and those of its weights. The piece that starts with trip
    10 of `model.layers` is called `model.layers_10`; in the names of its weights `*` counts from 0.
    A per-trip input with the same value in all trips of a piece becomes an invariant. Without a cut
    inside the loop, the result is the loop itself.

    Raises ProgramError for a cut outside of the loop.
    """
    cuts = sorted(set(at) - {0, loop.trips})
    outside = [cut for cut in cuts if not 0 < cut < loop.trips]
    if outside:
        raise ProgramError(
            f"a loop of {loop.trips} trips cannot be cut at {outside[0]}", where=loop.name
        )
    if not cuts:
        return program, [loop]
    bounds = [0, *cuts, loop.trips]
    graph, carry, after = program.graph, loop.carry, loop.node
    bodies = {n: b for n, b in program.bodies.items() if n != loop.name}
    weights, reference = program.weights, program.reference
    stacked = _stacked(program, loop)
    results = _results(loop)
    pieces: list[fx.Node] = []
    tables: list[tuple[dict[str, Weight], dict[str, Weight]]] = []
    for start, stop in pairwise(bounds):
        name = loop.name if start == 0 else _free(f"{loop.name}_{start}", {*bodies, "main"})
        names = {old: _renamed(old, loop.name, name, start) for old in stacked}
        body = _copied(loop.body.graph, names)
        bodies[name] = Body(body, loop.period)
        trips = range(start, stop)
        tables.append(
            (
                {names[n]: _of_trips(weights[n], trips) for n in stacked},
                {names[n]: _of_trips(reference[n], trips) for n in stacked if n in reference},
            )
        )
        inputs = tuple(_same(value, trips) for value in loop.inputs)
        with graph.inserting_after(after):
            node = graph.call_function(ops.loop, (name, carry, inputs, stop - start))
        pieces.append(node)
        after, items = node, []
        for position, value in enumerate(loop.carry):
            with graph.inserting_after(after):
                after = graph.call_function(operator.getitem, (node, position))
            after.meta.update(value.meta)
            # hidden states are marked on the placeholders of the next piece, not on its inputs
            unmark(after)
            items.append(after)
        carry = tuple(items)
    for node, position in results.items():
        node.replace_all_uses_with(carry[position])
        graph.erase_node(node)
    graph.erase_node(loop.node)
    for node in pieces[:-1]:
        _drop_unused(graph, node)
    program = replace(
        program,
        bodies=bodies,
        weights=_replaced(weights, stacked, [new for new, _ in tables]),
        reference=_replaced(reference, stacked, [old for _, old in tables]),
    )
    return program, [Loop(node, bodies[str(node.args[0])]) for node in pieces]


def pack_trips(program: Program, loop: Loop, count: int) -> tuple[Program, Loop]:
    """Pack `count` trips into one; return the Program, edited in place, and the loop.

    A weight `model.layers.*.mlp.up_proj.weight` becomes `model.layers.*.<i>.mlp.up_proj.weight`,
    where `i` numbers the packed trips.

    Raises ProgramError if `count` does not divide the loop's trips.
    """
    if count < 1 or loop.trips % count:
        raise ProgramError(f"{loop.trips} trips cannot be packed by {count}", where=loop.name)
    if count == 1:
        return program, loop
    stacked = _stacked(program, loop)
    names = [
        {old: _renamed(old, loop.name, loop.name, 0, f"{i}.") for old in stacked}
        for i in range(count)
    ]
    old_places = loop.places
    width = len(loop.carry)
    graph = fx.Graph()
    carry: list[fx.Node] = [graph.node_copy(placeholder) for placeholder in old_places[:width]]
    trip_inputs: list[list[fx.Node]] = [[] for _ in range(count)]
    inputs: list[Any] = []
    # an invariant stays one input; a per-trip input becomes one for each packed trip
    for placeholder, value in zip(old_places[width:], loop.inputs, strict=True):
        if not isinstance(value, tuple):
            node = graph.node_copy(placeholder)
            inputs.append(value)
            for row in trip_inputs:
                row.append(node)
            continue
        for i, row in enumerate(trip_inputs):
            row.append(graph.node_copy(placeholder))
            inputs.append(_same(value, range(i, loop.trips, count)))
    for i in range(count):
        if i:
            for placeholder, node in zip(old_places[:width], carry, strict=True):
                mark(node, marks(placeholder))
        values = dict(zip(old_places, [*carry, *trip_inputs[i]], strict=True))
        carry = list(inline(graph, loop.body.graph, values, names[i].get))
    graph.output(tuple(carry))
    weights, reference = (
        _replaced(
            table,
            stacked,
            [
                {
                    names[i][n]: _of_trips(table[n], range(i, loop.trips, count))
                    for n in stacked
                    if n in table
                }
                for i in range(count)
            ],
        )
        for table in (program.weights, program.reference)
    )
    loop.change(inputs=inputs, trips=loop.trips // count)
    bodies = {**program.bodies, loop.name: Body(graph, loop.period * count)}
    program = replace(program, bodies=bodies, weights=weights, reference=reference)
    return program, Loop(loop.node, bodies[loop.name])


def repeat_trip(program: Program, loop: Loop, trips: int) -> tuple[Program, Loop]:
    """Repeat the trip of a one-trip loop `trips` times, with the same weights and inputs.

    Raises ProgramError if the loop has several trips.
    """
    if loop.trips != 1:
        raise ProgramError(f"it has {loop.trips} trips, not one to be repeated", where=loop.name)
    inputs = tuple(v[0] if isinstance(v, tuple) else v for v in loop.inputs)
    loop.change(inputs=inputs, trips=trips)
    tables = []
    for table in (program.weights, program.reference):
        changed = {
            n: replace(table[n], index=(0,) * trips) for n in _stacked(program, loop) if n in table
        }
        tables.append(table.with_weights(changed))
    return replace(program, weights=tables[0], reference=tables[1]), loop


def select_trips(program: Program, loop: Loop, trips: Sequence[int]) -> tuple[Program, Loop]:
    """Let a loop run only these trips, in this order; a repeated trip is tied to itself.

    Raises ProgramError for trips that it does not have, and for an empty list.
    """
    if not trips or not all(0 <= trip < loop.trips for trip in trips):
        raise ProgramError(f"trips {list(trips)} of {loop.trips} cannot be run", where=loop.name)
    stacked = _stacked(program, loop)
    inputs = tuple(_same(value, trips) for value in loop.inputs)
    loop.change(inputs=inputs, trips=len(trips))
    weights, reference = (
        table.with_weights({n: _of_trips(table[n], trips) for n in stacked if n in table})
        for table in (program.weights, program.reference)
    )
    return replace(program, weights=weights, reference=reference), loop


def inline(
    graph: fx.Graph,
    body: fx.Graph,
    values: dict[fx.Node, fx.Node],
    rename: Callable[[str], str | None] = lambda name: None,
) -> tuple[fx.Node, ...]:
    """Copy a body to a graph's insertion point; `values` replace its placeholders.

    Returns the copies of the nodes that the body returns. `rename` returns another name for a
    weight, or None to keep it.
    """
    values = dict(values)
    for node in body.nodes:
        if node.op == "output":
            return tuple(values[n] for n in node.args[0])
        if node not in values:
            values[node] = graph.node_copy(node, lambda n: values[n])
            if node.op == "get_attr":
                values[node].target = rename(str(node.target)) or node.target
    raise ProgramError("the graph of a body returns nothing")


def _stacked(program: Program, loop: Loop) -> list[str]:
    """Return the names of a loop's stacked weights."""
    names = weight_nodes(loop.body.graph)
    return [n for n in program.weights if n in names and program.weights[n].index is not None]


def _copied(graph: fx.Graph, names: dict[str, str]) -> fx.Graph:
    new = fx.Graph()
    values = {n: new.node_copy(n) for n in graph.nodes if n.op == "placeholder"}
    new.output(inline(new, graph, values, names.get))
    return new


def _results(loop: Loop) -> dict[fx.Node, int]:
    return {user: int(user.args[1]) for user in loop.node.users}  # type: ignore[arg-type]


def _drop_unused(graph: fx.Graph, node: fx.Node) -> None:
    for item in list(node.users):
        if not item.users:
            graph.erase_node(item)


def _of_trips(weight: Weight, trips: Iterable[int]) -> Weight:
    """Reduce a stacked weight to the entries that some trips use."""
    assert weight.index is not None
    used = [weight.index[trip] for trip in trips]
    kept = list(dict.fromkeys(used))
    index = tuple(kept.index(entry) for entry in used)
    return replace(weight, entries=tuple(weight.entries[e] for e in kept), index=index)


def _same(value: Any, trips: Iterable[int]) -> Any:
    """Restrict a per-trip input to some trips; one value if it is the same in all of them."""
    if not isinstance(value, tuple):
        return value
    values = tuple(value[trip] for trip in trips)
    alike = all(v is values[0] or (type(v) is type(values[0]) and v == values[0]) for v in values)
    return values[0] if alike else values


def _replaced(
    table: WeightTable, stacked: list[str], pieces: list[dict[str, Weight]]
) -> WeightTable:
    """Replace the stacked weights of a table by new ones, at the position of the first."""
    new: dict[str, Weight] = {}
    for name, weight in table.items():
        if name not in stacked:
            new[name] = weight
            continue
        for piece in pieces:
            new.update(piece)
    return WeightTable(new)


def _renamed(name: str, old: str, new: str, start: int, inner: str = "") -> str:
    """Name a loop's weight in a piece of the loop, or in one of its packed trips."""
    if inner:
        head, _, tail = name.partition("*.")
        return f"{head}*.{inner}{tail}" if tail else f"{name}.{inner.rstrip('.')}"
    if start == 0:
        return name
    stem = name.removeprefix(f"{old}.")
    return f"{new}.{stem}" if stem != name else f"{new}.{name}"


def _free(name: str, used: set[str]) -> str:
    while name in used:
        name += "_"
    return name
