"""Loop core: turn layers in the middle into one block that runs any number of times."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Literal

import torch
from torch import fx

from reroll.bounds import COUNT, COUNT_OR_NONE
from reroll.errors import PassError, UsageError
from reroll.rewrite.analysis.hidden_inputs import (
    angular_distance,
    block_influence,
    flattest,
    hidden_states,
)
from reroll.rewrite.capture.rolling.split import (
    find_loop,
    inline,
    pack_trips,
    repeat_trip,
    select_trips,
    split_loop,
)
from reroll.rewrite.ir.builder import Builder
from reroll.rewrite.ir.matching import shape
from reroll.rewrite.ir.program import Loop, Program
from reroll.rewrite.ir.records import Body
from reroll.rewrite.ir.weights import Weight, concat, identity, zeros
from reroll.rewrite.pipeline.base import Context, Pass, option
from reroll.rewrite.pipeline.selection import ranges

aten = torch.ops.aten


class LoopCore(Pass):
    """Keep the first and last layers, and loop a core of the middle ones.

    Retrofitting recurrence (arXiv 2511.07384): e = prelude(x), s <- core(adapter([s; e])) for every
    trip, and the coda reads the last s. The adapter is a matrix [d, 2d] that starts as [0 | 1]: it
    passes e and ignores s. So before training the model is the original without the layers that
    were cut, whatever the number of trips. Training teaches it to use s; without training, more
    trips gain nothing.

    `prelude`, `core` and `coda` are numbers of layers. Middle layers beyond `core` are cut.
    `influence` cuts those that change the hidden state least (1 - cos of input and output).
    `angular` cuts the run of layers with the least angular distance from input to output. `late`
    cuts the first ones, so that the core comes right before the coda. A list for `core` names the
    layers that loop.

    The state s starts as zeros, as e (`embedding`), or as noise with the deviation sqrt(2/(5d)) of
    Huginn (arXiv 2502.05171), cut at three deviations. Every trip has caches of its own.
    `model.set_trips(n)` changes the number of trips; in training, gradients then go through the
    last few only.
    """

    name = "loop_core"
    contract = "approximate"

    prelude: int = option(
        within=COUNT_OR_NONE, help="how many of the first layers run once, before the core"
    )
    core: int | list[int] = option(within=COUNT_OR_NONE, help="how many layers loop, or which ones")
    coda: int = option(
        within=COUNT_OR_NONE, help="how many of the last layers run once, after the core"
    )
    trips: int = option(4, within=COUNT, help="how often the core runs")
    choose: Literal["influence", "angular", "late"] = option(
        "influence", help="which of the middle layers are kept"
    )
    state: Literal["zero", "embedding", "noise"] = option(
        "zero", help="what the core's state starts as"
    )
    loop: str | None = option(None, help="the loop's name; the longest one by default")

    def check(self) -> None:
        # in a list, 0 is allowed: it is the number of the first layer
        if self.core == 0:
            raise UsageError("core must be a layer or more", where="pass loop_core, option core")

    def run(self, program: Program, context: Context) -> Program:
        loop = find_loop(program, self.loop)
        if len(loop.carry) != 1:
            raise PassError(f"{loop.name} carries {len(loop.carry)} values; a state is one value")
        middle = range(self.prelude, loop.trips - self.coda)
        core = self._core(program, loop, middle, context)
        last = range(loop.trips - self.coda, loop.trips)
        dropped = [layer for layer in middle if layer not in core]
        name, before = loop.name, loop.trips
        program, loop = select_trips(program, loop, [*range(self.prelude), *core, *last])
        program, pieces = split_loop(program, loop, [self.prelude, self.prelude + len(core)])
        looped = pieces[1 if self.prelude else 0]
        program, looped = pack_trips(program, looped, len(core))
        program, looped = self._with_adapter(program, looped)
        program, looped = repeat_trip(program, looped, self.trips)
        context.remark(
            f"{name}: of {before} layers, {self.prelude} run before the core and {self.coda} after "
            f"it; {looped.name} runs the layers {ranges(core)} {self.trips} times; "
            + (f"cut are {ranges(dropped)}" if dropped else "none is cut")
        )
        return program

    def _core(self, program: Program, loop: Loop, middle: range, context: Context) -> list[int]:
        """Return the layers that loop, in order."""
        if isinstance(self.core, list):
            wrong = [layer for layer in self.core if layer not in middle]
            if wrong or sorted(set(self.core)) != self.core:
                raise PassError(
                    f"the core {self.core} is not an ascending list of layers from {middle.start} "
                    f"to {middle.stop - 1}, which are between prelude and coda"
                )
            return self.core
        spare = len(middle) - self.core
        if spare < 0:
            raise PassError(
                f"{loop.name} has {loop.trips} layers, fewer than {self.prelude} + {self.core} + "
                f"{self.coda}"
            )
        if not spare or self.choose == "late":
            return list(middle)[spare:]
        states = hidden_states(program, loop, context)
        if self.choose == "angular":
            start = flattest(states, middle[: len(middle) - spare + 1], spare)
            turned = angular_distance(states, start, start + spare)
            context.remark(
                f"the layers {start} to {start + spare - 1} turn the hidden state least: angular "
                f"distance {turned:.3f}"
            )
            return [layer for layer in middle if not start <= layer < start + spare]
        influence = block_influence(states)
        context.remark(
            "influence of the middle layers: "
            + ", ".join(f"{layer}: {influence[layer]:.3f}" for layer in middle)
        )
        return sorted(sorted(middle, key=lambda layer: -influence[layer])[: self.core])

    def _with_adapter(self, program: Program, loop: Loop) -> tuple[Program, Loop]:
        """Let the body read a new carried state and, as an invariant, its former input."""
        old = loop.body.graph
        type_ = loop.carry[0].meta["type"]
        placeholders = [n for n in old.nodes if n.op == "placeholder"]
        graph = fx.Graph()
        values = {placeholder: graph.node_copy(placeholder) for placeholder in placeholders}
        state, width = values[placeholders[0]], type_.shape[-1]
        build, dtype = Builder(graph), type_.dtype
        embedding = build.placeholder("embedded", type_)
        entry = concat(1, [zeros((width, width), dtype), identity(width, dtype)])
        adapter, name = Weight((entry,), (0,) * loop.trips), f"{loop.name}.*.adapter.weight"
        both = build.call(aten.cat.default, [state, embedding], -1)
        adapted = build.call(aten.linear.default, both, build.weight(name, adapter))
        graph.output(inline(graph, old, {**values, placeholders[0]: adapted}))
        embedded = loop.carry[0]
        with program.graph.inserting_before(loop.node):
            start = self._start(program.graph, embedded)
        loop.change(carry=(start,), inputs=(*loop.inputs, embedded))
        weights = program.weights.with_weight(name, adapter)
        bodies = {**program.bodies, loop.name: Body(graph, loop.period)}
        return replace(program, bodies=bodies, weights=weights), Loop(loop.node, bodies[loop.name])

    def _start(self, graph: fx.Graph, embedded: fx.Node) -> fx.Node:
        if self.state == "embedding":
            return embedded
        build = Builder(graph)
        if self.state == "zero":
            return build.call(aten.zeros_like.default, embedded)
        noise = build.call(aten.randn_like.default, embedded)
        cut = build.call(aten.clamp.default, noise, -3.0, 3.0)
        return build.call(aten.mul.Tensor, cut, math.sqrt(2 / (5 * shape(embedded)[-1])))
