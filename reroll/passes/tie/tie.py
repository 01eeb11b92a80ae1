"""Tie: let the trips of a depth loop share a few blocks of weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import fx

from reroll.bounds import COUNT
from reroll.errors import PassError, UsageError
from reroll.rewrite.analysis.cache_fit import reuse_remark
from reroll.rewrite.analysis.hidden_inputs import hidden_states
from reroll.rewrite.analysis.phases import Phases, choose, cosine_distances, segment
from reroll.rewrite.analysis.residual import Tracer
from reroll.rewrite.ir.builder import Builder
from reroll.rewrite.ir.ops import RMS_NORM
from reroll.rewrite.ir.patterns import Miss
from reroll.rewrite.ir.program import Loop, Program, weight_nodes
from reroll.rewrite.ir.records import TensorType
from reroll.rewrite.ir.weights import Expr, Weight, cast, mean, normal, zeros
from reroll.rewrite.pipeline.base import Context, Pass, option
from reroll.rewrite.pipeline.options import nearest_name

Layout = Literal["cycle", "sequence", "middle_cycle"]
Init = Literal["stepwise", "average", "lower"]

aten = torch.ops.aten

_NORMS = (RMS_NORM, aten.layer_norm.default)


class Tie(Pass):
    """Let the trips of each depth loop share `blocks` blocks of weights.

    Relaxed Recursive Transformers (arXiv 2410.20672), section 2.2. A block holds the weights of one
    trip of the loop: of one layer, or of one period of layers. The body does not change, only which
    entry of each weight a trip uses.

    Layouts say which trips share. With L trips and K blocks, `cycle` gives trip t the block t mod
    K, and `sequence` gives neighbouring trips one block. `middle_cycle` leaves the first and the
    last trip alone, which count as two of the K blocks, and cycles through the rest. L need not be
    a multiple of K: some blocks then serve one trip more than others, and no layer is dropped.

    With `phases`, every phase of the loop has one block. A phase is a contiguous run of layers with
    similar outputs (Block-Recurrent Hypothesis, arXiv 2512.19941). `auto` finds phases as
    `find_phases` does: `blocks` of them or, without it, as many as are worth it. `layout` is not
    used then; `stepwise` takes the middle trip of a phase, `lower` the first.

    `init` says what a block starts as: the mean of the trips that share it (`average`, best before
    `relax`), or the weights of one trip. With `stepwise`, best without `relax`, these are K trips
    spaced evenly through the loop. With `lower` they are the first K trips, or with `middle_cycle`
    the first middle ones.

    With `scaling`, the outputs of sublayers and of the trip are scaled by a small MLP of the step,
    one MLP for each block. So a block can act differently in each of its trips: the student block
    of Raptor (arXiv 2512.19941). The factors start as 1 and have to be trained.

    Weights of norms stay one per trip unless `norms` is set: they are small, and what they scale
    differs from depth to depth. All other trainable weights are tied, with biases and other
    vectors; `relax` gives each trip its own vectors back. `Program.reference` keeps the weights
    before tying, for `relax`.
    """

    name = "tie"
    contract = "approximate"

    blocks: int | list[int] | dict[str, int] | None = option(
        None,
        within=COUNT,
        help="blocks in each loop: one number, one for each loop in order, or by loop's name",
    )
    phases: Literal["auto"] | list[int] | None = option(
        None,
        within=COUNT,
        help="one block for each phase: auto, or where the second phase and the others start",
    )
    layout: Layout = option("cycle", help="which trips share a block")
    init: Init = option("average", help="what a block starts as")
    norms: bool = option(False, help="tie the weights of norms as well")
    scaling: bool = option(False, help="scale what a block writes by the step, with a small MLP")

    def check(self) -> None:
        counts = self.blocks
        if counts is None and self.phases is None:
            raise UsageError(
                "blocks has to be given, or phases",
                where="pass tie, option blocks",
                hint="for example blocks=10, or phases=auto",
            )
        if counts is None or self.layout != "middle_cycle":
            return
        values = (
            [counts]
            if isinstance(counts, int)
            else list(getattr(counts, "values", lambda: counts)())
        )
        if min(values) < 3:
            raise UsageError(
                "blocks must be 3 or more with middle_cycle, the first and last trip included",
                where="pass tie, option blocks",
            )

    def run(self, program: Program, context: Context) -> Program:
        if not program.loops:
            raise PassError("the program has no loop whose trips could share weights")
        for loop, blocks in self._blocks(program).items():
            program = self._tie(program, loop, blocks, context)
        return program

    def _phases(self, program: Program, loop: Loop, blocks: int, context: Context) -> Phases:
        """Return the given phases of a loop, or find `blocks` of them; 0 finds the best number."""
        if isinstance(self.phases, list):
            starts = (0, *self.phases)
            if list(starts) != sorted(set(starts)) or starts[-1] >= loop.trips:
                raise PassError(
                    f"phases start in ascending order at trips 1 to {loop.trips - 1}, not at "
                    f"{self.phases}"
                )
            return Phases(starts, loop.trips, 0.0)
        distances = cosine_distances(hidden_states(program, loop, context)[1:])
        phases = segment(distances, blocks) if blocks else choose(distances)[0]
        context.remark(
            f"{loop.name}: {len(phases.starts)} phases: {phases}, {phases.between:.0%} of the "
            "distance between layers lies between them"
        )
        return phases

    def _blocks(self, program: Program) -> dict[Loop, int]:
        """Return the number of blocks of each loop that is to be tied."""
        loops = program.loops
        if self.blocks is None:
            return dict.fromkeys(loops, 0)
        if isinstance(self.blocks, int):
            return dict.fromkeys(loops, self.blocks)
        if isinstance(self.blocks, list):
            if len(self.blocks) != len(loops):
                raise PassError(
                    f"blocks has {len(self.blocks)} numbers for {len(loops)} loops",
                    hint=f"the loops are {', '.join(loop.name for loop in loops)}",
                )
            return dict(zip(loops, self.blocks, strict=True))
        named = {loop.name: loop for loop in loops}
        for name in self.blocks:
            if name not in named:
                raise PassError(f"there is no loop {name!r}", hint=nearest_name(name, named))
        return {named[name]: count for name, count in self.blocks.items()}

    def _tie(self, program: Program, loop: Loop, blocks: int, context: Context) -> Program:
        if blocks > loop.trips:
            raise PassError(
                f"{loop.name} has {loop.trips} trips, which cannot use {blocks} blocks",
                hint=f"give {loop.trips} blocks or fewer",
            )
        if self.phases is None:
            index = assignment(loop.trips, blocks, self.layout)
            first = starts(loop.trips, blocks, self.layout, self.init)
        else:
            phases = self._phases(program, loop, blocks, context)
            index, blocks = phases.index(), len(phases.starts)
            first = middles(phases) if self.init == "stepwise" else phases.starts
        tied: dict[str, Weight] = {}
        for name, nodes in weight_nodes(loop.body.graph).items():
            weight = program.weights[name]
            # weights that all trips share already, such as the head of exits, stay out of blocks
            if (
                weight.index is not None
                and weight.trainable
                and (self.norms or not all(map(_is_norms, nodes)))
            ):
                entries = tuple(
                    self._entry(
                        weight, [t for t, b in enumerate(index) if b == block], first[block]
                    )
                    for block in range(blocks)
                )
                tied[name] = replace(weight, entries=entries, index=index)
        before = sum(program.weights[name].elements() for name in tied)
        after = sum(weight.elements() for weight in tied.values())
        each = f" of {loop.period} layers each" if loop.period > 1 else ""
        context.remark(
            f"{loop.name}: {loop.trips} trips{each} share {blocks} blocks ({_runs(index)}); "
            f"{len(tied)} weights tied, {before:,} -> {after:,} parameters"
        )
        reuse = reuse_remark(program, loop, index)
        if reuse is not None:
            context.remark(reuse)
        changed = {n: w for n, w in tied.items() if w != program.weights[n]}
        untied = {n: program.reference.get(n, program.weights[n]) for n in changed}
        program = replace(
            program,
            weights=program.weights.with_weights(tied),
            reference=program.reference.with_weights(untied),
        )
        if self.scaling:
            program, added = scale_by_step(program, loop, index)
            context.remark(f"{loop.name}: scaling by step, {added:,} parameters")
        return program

    def _entry(self, weight: Weight, members: list[int], first: int) -> Expr:
        if self.init != "average":
            return weight.for_trip(first)
        expressions = [weight.for_trip(t) for t in members]
        if len(set(expressions)) == 1:
            return expressions[0]
        wide = mean(
            [cast(e, torch.promote_types(e.meta.dtype, torch.float32)) for e in expressions]
        )
        return cast(wide, weight.meta.dtype)


def assignment(trips: int, blocks: int, layout: Layout) -> tuple[int, ...]:
    """Return the block of each trip."""
    if layout == "cycle":
        return tuple(t % blocks for t in range(trips))
    if layout == "sequence":
        return tuple(t * blocks // trips for t in range(trips))
    middle = (1 + t % (blocks - 2) for t in range(trips - 2))
    return (0, *middle, blocks - 1)


def starts(trips: int, blocks: int, layout: Layout, init: Init) -> tuple[int, ...]:
    """Return the trip whose weights each block starts as; with `average` it is not used."""
    if layout == "middle_cycle":
        return (0, *_spaced(1, trips - 2, blocks - 2, init), trips - 1)
    return _spaced(0, trips - 1, blocks, init)


def middles(phases: Phases) -> tuple[int, ...]:
    """Return the trip in the middle of each phase."""
    stops = (*phases.starts[1:], phases.layers)
    return tuple((a + b - 1) // 2 for a, b in zip(phases.starts, stops, strict=True))


def _spaced(first: int, last: int, count: int, init: Init) -> tuple[int, ...]:
    if init == "stepwise" and count > 1:
        return tuple(round(first + i * (last - first) / (count - 1)) for i in range(count))
    return tuple(range(first, first + count))


def _is_norms(node: fx.Node) -> bool:
    return all(user.target in _NORMS for user in node.users)


def _runs(index: tuple[int, ...]) -> str:
    """Format the assignment, shortened: "0 1 2 3 0 1 ... 2 3"."""
    words = [str(b) for b in index]
    return " ".join(words if len(words) <= 12 else [*words[:8], "...", *words[-2:]])


# ---- scaling by step


INNER = 16


def scale_by_step(program: Program, loop: Loop, index: Sequence[int]) -> tuple[Program, int]:
    """Multiply the outputs of the sublayers and of the trip by 1 + MLP(step); edits in place.

    The MLP of Raptor (arXiv 2512.19941) maps the step t in [0, 1] of a block's trips: Linear(1, 16)
    -> SiLU -> Linear(16, width) for each scaled output. Trips with the same number in `index` share
    a block and its MLP. The last layer starts as zero, so that nothing changes before training.
    Returns the Program and the number of new parameters.

    Raises PassError if the residual stream of the body cannot be followed.
    """
    body = loop.body.graph
    places = loop.places
    stream = Tracer(program).trace(places[0])
    if isinstance(stream, Miss):
        raise PassError(
            f"the residual stream cannot be followed: {stream.reason}",
            ", ".join(stream.nodes),
        )
    returned: Any = body.output_node().args[0]
    result: fx.Node = returned[0]
    written = [n for n in body.nodes if n in stream.writers]
    type_: TensorType = result.meta["type"]
    width = type_.shape[-1]
    assert isinstance(width, int)
    count = len(written) + 1
    step = loop.add_input("step", _steps(index))
    blocks = range(max(index) + 1)
    shapes = {
        "up.weight": (INNER, 1), "up.bias": (INNER,),
        "down.weight": (count * width, INNER), "down.bias": (count * width,),
    }  # fmt: skip
    weights: dict[str, Weight] = {}
    nodes: dict[str, fx.Node] = {}
    build = Builder(body, loop)
    with build.before(next(n for n in body.nodes if n.op != "placeholder")):
        for name, shape in shapes.items():
            entries = tuple(
                normal(shape, 1.0, block, type_.dtype)
                if name.startswith("up")
                else zeros(shape, type_.dtype)
                for block in blocks
            )
            full = f"{loop.name}.*.step.{name}"
            weights[full] = Weight(entries, tuple(index))
            nodes[name] = build.weight(full, weights[full])
        h = build.call(aten.full.default, [1], step, dtype=type_.dtype)
        h = build.call(aten.linear.default, h, nodes["up.weight"], nodes["up.bias"])
        h = build.call(aten.silu.default, h)
        h = build.call(aten.linear.default, h, nodes["down.weight"], nodes["down.bias"])
        out = build.call(aten.add.Tensor, h, 1.0)
        scales = [
            build.call(aten.slice.Tensor, out, 0, n * width, (n + 1) * width) for n in range(count)
        ]
    for node, scale in zip([*written, result], scales, strict=True):
        build.wrap(node, _times(build, scale))
    added = sum(weight.elements() for weight in weights.values())
    return replace(program, weights=program.weights.with_weights(weights)), added


def _times(build: Builder, scale: fx.Node) -> Callable[[fx.Node], fx.Node]:
    return lambda node: build.call(aten.mul.Tensor, node, scale)


def _steps(index: Sequence[int]) -> tuple[float, ...]:
    """Return the position of each trip among those of its block, from 0 to 1."""
    uses = [[t for t, b in enumerate(index) if b == block] for block in range(max(index) + 1)]
    return tuple(
        uses[block].index(trip) / max(len(uses[block]) - 1, 1) for trip, block in enumerate(index)
    )
