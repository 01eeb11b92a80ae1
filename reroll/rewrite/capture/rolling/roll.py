"""Roll isomorphic regions of a flat graph into the trips of one loop.

Each node that depends on the data is encoded as a letter: its op, constants and types. The letters
in execution order form a string, in which a stack of layers is a periodic substring. Each candidate
substring is then checked argument by argument. An argument must have the same source in every trip:

- a value of the same trip, at the same index,
- a value of the previous trip, at the same index (the carry),
- one value from outside (an invariant), or one per trip (a per-trip input),
- a weight per trip (stacked), or a constant; floats and arguments of reroll's ops may differ.

Nothing here reads module names except to name the result.
"""

from __future__ import annotations

import logging
import operator
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from reroll.rewrite.capture.rolling.naming import Names, layers_per_trip
from reroll.rewrite.capture.rolling.unify import Region, Unifier, unify
from reroll.rewrite.ir import ops
from reroll.rewrite.ir.hidden import drop_marks, stand_in, unmark
from reroll.rewrite.ir.patterns import Miss, nearest
from reroll.rewrite.ir.program import Program, weight_nodes
from reroll.rewrite.ir.records import Body
from reroll.rewrite.ir.types import type_of
from reroll.rewrite.ir.weights import Weight

log = logging.getLogger(__name__)
aten = torch.ops.aten

# a shorter period is no layer, however often it repeats
MIN_NODES = 6
_CANDIDATES = 24


def roll_loops(program: Program) -> Program:
    """Roll the stacks of layers of a Program into loop nodes. Other layers stay outside."""
    program = program.edit()
    merge_equal(program.graph)
    lift_parts(program.graph)
    while True:
        unified = find_repetition(program)
        if unified is None:
            break
        program = insert_loop(program, unified)
    program.graph.lint()
    return program.pruned()


def merge_equal(graph: fx.Graph) -> None:
    """Merge nodes that compute the same thing from the same values."""
    first: dict[Any, fx.Node] = {}
    for node in list(graph.nodes):
        if node.op != "call_function" or not ops.is_pure(node):
            continue
        key = (node.target, _freeze(node.args), _freeze(node.kwargs))
        if key in first:
            stand_in(node, first[key])
            graph.erase_node(node)
        else:
            first[key] = node


def lift_parts(graph: fx.Graph) -> None:
    """Move selections of parts of a value to where the value is computed.

    Layers that select parts of one value (such as embeddings per layer) differ in the part's
    number. With the selections moved before the layers, each trip gets its part as an input.
    """
    for node in list(graph.nodes):
        parts = [user for user in node.users if user.target is aten.select.int]
        if len({part.args[1:] for part in parts}) < 2:
            continue
        for part in reversed(parts):
            node.append(part)


def _freeze(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return (type(value).__name__, *map(_freeze, value))
    if isinstance(value, dict):
        return tuple((k, _freeze(v)) for k, v in sorted(value.items()))
    if isinstance(value, slice):
        return ("slice", _freeze(value.start), _freeze(value.stop), _freeze(value.step))
    return value if isinstance(value, fx.Node) else (type(value).__name__, str(value))


def data_nodes(program: Program) -> list[fx.Node]:
    """Return the nodes that depend on data, and not only on its shape, positions or padding."""
    roles = {i.name: i.role for i in program.inputs}
    data: set[fx.Node] = set()
    order = []
    for node in program.graph.nodes:
        if node.op == "placeholder":
            if roles[str(node.target)] == "data":
                data.add(node)
        elif node.op != "call_function" or node.target is aten.sym_size.int:
            continue
        elif any(argument in data for argument in node.all_input_nodes):
            data.add(node)
            order.append(node)
    return order


@dataclass(frozen=True)
class Candidate:
    """Candidate for a loop: `trips` times `size` data nodes from index `start`."""

    start: int
    size: int
    trips: int


def find_repetition(program: Program) -> Unifier | None:
    """Find the loop that covers the most nodes, with the fewest carried values; else None."""
    order = data_nodes(program)
    outside = weight_nodes(program.graph)
    misses: list[Miss] = []
    for stretch in _stretches([_letter(node) for node in order]):
        best: Unifier | None = None
        for candidate in stretch:
            # a loop with one trip fewer is preferred if it carries less or starts with a layer
            if best is not None and candidate.trips < best.trips - 1:
                break
            regions = [
                Region(order[candidate.start + t * candidate.size :][: candidate.size])
                for t in range(candidate.trips)
            ]
            unified = unify(regions, outside)
            if isinstance(unified, Miss):
                misses.append(replace(unified, depth=candidate.trips * candidate.size))
                continue
            if best is None or _untidiness(unified) < _untidiness(best):
                best = unified
                if _untidiness(unified) == (1, 1):
                    break
        if best is not None:
            return best
    reason = nearest(misses) or "nothing else repeats"
    log.debug("no further loop; the nearest: %s", reason)
    return None


def _untidiness(unified: Unifier) -> tuple[int, int]:
    """Count the values that a loop carries, and the layers that one trip's weights come from."""
    return len(unified.carry), layers_per_trip(unified)


def _letter(node: fx.Node) -> str:
    """Encode what two nodes must have in common to be the same node of two trips."""
    is_reroll_op = "reroll" in str(node.target)

    def describe(value: Any) -> Any:
        if isinstance(value, fx.Node):
            type_ = type_of(value)
            shape = type_.shape if value.op == "get_attr" and type_ is not None else ""
            return f"{'w' if value.op == 'get_attr' else 'v'}{shape}"
        if isinstance(value, (list, tuple)):
            return [describe(v) for v in value]
        return "." if isinstance(value, float) or is_reroll_op else repr(value)

    arguments: Any = [describe(a) for a in node.args]
    keywords = {} if is_reroll_op else {k: describe(v) for k, v in sorted(node.kwargs.items())}
    if is_reroll_op:
        # attributes and optional tensors of reroll's ops may differ from trip to trip
        arguments = [a for a in arguments if a != "."]
    return f"{node.target}{arguments}{keywords}{node.meta.get('type')}"


def _stretches(letters: list[str]) -> Iterator[list[Candidate]]:
    """Yield groups of candidates, by falling number of nodes covered.

    A group is one periodic substring. Its candidates start at different offsets in it and have
    different numbers of trips; those with the most trips come first.
    """
    codes: dict[str, int] = {}
    word = torch.tensor([codes.setdefault(letter, len(codes)) for letter in letters])
    runs: list[tuple[int, int, int, int]] = []
    for size in range(MIN_NODES, len(letters) // 2 + 1):
        equal = (word[:-size] == word[size:]).tolist()
        start = 0
        while start < len(equal):
            if not equal[start]:
                start += 1
                continue
            stop = start
            while stop < len(equal) and equal[stop]:
                stop += 1
            length = stop - start + size
            if length >= 2 * size:
                runs.append(((length // size) * size, size, start, length))
            start = stop
    runs.sort(key=lambda run: (-run[0], run[1]))
    for _, size, start, length in runs[:_CANDIDATES]:
        phases = [
            Candidate(start + offset, size, trips)
            for offset in range(min(3 * size, length - 2 * size + 1))
            for trips in range((length - offset) // size, max((length - offset) // size - 3, 1), -1)
        ]
        yield sorted(phases, key=lambda c: (-c.trips, c.start))


def insert_loop(program: Program, unified: Unifier) -> Program:
    """Replace unified regions by one loop node."""
    graph, weights = program.graph, program.weights
    names = Names(unified, taken={*program.bodies, "main"}, weights=weights)
    table = dict(weights.items())
    for old, new in names.renamed.items():
        sources = unified.stacks[old]
        entries = [weights[name].entries[0] for name in sources]
        unique = list(dict.fromkeys(entries))
        index = tuple(unique.index(entry) for entry in entries)
        table[new] = Weight(tuple(unique), index, weights[sources[0]].trainable)
    body = unified.build(names.renamed)
    if lost := unified.mark(body):
        drop_marks(replace(program, bodies={**program.bodies, names.loop: Body(body)}), lost)
    last = unified.regions[-1].nodes[-1]
    with graph.inserting_after(last):
        node = graph.call_function(
            ops.loop, (names.loop, tuple(unified.initial), tuple(unified.inputs), unified.trips)
        )
    after = node
    inside = {n for region in unified.regions for n in region.nodes} | {node}
    for position, node_index in enumerate(unified.carry):
        last = unified.regions[-1].nodes[node_index]
        with graph.inserting_after(after):
            after = graph.call_function(operator.getitem, (node, position))
        after.meta.update(last.meta)
        unmark(after)
        last.replace_all_uses_with(after, delete_user_cb=lambda user: user not in inside)
    graph.eliminate_dead_code()
    bodies = {**program.bodies, names.loop: Body(body, names.period)}
    return replace(program, bodies=bodies, weights=type(weights)(table))
