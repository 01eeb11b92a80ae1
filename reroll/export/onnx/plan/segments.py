"""Choose which trips of a depth loop become one ONNX Loop, and how many layers its body holds.

Trips that share blocks in a cycle of P become a Loop whose body holds P trips. Shared weights are
used directly, and only values that differ by round are gathered. Trips that share nothing become a
Loop of one trip that gathers every weight.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import fx

from reroll.export.onnx.plan.states import keeps_rings, plan_rings
from reroll.rewrite.analysis.state_plan import plan_states, stateful_nodes
from reroll.rewrite.ir.exits import Exits, exits_of, is_open
from reroll.rewrite.ir.ops import CACHE, HOLD
from reroll.rewrite.ir.program import Loop, Program, ancestors, weight_nodes


@dataclass(frozen=True)
class Segment:
    """Consecutive trips of a loop: `rounds` rounds of `period` trips each, from trip `start` on."""

    start: int
    period: int
    rounds: int

    def trips(self, position: int) -> tuple[int, ...]:
        """Return the trip at one position of the body in each round."""
        return tuple(self.start + r * self.period + position for r in range(self.rounds))


@dataclass(frozen=True)
class LoopPlan:
    """How a depth loop is written.

    Attributes:
        segments: its trips, in order.
        exits: its exits; None if no token can leave.
        kept: the nodes that run in a trip whose tokens have all left, which update its caches; None
            if all nodes run.
    """

    loop: Loop
    segments: tuple[Segment, ...]
    exits: Exits | None
    kept: frozenset[fx.Node] | None

    def skips(self, segment: Segment) -> bool:
        """Whether a trip of a segment may run its kept nodes only."""
        return segment.rounds > 1 and self.kept is not None


@dataclass(frozen=True)
class Trips:
    """Trips of a loop whose nodes are written once.

    `by_row` says whether each row of the batch is in one of its own.
    """

    loop: LoopPlan
    numbers: tuple[int, ...]
    by_row: bool = False

    def resolve(self, value: Any) -> Any:
        """Resolve an argument of a body's node, if it is the same in all of the trips."""
        found = {self.loop.loop.resolve(value, trip) for trip in self.numbers}
        return found.pop() if len(found) == 1 else value

    def states(self, numbers: tuple[int, ...]) -> tuple[int, ...]:
        """Return the numbers of a node's states in these trips, of those of all trips."""
        # with rows of their own, the host passes the states of each row's own round
        return tuple(numbers[t] for t in (self.numbers[:1] if self.by_row else self.numbers))


def plan_loop(program: Program, loop: Loop, *, is_rolled: bool) -> LoopPlan:
    """Plan a loop, whose trips may become ONNX Loops if it is rolled."""
    segments = rolled(program, loop) if is_rolled else [Segment(0, loop.trips, 1)]
    exits = exits_of(loop)
    if exits is None or not any(map(is_open, exits.thresholds)):
        return LoopPlan(loop, tuple(segments), None, None)
    graph = loop.body.graph
    returned: Any = graph.output_node().args[0]
    keeping = stateful_nodes(graph)
    can_skip = returned[0].target is HOLD and all(node.target is CACHE for node in keeping)
    kept = frozenset(ancestors(keeping)) if can_skip else None
    return LoopPlan(loop, tuple(segments), exits, kept)


def rolled(program: Program, loop: Loop) -> list[Segment]:
    """Return the segments whose bodies hold the fewest trips in total."""
    stacked = [program.weights[name] for name in weight_nodes(loop.body.graph)]
    stacked = [weight for weight in stacked if weight.index is not None]
    largest = max((weight.meta.elements for weight in stacked), default=0)
    # the large weights of each trip, as one letter of a word: trips with equal letters share them;
    # low-rank residuals and vectors are small enough to gather
    large = [w.index for w in stacked if w.meta.elements * 4 >= largest and w.index is not None]
    word = [tuple(index[t] for index in large) for t in range(loop.trips)]
    shape = _structure(program, loop)
    if len(set(word)) == len(word):
        word = [()] * loop.trips
    word = [(*letter, *own) for letter, own in zip(word, shape, strict=True)]
    # best[t]: the fewest trips in bodies for the trips from t on, and the first segment
    best: list[tuple[int, Segment | None]] = [(0, None)] * (loop.trips + 1)
    for start in reversed(range(loop.trips)):
        choices = []
        for period in range(1, loop.trips - start + 1):
            rounds = 1
            end = start + period
            while word[start : start + period] == word[end : end + period]:
                rounds, end = rounds + 1, end + period
                choices.append((period + best[end][0], -rounds, Segment(start, period, rounds)))
            end = start + period
            choices.append((period + best[end][0], -1, Segment(start, period, 1)))
        cost, _, segment = min(choices, key=lambda c: c[:2])
        best[start] = (cost, segment)
    found, at = [], 0
    while at < loop.trips:
        chosen = best[at][1]
        assert chosen is not None
        found.append(chosen)
        at += chosen.period * chosen.rounds
    return found


def _structure(program: Program, loop: Loop) -> list[tuple[Any, ...]]:
    """Return properties of each trip that a Loop cannot gather: sizes of states, and switches."""
    states = plan_states(program)
    rings, has_rings = plan_rings(program, states), keeps_rings(program)
    nodes = [n for n in loop.body.graph.nodes if n in states.numbers]
    exits = exits_of(loop)
    found = []
    for trip in range(loop.trips):
        is_exit = exits is not None and is_open(exits.thresholds[trip])
        numbers = [states.number(node, trip) for node in nodes]
        windows = [states.layers[n] if n in rings else None for n in numbers]
        switches = [
            value[trip]
            for value in loop.inputs
            if isinstance(value, tuple)
            and (has_rings or any(isinstance(v, bool) for v in value))
            and not any(isinstance(v, fx.Node) for v in value)
        ]
        found.append((*windows, *switches, is_exit))
    return found
