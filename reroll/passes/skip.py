"""Skip: leave out layers, or the attention or feed-forward part of layers."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import fx

from reroll.bounds import COUNT_OR_NONE
from reroll.errors import PassError, UsageError
from reroll.rewrite.analysis.hidden_inputs import block_influence, flattest, values_of
from reroll.rewrite.analysis.sublayers import Layer, find_layers, leave_out
from reroll.rewrite.capture.rolling.split import select_trips, split_loop
from reroll.rewrite.ir.program import Loop, Program, drop_unused
from reroll.rewrite.pipeline.base import Context, Pass, option
from reroll.rewrite.pipeline.selection import ranges


class Skip(Pass):
    """Leave out layers, or what their attentions or feed-forward parts add.

    The hidden state goes on as it was. No weight changes and none is added: of what stays, the
    cache is what the model's own cache holds for these layers, so that the result drafts for the
    model without a state of its own.

    Layers count from 0 in the order in which they run. With a number for `layers`, that many are
    chosen. `influence` takes those that change the hidden state least, 1 - cos of input and output
    (ShortGPT, arXiv 2403.03853). `angular` takes the run of layers with the least angular distance
    (arXiv 2403.17887). In a loop whose trips hold several layers, only what adds to the hidden
    state can be left out by itself.
    """

    name = "skip"
    contract = "approximate"

    layers: list[int] | int | None = option(
        None, within=COUNT_OR_NONE, help="layers to leave out, or how many"
    )
    attention: list[int] | None = option(
        None, within=COUNT_OR_NONE, help="layers whose attention, or other mixer, is left out"
    )
    feed_forward: list[int] | None = option(
        None, within=COUNT_OR_NONE, help="layers whose feed-forward part is left out"
    )
    choose: Literal["influence", "angular"] = option(
        "influence", help="how layers are chosen, where their number is given"
    )

    def check(self) -> None:
        if not any((self.layers, self.attention, self.feed_forward)):
            raise UsageError(
                "nothing is left out", "pass skip", "give layers, attention or feed_forward"
            )

    def run(self, program: Program, context: Context) -> Program:
        layers = find_layers(program)
        whole = self._whole(program, layers, context)
        left_out = [self._left_out(number, layer, whole) for number, layer in enumerate(layers)]
        if len(whole) == len(layers):
            raise PassError("all layers are left out", hint=f"there are {len(layers)}")
        parts = [n for n, removed in enumerate(left_out) if removed and n not in whole]
        said = [f"layers {ranges(whole)} are left out"] if whole else []
        said += [f"of the layers {ranges(parts)}, one part is left out"] if parts else []
        context.remark("; ".join(said))
        by_graph: dict[str, list[tuple[Layer, frozenset[int]]]] = {}
        for layer, removed in zip(layers, left_out, strict=True):
            name = "main" if layer.loop is None else layer.loop.name
            by_graph.setdefault(name, []).append((layer, removed))
        for layer, removed in by_graph.pop("main", []):
            _edit(layer, removed)
        for each in by_graph.values():
            program = _shortened(program, each)
        for _, graph in program.graphs():
            drop_unused(graph)
        for loop in program.loops:
            loop.drop_unused_inputs()
        return program.pruned()

    def _whole(self, program: Program, layers: Sequence[Layer], context: Context) -> list[int]:
        """Return the layers that are left out altogether."""
        for name in ("layers", "attention", "feed_forward"):
            numbers = getattr(self, name)
            wrong = [n for n in numbers if n >= len(layers)] if isinstance(numbers, list) else []
            if wrong:
                hint = f"0 to {len(layers) - 1}" if layers else "no layer was found"
                raise UsageError(f"there is no layer {wrong[0]}", f"pass skip, option {name}", hint)
        if not isinstance(self.layers, int):
            return sorted(set(self.layers or ()))
        if self.layers >= len(layers):
            raise PassError(f"{self.layers} layers cannot be left out of {len(layers)}")
        if not self.layers:
            return []
        states = _states(program, layers, context)
        if self.choose == "angular":
            return _flattest(states, self.layers)
        influence = [block_influence(torch.stack(pair))[0] for pair in states]
        order = sorted(range(len(layers)), key=influence.__getitem__)
        return sorted(order[: self.layers])

    def _left_out(self, number: int, layer: Layer, whole: Sequence[int]) -> frozenset[int]:
        """Return the places of the sublayers of a layer that are left out; all have one place."""
        if number in whole:
            return frozenset(range(max(len(layer.sublayers), 1)))
        removed: set[int] = set()
        for name, attends in (("attention", True), ("feed_forward", False)):
            if number not in (getattr(self, name) or ()):
                continue
            found = [
                place
                for place, each in enumerate(layer.sublayers)
                if (each.mixes if attends else not each.attends)
            ]
            if not found:
                raise PassError(
                    f"layer {number} has no {name} that adds to the hidden state by itself",
                    hint="leave out whole layers: skip(layers=[...])",
                )
            removed.update(found)
        return frozenset(removed)


def _shortened(program: Program, layers: Sequence[tuple[Layer, frozenset[int]]]) -> Program:
    """Leave out sublayers of one loop's layers: whole trips, and parts of the bodies of others."""
    loop = layers[0][0].loop
    assert loop is not None
    trips: list[list[tuple[Layer, frozenset[int]]]] = [[] for _ in range(loop.trips)]
    for layer, removed in layers:
        trips[layer.trip].append((layer, removed))
    if not any(removed for _, removed in layers):
        return program
    if len(loop.carry) != 1:
        raise PassError(
            f"{loop.name} carries {len(loop.carry)} values, of which a trip changes more than the "
            "hidden state",
            hint="run skip before the pass that adds to them, such as insert_exits",
        )
    run = [trip for trip in range(loop.trips) if not _is_whole(trips[trip])]
    if not run:
        for user in list(loop.node.users):
            user.replace_all_uses_with(loop.carry[int(user.args[1])])  # type: ignore[arg-type]
            program.graph.erase_node(user)
        program.graph.erase_node(loop.node)
        kept = {name: body for name, body in program.bodies.items() if name != loop.name}
        return replace(program, bodies=kept)
    patterns = [tuple(removed for _, removed in trips[trip]) for trip in run]
    if len(run) < loop.trips:
        program, loop = select_trips(program, loop, run)
    changes = [n + 1 for n, (old, new) in enumerate(pairwise(patterns)) if old != new]
    program, pieces = split_loop(program, loop, changes)
    for start, piece in zip([0, *changes], pieces, strict=True):
        _edit_body(program, piece, patterns[start])
    return program


def _edit_body(program: Program, loop: Loop, pattern: tuple[frozenset[int], ...]) -> None:
    """Leave out sublayers of the layers of a loop's body, in place."""
    if any(pattern):
        found = [x for x in find_layers(program) if x.loop is not None and x.loop.name == loop.name]
        for layer, removed in zip(found, pattern, strict=False):
            if removed and not layer.sublayers:
                raise PassError(
                    f"a trip of {loop.name} holds {len(pattern)} layers, which normalize what they "
                    "hand on: one of them cannot be left out",
                    hint="leave out all layers of a trip",
                )
            _edit(layer, removed)


def _is_whole(trip: Iterable[tuple[Layer, frozenset[int]]]) -> bool:
    return all(len(removed) == max(len(layer.sublayers), 1) for layer, removed in trip)


def _edit(layer: Layer, removed: Iterable[int]) -> None:
    for place in sorted(removed):
        leave_out(layer.sublayers[place])


# ---- hidden states around layers


def _states(
    program: Program, layers: Sequence[Layer], context: Context
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Return the hidden states [tokens, width] before and behind each layer, in fp32."""
    ends = [_ends(layer) for layer in layers]
    nodes = list(dict.fromkeys(node for end in ends for node, _ in end))
    values = values_of(program, nodes, context)
    return [(values[a][i], values[b][j]) for (a, i), (b, j) in ends]


def _ends(layer: Layer) -> tuple[tuple[fx.Node, int], tuple[fx.Node, int]]:
    """Return the nodes of the hidden state before and behind a layer, with their trips."""
    loop, trip = layer.loop, layer.trip
    if loop is None or layer.sublayers:
        before, behind = max(layer.sublayers[0].reads), layer.sublayers[-1].sum
    else:
        returned: Any = loop.body.graph.output_node().args[0]
        before, behind = loop.places[0], returned[0]
    if loop is not None and before in loop.places:
        returned = loop.body.graph.output_node().args[0]
        return (loop.carry[0], 0) if not trip else (returned[0], trip - 1), (behind, trip)
    return (before, trip), (behind, trip)


def _flattest(states: Sequence[tuple[torch.Tensor, torch.Tensor]], count: int) -> list[int]:
    """Return the run of `count` layers with the least angular distance from input to output."""
    joined = torch.stack([*(before for before, _ in states), states[-1][1]])
    start = flattest(joined, range(len(states) - count + 1), count)
    return list(range(start, start + count))
