"""A lowered model taken apart for running rows at different depths.

The model's graph is cut at its loop: `before` makes what the loop starts with from a token and its
position, `step` is one trip, `test` decides about exits, `skip` makes the keys and values of a trip
that is not made, and `after` makes logits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, fx

from reroll.errors import UsageError
from reroll.rewrite.program import Loop, weight_nodes
from reroll.rewrite.raising.matching import argument
from reroll.rewrite.rolling.exits import exits_of, is_open
from reroll.runtime.caches import CACHE, cache_nodes
from reroll.runtime.depthwise.plan import Batch, PerSegment, Plan
from reroll.runtime.depthwise.pool import Pool
from reroll.runtime.exits import loop_exits, split_exits
from reroll.runtime.hoisting import hoist_invariants


@dataclass
class Row:
    """One token on its way: its slot and place there, its next trip, and what the loop has for it.

    A row in the `background` has given its token out already, and only makes the caches exact.
    """

    slot: int
    position: int
    trip: int
    carry: tuple[Tensor, ...]
    inputs: tuple[Any, ...]
    background: bool = False


class Engine:
    """The parts of a model; raises UsageError for a model that cannot be taken apart like this."""

    def __init__(self, model: Any, slots: int, length: int) -> None:
        self.model = model
        program = hoist_invariants(model.program)
        if len(program.loops) != 1 or model.config.is_encoder_decoder:
            raise _refused(f"it has {len(program.loops)} loops, not one")
        (self.loop,) = program.loops
        self.positions = next((i.name for i in program.inputs if i.role == "positions"), None)
        if self.positions is None or any(cache_nodes(program.graph)):
            raise _refused("its positions are no input, or a layer outside the loop has a cache")
        if any(n.target is not CACHE for n in cache_nodes(self.loop.body.graph)):
            raise _refused("its layers have state that is not keys and values")
        self.names = [i.name for i in program.inputs]
        self.padding = {i.name for i in program.inputs if i.role == "padding"}
        exits = exits_of(self.loop)
        self.thresholds = exits.thresholds if exits else ()
        self.done = exits.done if exits else None
        # with exact caches, trips are made also for tokens that have left
        self.defers = exits is not None and not loop_exits(self.loop, exits).holds
        if exits is not None:
            self.test = Plan(split_exits(self.loop, exits).test)
        self.step = Plan(self.loop.body.graph)
        self.skip = Plan(self.loop.body.graph, cache_nodes(self.loop.body.graph))
        returned: Any = program.graph.output_node().args[0]
        results = {int(n.args[1]): n for n in self.loop.node.users}  # type: ignore[arg-type]
        self.results = sorted(results)
        logits = returned[program.outputs.index("logits")]
        self.after = Plan(_cut(program.graph, list(results.values()), [logits]))
        # those of the results that the logits depend on come first in its placeholders
        self.given = [n for n in dict.fromkeys(_leaves(self.loop.inputs)) if n is not None]
        self.before = Plan(program.graph, [*self.loop.carry, *self.given])
        self.trips = self.loop.trips
        self.groups = _groups(program, self.loop)
        modules = model._assembly.loops[self.loop.name].modules
        readings = model._assembly.tree.readings
        self.weights: dict[str, list[Tensor]] = {
            name: [attrgetter(readings[self.loop.name][name].weight)(m) for m in modules]
            for name in weight_nodes(self.loop.body.graph) | self._test_names()
        }
        self.main = {
            name: attrgetter(reading.weight)(model) for name, reading in readings["main"].items()
        }
        like = next(p for p in model.parameters() if p.dtype.is_floating_point)
        self.per_trip = len(cache_nodes(self.loop.body.graph))
        self.pool = Pool(model._assembly.layers, slots, length, like)
        self.width = len(self.loop.carry)

    def _test_names(self) -> dict[str, Any]:
        if not self.thresholds:
            return {}
        return {str(n.target): None for n in self.test.nodes if n.op == "get_attr"}

    # ---- the parts

    def start(self, slots: Sequence[int], tokens: Sequence[int]) -> list[Row]:
        """Rows in front of the first trip, for one new token of each slot."""
        ids = torch.tensor(tokens)[:, None]
        positions = torch.tensor([self.pool.lengths[s] for s in slots])[:, None]
        values = {"input_ids": ids, self.positions: positions}
        given = [torch.ones_like(ids) if n in self.padding else values.get(n) for n in self.names]
        made = self.before.run(given, self.main.__getitem__, Batch((len(slots),)))
        carry, rest = made[: self.width], made[self.width :]
        known = dict(zip(self.given, rest, strict=True))
        rows = []
        for number, slot in enumerate(slots):

            def own(value: Any, number: int = number) -> Any:
                value = known[value] if isinstance(value, fx.Node) else value
                alone = isinstance(value, Tensor) and value.shape[:1] == (len(slots),)
                return value[number : number + 1] if alone else value

            inputs = tuple(
                tuple(map(own, value)) if isinstance(value, tuple) else own(value)
                for value in self.loop.inputs
            )
            position = self.pool.lengths[slot]
            rows.append(Row(slot, position, 0, tuple(map(own, carry)), inputs))
        return rows

    def run_step(self, rows: Sequence[Row]) -> None:
        """One trip for rows that are sorted by their trips; their carry and trip move on."""
        old, inputs, batch = self._batched(rows)
        new = self.step.run([*old, *inputs], self._weight(rows), batch)
        tested = [i for i, r in enumerate(rows) if self.is_tested(r.trip)]
        if tested:
            # rows without an exit here have an infinite threshold, or are left out if all are alike
            new = self.test.run([*old, *new, *inputs], self._weight(rows), batch)
        for number, row in enumerate(rows):
            row.carry = tuple(value[number : number + 1] for value in new)
            row.trip += 1

    def is_tested(self, trip: int) -> bool:
        """Whether anybody can leave after a trip."""
        return bool(self.thresholds) and is_open(self.thresholds[trip])

    def is_done(self, row: Row) -> bool:
        """Whether a row has left the loop, or made all its trips."""
        return row.trip == self.trips or self.has_left(row)

    def has_left(self, row: Row) -> bool:
        """Whether a row has left the loop before its end."""
        return self.done is not None and bool(row.carry[self.done])

    def run_skips(self, rows: Sequence[Row]) -> None:
        """Keys and values of the trips that rows do not make, from the state that they left with.

        The rows have to be in one trip.
        """
        for trip in range(rows[0].trip, self.trips):
            at = [replace(row, trip=trip) for row in rows]
            carry, inputs, batch = self._batched(at)
            self.skip.run([*carry, *inputs], self._weight(at), batch)

    def logits(self, rows: Sequence[Row]) -> Tensor:
        """[rows, vocabulary] of the next tokens."""
        carry = [torch.cat([r.carry[i] for r in rows]) for i in self.results]
        batch = Batch((len(rows),))
        return self.after.run(carry, self.main.__getitem__, batch)[0][:, 0]  # type: ignore[no-any-return]

    # ---- a batch

    def _batched(self, rows: Sequence[Row]) -> tuple[list[Tensor], list[Any], Batch]:
        trips = sorted({r.trip for r in rows})
        sizes = tuple(sum(r.trip == trip for r in rows) for trip in trips)
        carry = [torch.cat([r.carry[i] for r in rows]) for i in range(self.width)]
        inputs: list[Any] = []
        for number in range(len(self.loop.inputs)):
            values = [
                r.inputs[number][r.trip]
                if isinstance(r.inputs[number], tuple)
                else r.inputs[number]
                for r in rows
            ]
            if isinstance(values[0], Tensor):
                one = values[0].shape[:1] == (1,)
                inputs.append(torch.cat(values) if one else values[0])
            elif len(set(values)) == 1:
                inputs.append(values[0])
            else:
                firsts = [sum(sizes[:i]) for i in range(len(sizes))]
                inputs.append(PerSegment(tuple(values[f] for f in firsts)))
        places = [(r.slot, r.position) for r in rows]

        def layers(number: int) -> list[int]:
            return [r.trip * self.per_trip + number for r in rows]

        def store(number: int, k: Tensor, v: Tensor) -> None:
            self.pool.store(layers(number), places, k, v)

        def attend(number: int, q: Tensor, node: fx.Node) -> Tensor:
            for name in ("chunk", "bias", "blocks"):
                if argument(node, name) is not None:
                    raise _refused(f"its attention has {name}")
            windows = [self.loop.resolve(argument(node, "window"), r.trip) for r in rows]
            cap, sinks = argument(node, "softcap"), argument(node, "sinks")
            if sinks is not None:
                raise _refused("its attention has sinks")
            scale = float(argument(node, "scale"))
            return self.pool.attend(layers(number), places, q, scale, windows, cap, None)

        return carry, inputs, Batch(sizes, store, attend)

    def _weight(self, rows: Sequence[Row]) -> Any:
        trips = sorted({r.trip for r in rows})

        def weight(name: str) -> Any:
            own = [self.weights[name][trip] for trip in trips]
            if all(w is own[0] for w in own):
                return own[0]
            return PerSegment(tuple(own))

        return weight


def _refused(reason: str) -> UsageError:
    return UsageError(
        f"this model cannot be decoded depth by depth: {reason}", hint="use generate instead"
    )


def _leaves(values: Sequence[Any]) -> list[fx.Node]:
    flat = [v for value in values for v in (value if isinstance(value, tuple) else (value,))]
    return [v for v in flat if isinstance(v, fx.Node)]


def _cut(graph: fx.Graph, starts: list[fx.Node], outputs: list[fx.Node]) -> fx.Graph:
    """The part of a graph from some values, in the order of their numbers, to others."""
    new = fx.Graph()
    values = {
        node: new.placeholder(node.name)
        for node in sorted(starts, key=lambda n: int(n.args[1]))  # type: ignore[arg-type]
    }
    for node in graph.nodes:
        depends = node.op == "get_attr" or any(n in values for n in node.all_input_nodes)
        ready = all(n in values for n in node.all_input_nodes)
        if node not in values and depends and ready and node.op != "output":
            values[node] = new.node_copy(node, lambda n: values[n])
    missing = [n.name for n in outputs if n not in values]
    if missing:
        raise _refused(f"{missing[0]} depends on more than the loop's result")
    new.output(tuple(values[n] for n in outputs))
    return new


def _groups(program: Any, loop: Loop) -> list[list[int]]:
    """Trips that share all matrices that any two trips share, in the order of the first of each."""
    tied = [
        program.weights[n].index
        for n in weight_nodes(loop.body.graph)
        if (index := program.weights[n].index) is not None
        and len(program.weights[n].entries) < len(index)
        and len(program.weights[n].meta.shape) > 1
    ]
    groups: dict[tuple[int, ...], list[int]] = {}
    for trip in range(loop.trips):
        key = tuple(index[trip] for index in tied) if tied else (trip,)
        groups.setdefault(key, []).append(trip)
    return list(groups.values())
