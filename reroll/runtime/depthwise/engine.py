"""A lowered model split into parts that run rows at different depths.

The model's graph is cut at its loop. `before` computes the loop's first carry from a token and its
position, and `step` runs one trip. `test` decides about exits, `skip` computes keys and values of
trips that are not run, and `after` computes logits.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, fx

from reroll.errors import UsageError
from reroll.kernels import dispatch
from reroll.rewrite.analysis.state_plan import stateful_nodes
from reroll.rewrite.ir.defaults import counts_from_zero
from reroll.rewrite.ir.exits import exits_of, is_open
from reroll.rewrite.ir.matching import argument, shape, unsupported
from reroll.rewrite.ir.ops import ATTENTION, CACHE
from reroll.rewrite.ir.program import Loop, weight_nodes
from reroll.runtime.depthwise.fused import Depths
from reroll.runtime.depthwise.plan import PerSegment, Plan, Segments
from reroll.runtime.depthwise.pool import KeyPositions, Pool
from reroll.runtime.depthwise.row_batch import Row, RowBatch, gather_rows, input_at
from reroll.runtime.lowering.exit_graphs import loop_exits, split_exits
from reroll.runtime.lowering.hoisting import hoist_invariants
from reroll.runtime.lowering.recapture import check_modules

# arguments of attention that the pool computes; its requests have no padding
SUPPORTED = ("q", "k", "v", "scale", "causal", "window", "softcap", "padding")


class Engine:
    """The parts of a model that run rows at different depths.

    Raises UsageError for a model that cannot be split like this.
    """

    def __init__(self, model: Any, slots: int, length: int) -> None:
        self.model = model
        # weights are read here, and modules are not called
        check_modules(model)
        program = hoist_invariants(model.program)
        if len(program.loops) != 1 or model.config.is_encoder_decoder:
            raise _refused(f"it has {len(program.loops)} loops, not one")
        (self.loop,) = program.loops
        body = self.loop.body.graph
        if not program.has_past:
            raise _refused("it was captured without a cache")
        self.positions = next((i.name for i in program.inputs if counts_from_zero(i)), None)
        if self.positions is None or any(stateful_nodes(program.graph)):
            raise _refused("its positions are no input, or a layer outside the loop has a cache")
        if any(n.target is not CACHE for n in stateful_nodes(body)):
            raise _refused("its layers or exits have state that is not keys and values")
        for node in body.nodes:
            if node.target is ATTENTION and (names := unsupported(node, SUPPORTED)):
                raise _refused(f"its attention has {names[0]}")
        self.names = [i.name for i in program.inputs]
        self.padding = {i.name for i in program.inputs if i.role == "padding"}
        names = list(weight_nodes(body))
        exits = exits_of(self.loop)
        self.exits = None if exits is None else loop_exits(self.loop, exits)
        # with exact caches, the remaining trips also run for tokens that have left
        self.defers = self.exits is not None and not self.exits.holds
        # absent tokens need no update: the pool marks all positions behind a prompt as absent
        self.marks_absent = self.exits is not None and self.exits.marks_absent
        if exits is not None:
            self.test = Plan(split_exits(self.loop, exits).test)
        caches = stateful_nodes(body)
        self.step = Plan(body)
        self.skip = Plan(body, caches)
        returned: Any = program.graph.output_node().args[0]
        results = {int(n.args[1]): n for n in self.loop.node.users}  # type: ignore[arg-type]
        self.results = sorted(results)
        logits = returned[program.outputs.index("logits")]
        self.after = Plan(_cut(program.graph, list(results.values()), [logits]))
        # the inputs of the loop, which `before` computes together with the first carry
        self.loop_inputs = [n for n in dict.fromkeys(_leaves(self.loop.inputs)) if n is not None]
        self.before = Plan(program.graph, [*self.loop.carry, *self.loop_inputs])
        self.trips = self.loop.trips
        self.groups = _groups(program, self.loop)
        modules = model._assembly.loops[self.loop.name].modules
        readings = model._assembly.tree.readings
        self.weights: dict[str, list[Tensor]] = {
            name: [attrgetter(readings[self.loop.name][name].weight)(m) for m in modules]
            for name in names
        }
        self.main = {
            name: attrgetter(reading.weight)(model) for name, reading in readings["main"].items()
        }
        like = next(p for p in model.parameters() if p.dtype.is_floating_point)
        kinds = [[shape(argument(n, x)) for x in ("k", "v")] for n in caches]
        self.pool = Pool(kinds, self.trips, slots, length, like, self.marks_absent)
        self.device = like.device
        self._stacks: dict[str, Tensor] = {}
        self.width = len(self.loop.carry)
        self.batch: RowBatch | None = None

    # ---- the parts of the model

    def start(self, slots: Sequence[int], tokens: Sequence[int]) -> list[Row]:
        """Make the rows, in front of the first trip, of one new token for each slot."""
        lengths = [self.pool.lengths[s] for s in slots]
        ids, at = (torch.tensor(x, device=self.device)[:, None] for x in (tokens, lengths))
        values = {"input_ids": ids, self.positions: at}
        values_of_inputs = [
            torch.ones_like(ids) if n in self.padding else values.get(n) for n in self.names
        ]
        outputs = self.before.run(values_of_inputs, self.main.__getitem__, Segments((len(slots),)))
        known = dict(zip(self.loop_inputs, outputs[self.width :], strict=True))

        def expanded(value: Any) -> Any:
            if isinstance(value, tuple):
                return tuple(map(expanded, value))
            value = known[value] if isinstance(value, fx.Node) else value
            one = isinstance(value, Tensor) and value.shape[:1] == (1,)
            return value.expand(len(slots), *value.shape[1:]) if one else value

        inputs = list(map(expanded, self.loop.inputs))
        positions = list(zip(slots, lengths, strict=True))
        batch = RowBatch(list(outputs[: self.width]), inputs, positions)
        batch.rows = [Row(*position, batch, number) for number, position in enumerate(positions)]
        return batch.rows

    def run_step(self, rows: Sequence[Row]) -> None:
        """Run one trip for rows that are sorted by trip, and advance their carry and trip."""
        batch = self._row_batch(rows)
        trips = [row.trip for row in rows]
        inputs, weight, segments = self._batched(batch, trips)
        new = self.step.run([*batch.carry, *inputs], weight, segments)
        exits = self.exits
        if exits is not None and any(is_open(exits.thresholds[trip]) for trip in set(trips)):
            # trips without an exit have an infinite threshold
            new = self.test.run([*batch.carry, *new, *inputs], weight, segments)
            for row, left in zip(rows, new[exits.left_position].flatten().tolist(), strict=True):
                row.left = left
        batch.carry = list(new)
        for row in rows:
            row.trip += 1

    def run_skips(self, rows: Sequence[Row]) -> None:
        """Store keys and values of the trips that rows skip, from the hidden state at their exit.

        All rows and trips are one run, so that what all trips share is computed once.
        """
        if self.marks_absent:
            return
        batch = self._row_batch(rows)
        pairs = [(t, n) for t in range(self.trips) for n, row in enumerate(rows) if row.trip <= t]
        trips, numbers = [t for t, _ in pairs], torch.tensor([n for _, n in pairs])
        every = batch.select(numbers, [rows[n] for _, n in pairs])
        inputs, weight, segments = self._batched(every, trips)
        self.skip.run([*every.carry, *inputs], weight, segments)

    def logits(self, rows: Sequence[Row]) -> Tensor:
        """Compute the logits [rows, vocabulary] of the next tokens."""
        carry = self._row_batch(rows).carry
        inputs = [carry[i] for i in self.results]
        logits: Tensor = self.after.run(inputs, self.main.__getitem__, Segments((len(rows),)))[0]
        return logits[:, 0]

    def full_logits(self, rows: Sequence[Row]) -> Tensor:
        """Compute the logits [rows, vocabulary] behind the last trip, as if none had left."""
        carry = self._row_batch(rows).carry
        # a loop with exits also carries the hidden state with which each token left, and the depth
        inputs = [
            carry[0] if carry[i].shape == carry[0].shape else torch.full_like(carry[i], self.trips)
            for i in self.results
        ]
        logits: Tensor = self.after.run(inputs, self.main.__getitem__, Segments((len(rows),)))[0]
        return logits[:, 0]

    def depth(self, row: Row) -> int:
        """Return how many trips a row ran; a loop with exits counts them in its carry."""
        return row.trip if self.exits is None else int(row.carry[self.exits.left_position + 1])

    # ---- a batch

    def _row_batch(self, rows: Sequence[Row]) -> RowBatch:
        """Return the batch of some rows.

        The last one is cached, because the next trip often has the same rows.
        """
        if self.batch is None or not self.batch.has(rows):
            self.batch = gather_rows(rows)
        return self.batch

    def _batched(
        self, batch: RowBatch, trips: Sequence[int]
    ) -> tuple[list[Any], Callable[[str], Any], Segments]:
        """Return the loop's inputs, the access to its weights, and the segments of a batch."""
        order = sorted(set(trips))
        sizes = tuple(trips.count(trip) for trip in order)
        inputs = [input_at(value, order, sizes) for value in batch.inputs]
        at = KeyPositions(trips, batch.positions, self.device)

        def store(number: int, k: Tensor, v: Tensor) -> None:
            self.pool.store(number, at, k, v)

        def attend(number: int, q: Tensor, node: fx.Node) -> Tensor:
            window = argument(node, "window")
            windows = [self.loop.resolve(window, trip) for trip in trips]
            cap, scale = argument(node, "softcap"), float(argument(node, "scale"))
            return self.pool.attend(number, at, q, scale, windows, cap)

        def weight(name: str) -> Any:
            weights = [self.weights[name][trip] for trip in order]
            if all(w is weights[0] for w in weights):
                return weights[0]
            return PerSegment(tuple(weights))

        depths = None
        if dispatch.considers_kernels(self.device):
            depths = Depths(order, sizes, self._stacked)
        return inputs, weight, Segments(sizes, store, attend, depths)

    def _stacked(self, name: str) -> Tensor:
        """Return a weight stacked over all trips, copied when a kernel first needs it."""
        if name not in self._stacks:
            self._stacks[name] = torch.stack(self.weights[name])
        return self._stacks[name]


def _refused(reason: str) -> UsageError:
    return UsageError(
        f"this model cannot be decoded depth by depth: {reason}", hint="use generate instead"
    )


def _leaves(values: Sequence[Any]) -> list[fx.Node]:
    flat = [v for value in values for v in (value if isinstance(value, tuple) else (value,))]
    return [v for v in flat if isinstance(v, fx.Node)]


def _cut(graph: fx.Graph, starts: list[fx.Node], outputs: list[fx.Node]) -> fx.Graph:
    """Extract the part of a graph that computes `outputs` from the values `starts`.

    The starts become placeholders, sorted by their index in the loop's result. Raises UsageError if
    an output depends on other values.
    """
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
    """Group trips that share every matrix that is shared by any two trips.

    Groups are in the order of their first trips.
    """
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
