"""Loop window: run a few middle layers several times in smaller steps, without training."""

from __future__ import annotations

from dataclasses import replace
from itertools import accumulate, product
from typing import Literal

import torch
from torch import fx

from reroll.bounds import COUNT, COUNT_OR_NONE
from reroll.errors import PassError, UsageError
from reroll.rewrite.analysis.program_distance import Measurer
from reroll.rewrite.capture.rolling.split import (
    find_loop,
    inline,
    pack_trips,
    repeat_trip,
    split_loop,
)
from reroll.rewrite.ir.builder import Builder
from reroll.rewrite.ir.program import Loop, Program
from reroll.rewrite.ir.records import Body
from reroll.rewrite.pipeline.base import Context, Pass, option

aten = torch.ops.aten

Scheme = Literal["euler", "midpoint", "heun", "rk4", "naive"]
Choice = int | list[int]


class LoopWindow(Pass):
    """Run the layers from `start` up to `stop` as `steps` smaller steps of the same flow.

    Training-Free Looped Transformers (arXiv 2605.23872). With F the window of layers, running it
    once, h <- F(h), is one Euler step of length 1 along F(h) - h. It is replaced by `steps` steps
    of length 1/steps. `euler` is h <- h + (F(h) - h) / steps. `midpoint`, `heun` and `rk4` are the
    Runge-Kutta schemes of order 2, 2 and 4, which run the window 2, 2 and 4 times in each step.
    `naive` repeats the window without smaller steps; it is a baseline, and degrades most models.

    No weight changes and none is added. Each run of a layer has a cache of its own, so generation
    gives what one forward over the whole text gives. Cache and time grow with the number of runs.
    One Euler step is the original.

    Layers count from 0, and `stop` is not in the window. Where one trip of the loop holds several
    layers, both count trips. Options that are lists are searched: all combinations are tried on the
    calibration text, and the one with the lowest perplexity is taken.
    """

    name = "loop_window"
    contract = "approximate"

    start: Choice = option(
        within=COUNT_OR_NONE, help="the first layer of the window, or several to try"
    )
    stop: Choice = option(within=COUNT, help="the layer after the last one, or several to try")
    steps: Choice = option(
        2, within=COUNT, help="how many steps replace the one, or several to try"
    )
    scheme: Scheme = option("euler", help="how a step is made")
    loop: str | None = option(None, help="the loop's name; the longest one by default")

    def check(self) -> None:
        if not self._candidates():
            raise UsageError(
                "no window starts before it stops",
                where="pass loop_window, options start and stop",
            )

    def run(self, program: Program, context: Context) -> Program:
        candidates = self._candidates()
        if len(candidates) == 1:
            return self._looped(program, *candidates[0], context)
        measurer = Measurer(program, context)
        if measurer.source != "text" or not measurer.generates:
            raise PassError(
                "a search needs a model that predicts text, and its tokenizer",
                hint="give one start, one stop and one number of steps",
            )
        by_perplexity: list[tuple[float, tuple[int, int, int]]] = []
        for number, candidate in enumerate(candidates):
            context.progress(number, len(candidates), "searching")
            tried = self._looped(program.edit(), *candidate, None)
            quality = measurer.compare(program, tried)["perplexity"]
            by_perplexity.append((quality["after"], candidate))
            measurer.keep([program])
        by_perplexity.sort()
        context.remark(
            f"{len(by_perplexity)} windows tried; perplexity {quality['before']:.4g} without, "
            + ", ".join(f"{p:.4g} with {_named(c)}" for p, c in by_perplexity[:3])
        )
        return self._looped(program, *by_perplexity[0][1], context)

    def _candidates(self) -> list[tuple[int, int, int]]:
        starts, stops, steps = (
            v if isinstance(v, list) else [v] for v in (self.start, self.stop, self.steps)
        )
        combined = product(starts, stops, steps)
        return [(a, b, n) for a, b, n in combined if a < b]

    def _looped(
        self, program: Program, start: int, stop: int, steps: int, context: Context | None
    ) -> Program:
        whole = find_loop(program, self.loop)
        if stop > whole.trips:
            raise PassError(
                f"{whole.name} has {whole.trips} trips, and the window stops at {stop}",
                hint=f"stop is {whole.trips} or less",
            )
        if len(whole.carry) != 1:
            raise PassError(f"{whole.name} carries {len(whole.carry)} values, and a step needs one")
        name, trips = whole.name, whole.trips
        program, pieces = split_loop(program, whole, [start, stop])
        firsts = [0, *accumulate(piece.trips for piece in pieces[:-1])]
        window = next(p for p, first in zip(pieces, firsts, strict=True) if first == start)
        program, window = pack_trips(program, window, stop - start)
        runs = 1
        if steps > 1 and self.scheme != "naive":
            body, runs = _stepped(window.body.graph, self.scheme, 1 / steps)
            bodies = {**program.bodies, window.name: Body(body, window.period * runs)}
            program = replace(program, bodies=bodies)
            window = Loop(window.node, bodies[window.name])
        program, _ = repeat_trip(program, window, steps)
        if context is not None:
            executed = start + steps * runs * (stop - start) + trips - stop
            context.remark(
                f"{name}: layers {start} to {stop - 1} run {steps * runs} times "
                f"({steps} {self.scheme} steps); {trips} -> {executed} layers run, "
                f"with one cache each"
            )
        return program


def _named(candidate: tuple[int, int, int]) -> str:
    start, stop, steps = candidate
    return f"start={start}, stop={stop}, steps={steps}"


def _stepped(body: fx.Graph, scheme: Scheme, length: float) -> tuple[fx.Graph, int]:
    """Build a body of one step along F(h) - h, and return it and how often it runs F."""
    graph = fx.Graph()
    placeholders = [n for n in body.nodes if n.op == "placeholder"]
    values = {placeholder: graph.node_copy(placeholder) for placeholder in placeholders}
    runs = 0

    call = Builder(graph).call

    def slope(h: fx.Node) -> fx.Node:
        nonlocal runs
        runs += 1
        (out,) = inline(graph, body, {**values, placeholders[0]: h})
        return call(aten.sub.Tensor, out, h)

    def along(h: fx.Node, direction: fx.Node, factor: float) -> fx.Node:
        return call(aten.add.Tensor, h, call(aten.mul.Tensor, direction, factor))

    h = values[placeholders[0]]
    first = slope(h)
    if scheme == "euler":
        out = along(h, first, length)
    elif scheme == "midpoint":
        out = along(h, slope(along(h, first, length / 2)), length)
    elif scheme == "heun":
        second = slope(along(h, first, length))
        out = along(h, call(aten.add.Tensor, first, second), length / 2)
    else:
        second = slope(along(h, first, length / 2))
        third = slope(along(h, second, length / 2))
        last = slope(along(h, third, length))
        middle = call(aten.mul.Tensor, call(aten.add.Tensor, second, third), 2.0)
        total = call(aten.add.Tensor, call(aten.add.Tensor, first, middle), last)
        out = along(h, total, length / 6)
    graph.output((out,))
    return graph, runs
