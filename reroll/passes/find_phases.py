"""Find phases: group similar layers, and measure what each sublayer and each layer contributes."""

from __future__ import annotations

import torch
from torch import fx

from reroll.bounds import COUNT, SHARE
from reroll.errors import PassError
from reroll.rewrite.analysis import tolerances
from reroll.rewrite.analysis.distance import divergence
from reroll.rewrite.analysis.hidden_inputs import (
    angular_distance,
    calibration_inputs,
    hidden_states,
    values_of,
)
from reroll.rewrite.analysis.phases import (
    Phases,
    bisections,
    choose,
    cosine_distances,
    linear_cka,
    segment,
)
from reroll.rewrite.analysis.program_distance import measured_output
from reroll.rewrite.analysis.residual import Tracer
from reroll.rewrite.capture.rolling.split import find_loop, select_trips
from reroll.rewrite.ir.patterns import Miss
from reroll.rewrite.ir.program import Loop, Program
from reroll.rewrite.pipeline.base import Context, Pass, option

# few tokens: with `skips` the model runs once for each layer
SKIP_TOKENS = 128


class FindPhases(Pass):
    """Say into which phases the layers fall, what each sublayer adds, and what each layer is for.

    An analysis: the program stays as it is, and the remarks are the result. Phases are contiguous
    runs of layers with similar outputs (Block-Recurrent Hypothesis, arXiv 2512.19941). For every
    number of phases from 2 to `most`, the remarks name those with the least cosine distance inside
    them. They also name the clusters of repeated maximum cuts, which need not be contiguous.
    `tie(phases=auto)` ties within the phases that are found here.

    Further remarks: the angular distance from layer to layer; the segmentation by linear CKA; the
    norm of each sublayer's output relative to the residual stream. Unless `skips` is off, each
    layer is left out once, and the change of the output measured. It is KL divergence in nats for
    logits, else relative RMS error.
    """

    name = "find_phases"
    contract = "exact"

    most: int = option(8, within=COUNT, help="the largest number of phases to try")
    gain: float = option(
        0.05, within=SHARE, help="the part of all distance that one phase more has to explain"
    )
    skips: bool = option(True, help="leave out each layer once, and measure what that does")
    loop: str | None = option(None, help="the loop's name; the longest one by default")

    def run(self, program: Program, context: Context) -> Program:
        loop = find_loop(program, self.loop)
        if loop.trips < 2:
            raise PassError(f"{loop.name} has one trip, which is one phase")
        states = hidden_states(program, loop, context)
        distances = cosine_distances(states[1:])
        chosen, tried = choose(distances, self.most, self.gain)
        for each in tried[1:]:
            context.remark(_described(each, distances))
        context.remark(f"{loop.name}: {len(chosen.starts)} phases: {chosen}")
        turns = (angular_distance(states, i, i + 1) for i in range(loop.trips))
        context.remark("angular distance over each layer: " + _numbers(turns))
        by_cka = segment(1 - linear_cka(states[1:]), len(chosen.starts))
        same = "the same" if by_cka.starts == chosen.starts else str(by_cka)
        context.remark(f"by linear CKA: {same}")
        for remark in _contributions(program, loop, context):
            context.remark(remark)
        if self.skips:
            context.remark(_skips(program, loop, context))
        return program


def _described(phases: Phases, distances: torch.Tensor) -> str:
    """Describe a segmentation, and whether cuts that need not be contiguous agree with it."""
    count = len(phases.starts)
    clusters = bisections(distances, count)
    index = phases.index()
    same = clusters == sorted(
        [layer for layer, phase in enumerate(index) if phase == number] for number in range(count)
    )
    free = "the same" if same else " | ".join(_layers(cluster) for cluster in clusters)
    return f"{count} phases: {phases} ({phases.between:.0%} between them); free cuts: {free}"


def _layers(cluster: list[int]) -> str:
    if cluster == list(range(cluster[0], cluster[-1] + 1)) and len(cluster) > 1:
        return f"{cluster[0]}-{cluster[-1]}"
    return ",".join(map(str, cluster))


def _contributions(program: Program, loop: Loop, context: Context) -> list[str]:
    """Measure the norm of what each sublayer adds, relative to the residual stream."""
    stream_input = next(n for n in loop.body.graph.nodes if n.op == "placeholder")
    stream = Tracer(program).trace(stream_input)
    if isinstance(stream, Miss):
        return [f"the residual stream cannot be followed: {stream.reason}"]
    writers = [node for node in loop.body.graph.nodes if node in stream.writers]
    if not writers:
        return []
    values = values_of(program, [loop.carry[0], *writers], context)
    states = hidden_states(program, loop, context)[:-1].norm(dim=-1).clamp_min(1e-12)
    remarks = []
    for node in writers:
        sizes = (values[node].norm(dim=-1) / states).mean(1).tolist()
        remarks.append(f"{_sublayer(node)} adds, relative to the stream: {_numbers(sizes)}")
    return remarks


def _sublayer(node: fx.Node) -> str:
    """Return the module of the nearest weight that a value depends on, or else the node's name."""
    reached = [node]
    for current in reached:
        weights = [n for n in current.all_input_nodes if n.op == "get_attr"]
        if weights:
            return str(weights[0].target).removesuffix(".weight").rpartition("*.")[2]
        reached += current.all_input_nodes
    return node.name


def _skips(program: Program, loop: Loop, context: Context) -> str:
    """Measure how far the output changes when each layer is left out."""
    inputs = calibration_inputs(program, context, SKIP_TOKENS, SKIP_TOKENS)[:1]
    output = measured_output(program)

    def outputs(each: Program) -> torch.Tensor:
        return context.outputs(each, inputs[0])[output]

    with torch.no_grad():
        expected = outputs(program)
        effects = []
        for layer in range(loop.trips):
            context.progress(layer, loop.trips, "skipping layers")
            edited = program.edit()
            rest = [trip for trip in range(loop.trips) if trip != layer]
            shorter, _ = select_trips(edited, find_loop(edited, loop.name), rest)
            actual = outputs(shorter)
            if "logits" in output:
                effects.append(divergence(expected, actual))
            else:
                effects.append(tolerances.relative_rms(actual, expected))
    metric = "KL divergence" if "logits" in output else "relative RMS error of the output"
    return f"{metric} without each layer: {_numbers(effects)}"


def _numbers(values: object) -> str:
    return " ".join(f"{value:.2g}" for value in values)  # type: ignore[attr-defined]
