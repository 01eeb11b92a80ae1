"""Exits of a depth loop: their ops, thresholds, and the nodes that only compute exit scores."""

from __future__ import annotations

import math
import operator
from dataclasses import dataclass
from typing import Any

from torch import fx

from reroll.rewrite.ir.ops import EXIT, STREAK
from reroll.rewrite.ir.program import Loop, Program, ancestors


@dataclass(frozen=True)
class Exits:
    """Exits of one loop.

    Attributes:
        node: the exit op, which computes the tokens that have left the loop.
        left_position: the position of its result among the carried values.
        thresholds: one for each trip; infinite where no token can exit.
        decided: the positions of the carried values that are used only for exit decisions.
        tests: the nodes of the body that are needed only for those values.
    """

    node: fx.Node
    left_position: int
    thresholds: tuple[float, ...]
    decided: tuple[int, ...]
    tests: frozenset[fx.Node]


def exits_of(loop: Loop) -> Exits | None:
    """Find the exits of a loop; None if every token makes all trips."""
    body = loop.body.graph
    exits = [n for n in body.nodes if n.target is EXIT]
    if not exits:
        return None
    returned: Any = body.output_node().args[0]
    decided = tuple(i for i, node in enumerate(returned) if _decides(node))
    rest = [node for i, node in enumerate(returned) if i not in decided]
    state = [n for n in body.nodes if "reroll.cache" in str(n.target)]
    needed = ancestors([*rest, *state])
    tests = ancestors([returned[i] for i in decided]) - needed
    tests = {n for n in tests if n.op != "placeholder"}
    return Exits(
        exits[0],
        returned.index(exits[0]),
        tuple(threshold_of(loop, exits[0], trip) for trip in range(loop.trips)),
        decided,
        frozenset(tests),
    )


def threshold_of(loop: Loop, node: fx.Node, trip: int) -> float:
    """Return the threshold of an exit in one trip."""
    return float(loop.resolve(node.args[2], trip))


def with_thresholds(program: Program, loop: Loop, thresholds: dict[int, float]) -> Program:
    """Set the thresholds after some trips (trip 0 is the first), in place; return the Program."""
    exits = exits_of(loop)
    assert exits is not None
    placeholder = exits.node.args[2]
    assert isinstance(placeholder, fx.Node)
    position = loop.places.index(placeholder) - len(loop.carry)
    values = tuple(thresholds.get(trip, old) for trip, old in enumerate(exits.thresholds))
    inputs = (*loop.inputs[:position], values, *loop.inputs[position + 1 :])
    loop.change(inputs=inputs)
    return program


def exit_loop(program: Program) -> tuple[Loop, Exits] | None:
    """Find the first loop with exits."""
    for loop in program.loops:
        exits = exits_of(loop)
        if exits is not None:
            return loop, exits
    return None


def is_open(threshold: float) -> bool:
    """Whether any token can exit at a threshold."""
    return not (math.isinf(threshold) and threshold > 0)


def _decides(node: fx.Node) -> bool:
    if node.target is EXIT:
        return True
    source = node.args[0] if node.target is operator.getitem else None
    return isinstance(source, fx.Node) and source.target is STREAK
