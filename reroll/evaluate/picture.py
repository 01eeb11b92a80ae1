"""What is to be seen of a Program, as plain data: stages, loops, trips, and what each costs.

`picture` collects it, `reroll.evaluate.program_page` draws it. No weight is read but low-rank
factors that a trip may lack.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from reroll.errors import RerollError
from reroll.evaluate.exits import exit_trips
from reroll.rewrite.analysis.costs import flops_per_token, state_bytes, state_of
from reroll.rewrite.analysis.layers import attention_layers
from reroll.rewrite.analysis.low_rank import LowRankTerm, low_rank_terms, ranks
from reroll.rewrite.analysis.running import is_idle, running
from reroll.rewrite.ir.exits import exits_of, is_open
from reroll.rewrite.ir.matching import argument, is_weight
from reroll.rewrite.ir.ops import ATTENTION, BIDIRECTIONAL, RECURRENCE
from reroll.rewrite.ir.ops.base import Place
from reroll.rewrite.ir.program import Loop, Program
from reroll.rewrite.ir.records import Step
from reroll.rewrite.ir.text.literals import node_name, type_to_text, value_to_text
from reroll.rewrite.ir.text.op_names import LOOP, op_name
from reroll.rewrite.ir.text.printer import node_to_text
from reroll.rewrite.ir.types import type_of
from reroll.rewrite.ir.visibility import Visibility

CONTEXTS = (1024, 4096)

# ops that only give a value another form
MINOR = frozenset(
    """
    aten.clone aten.contiguous aten.expand aten.flatten.using_ints aten.permute aten.reshape
    aten.select.int aten.slice.Tensor aten.squeeze.dim aten.to.dtype aten.transpose.int
    aten.unflatten.int aten.unsqueeze aten.view getitem reroll.widen
    """.split()
)
_CONVOLUTIONS = (torch.ops.aten.conv1d.default, torch.ops.aten.convolution.default)


@dataclass(frozen=True)
class Change:
    """One thing that a pass measured: before and after it, or one number alone."""

    label: str
    before: float | None
    after: float
    unit: str = ""


@dataclass(frozen=True)
class Stage:
    """The capture, or a pass that has run."""

    name: str
    seconds: float | None
    remarks: tuple[str, ...]
    changes: tuple[Change, ...] = ()


@dataclass(frozen=True)
class Line:
    """One op: its result, its name, the weights that it reads, and its other operands.

    `text` is the whole statement, `minor` says that the op only gives a value another form.
    """

    result: str
    op: str
    weights: tuple[str, ...]
    operands: str
    type: str
    text: str
    minor: bool = False
    note: str = ""


@dataclass(frozen=True)
class Mixing:
    """What mixes tokens: `name` in a word, `what` in a few."""

    name: str
    what: str


@dataclass(frozen=True)
class Sharing:
    """Weights that the trips of a loop share in the same way.

    Attributes:
        weights: their names.
        index: for each trip the number of the entry that it reads; None where it reads none.
        parameters: of one entry of all of them.
    """

    weights: tuple[str, ...]
    index: tuple[int | None, ...]
    parameters: int

    @property
    def entries(self) -> int:
        """How many entries there are."""
        return len({n for n in self.index if n is not None})

    @property
    def is_shared(self) -> bool:
        """Whether any two trips read the same entry."""
        return self.entries < sum(n is not None for n in self.index)


@dataclass(frozen=True)
class Residual:
    """The low-rank residual of one weight: its rank in each trip."""

    weight: str
    ranks: tuple[int, ...]


@dataclass(frozen=True)
class TripPicture:
    """One trip of a loop.

    `layers` are the self-attentions as passes number them; `parameters` and `bytes` are of all
    weights that the trip reads, shared or not; `state` is in bytes, by tokens in context.
    """

    number: int
    layers: tuple[int, ...]
    mixings: tuple[Mixing, ...]
    parameters: int
    bytes: int
    state: Mapping[int, int]


@dataclass(frozen=True)
class Exit:
    """An exit: the number of trips after which it stands, and its threshold; None if closed."""

    after: int
    threshold: float | None


@dataclass(frozen=True)
class RegionPicture:
    """Ops outside loops; `parameters` and `bytes` are of what nothing before them reads."""

    lines: tuple[Line, ...]
    mixings: tuple[Mixing, ...]
    parameters: int
    bytes: int
    state: Mapping[int, int]


@dataclass(frozen=True)
class LoopPicture:
    """One loop. `parameters` and `bytes` are those stored for it."""

    name: str
    period: int
    carry: tuple[str, ...]
    inputs: tuple[str, ...]
    body: tuple[Line, ...]
    trips: tuple[TripPicture, ...]
    sharing: tuple[Sharing, ...]
    residuals: tuple[Residual, ...]
    exits: tuple[Exit, ...]
    parameters: int
    bytes: int
    state: Mapping[int, int]


@dataclass(frozen=True)
class Picture:
    """A Program; `parts` are in the order in which they run."""

    name: str
    architecture: str
    dtype: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    parameters: int
    bytes: int
    flops: int
    state: Mapping[int, int]
    stages: tuple[Stage, ...]
    parts: tuple[RegionPicture | LoopPicture, ...]

    @property
    def loops(self) -> tuple[LoopPicture, ...]:
        """The loops among the parts."""
        return tuple(part for part in self.parts if isinstance(part, LoopPicture))


def picture(program: Program, name: str, contexts: Sequence[int] = CONTEXTS) -> Picture:
    """What is to be seen of a Program that is called `name`."""
    return Picture(
        name,
        program.origin.architecture,
        str(program.dtype).removeprefix("torch."),
        tuple(f"{i.name} {type_to_text(i.type)}" for i in program.inputs),
        program.outputs,
        program.parameters(),
        program.weights.bytes(),
        flops_per_token(program),
        {context: state_bytes(program, context) for context in contexts},
        stages(program),
        tuple(_Collector(program, contexts).parts()),
    )


# ---- stages

_UNITS = {"parameters": "", "bytes": "bytes", "flops_per_token": "", "state_bytes": "bytes"}
_LABELS = {
    "flops_per_token": "FLOPs per token",
    "relative_rms_error": "relative RMS error",
    "kl": "KL divergence",
    "top1_agreement": "top-1 agreement",
    "bytes": "bytes of weights",
}


def stages(program: Program) -> tuple[Stage, ...]:
    """The capture and the passes of a Program, in order."""
    origin = program.origin
    revision = f" at {origin.revision}" if origin.revision else ""
    loops = [f"{x.name}: {x.layers} layers as {x.trips} trips of {x.period}" for x in program.loops]
    captured = Stage(f"capture {origin.model}{revision}", None, (*origin.remarks, *loops))
    return captured, *(
        Stage(step.text, step.seconds, step.remarks, tuple(_changes(step))) for step in origin.steps
    )


def _changes(step: Step) -> Iterator[Change]:
    """What a pass measured; numbers that stayed the same are left out."""
    shown_keys = set()
    for keys, before, after in _numbers(step.measured, ()):
        if before == after:
            continue
        words = [_LABELS.get(k, k.replace("_", " ")) for k in keys if k not in _JUDGED]
        label = " ".join(words)
        if keys[0] == "state_bytes" and keys[-1].isdecimal():
            label = f"state at {int(keys[-1]):,} tokens"
        if "quality" in keys:
            other = "the original" if "original" in keys else "the pass before"
            label += f", against {other}"
        # what stands before the first pass is the original
        shown = (" ".join(words), before, after)
        if keys[-1] == "tokens" or shown in shown_keys:
            continue
        shown_keys.add(shown)
        unit = "share" if keys[-1] == "top1_agreement" else _UNITS.get(keys[0], "")
        yield Change(label, before, after, unit)


_JUDGED = ("quality", "previous", "original")


def _numbers(
    value: Any, keys: tuple[str, ...]
) -> Iterator[tuple[tuple[str, ...], float | None, float]]:
    """The numbers in what was measured, with their keys; it may be from a stranger's file."""
    if isinstance(value, Mapping):
        if set(value) == {"before", "after"} and all(map(_is_number, value.values())):
            yield keys, value["before"], value["after"]
            return
        # what is closest to the original comes first
        for key in sorted(value, key=lambda k: k == "previous"):
            yield from _numbers(value[key], (*keys, str(key)))
    elif _is_number(value) and keys:
        yield keys, None, value


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


# ---- the graph


@dataclass
class _Collector:
    """One walk over a Program."""

    program: Program
    contexts: Sequence[int]
    # stored tensors that have been counted
    counted: set[Hashable] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.layers: dict[fx.Node, tuple[int, ...]] = {
            layer.node: layer.numbers for layer in attention_layers(self.program)
        }

    def parts(self) -> Iterator[RegionPicture | LoopPicture]:
        """The loops, and what runs between them."""
        loops = {loop.node: loop for loop in self.program.loops}
        pending: list[fx.Node] = []
        for node in self.program.graph.nodes:
            if node not in loops:
                pending.append(node)
                continue
            yield from self.region(pending)
            pending = []
            yield self.loop(loops[node])
        yield from self.region(pending)

    def region(self, nodes: list[fx.Node]) -> Iterator[RegionPicture]:
        """Ops outside loops, if there are any."""
        calls = [n for n in nodes if n.op == "call_function"]
        if not calls:
            return
        place = Place(0)
        read = {str(n.target) for c in calls for n in c.all_input_nodes if is_weight(n)}
        yield RegionPicture(
            tuple(self.lines(calls, "")),
            tuple(m for n in calls if (m := self.mixing(n, place)) is not None),
            *self.stored(sorted(read)),
            {c: state_of(calls, Place(c)) for c in self.contexts},
        )

    def loop(self, loop: Loop) -> LoopPicture:
        """One loop."""
        live = [running(loop, trip) for trip in range(loop.trips)]
        residuals = low_rank_terms(loop.body.graph)
        factors = {name for each in residuals for name in each.factors}
        read = [_read(nodes) for nodes in live]
        names = [n for n in self.program.weights if any(n in trip for trip in read)]
        stacked = [n for n in names if self.program.weights[n].index is not None]
        trips = tuple(self.trip(loop, t, live[t], read[t]) for t in range(loop.trips))
        return LoopPicture(
            loop.name,
            loop.period,
            tuple(_typed(placeholder) for placeholder in loop.places[: len(loop.carry)]),
            tuple(
                f"{place.name}, one for each trip" if isinstance(value, tuple) else _typed(place)
                for place, value in zip(loop.places[len(loop.carry) :], loop.inputs, strict=True)
            ),
            tuple(self.lines(list(loop.body.graph.nodes), f"{loop.name}.*.")),
            trips,
            self.sharing(loop, [n for n in stacked if n not in factors], read),
            self.residuals(loop),
            self.exits(loop),
            *self.stored(names),
            {c: sum(trip.state[c] for trip in trips) for c in self.contexts},
        )

    def trip(self, loop: Loop, trip: int, live: set[fx.Node], read: set[str]) -> TripPicture:
        """One trip."""
        place = Place(0, loop, trip)
        nodes = [n for n in loop.body.graph.nodes if n in live]
        mixings = [m for n in nodes if (m := self.mixing(n, place))]
        weights = [self.program.weights[name] for name in read]
        return TripPicture(
            trip,
            tuple(self.layers[n][trip] for n in nodes if n in self.layers),
            tuple(mixings),
            sum(w.meta.elements for w in weights if w.trainable),
            sum(w.meta.bytes for w in weights),
            {c: state_of(nodes, Place(c, loop, trip)) for c in self.contexts},
        )

    def mixing(self, node: fx.Node, place: Place) -> Mixing | None:
        """What an op does between tokens; None if it does nothing there."""
        if is_idle(node, place):
            return None
        if node.target in (RECURRENCE, BIDIRECTIONAL):
            rule = str(place.resolve(argument(node, "rule")))
            both = ", from both ends" if node.target is BIDIRECTIONAL else ""
            return Mixing(rule, f"{rule}, a recurrence{both}")
        if node.target is ATTENTION:
            cross = node not in self.layers
            return _attention(Visibility.of(node).map(place.resolve), cross)
        if node.target in _CONVOLUTIONS:
            return Mixing("convolution", "convolution over tokens")
        return None

    # ---- weights

    def sharing(
        self, loop: Loop, names: Iterable[str], read: Sequence[set[str]]
    ) -> tuple[Sharing, ...]:
        """The weights of a loop, by how its trips share them; the largest group comes first."""
        groups: dict[tuple[int | None, ...], list[str]] = {}
        for name in names:
            weight = self.program.weights[name]
            assert weight.index is not None
            numbers: dict[Hashable, int] = {}
            index: list[int | None] = []
            for trip, entry in enumerate(weight.index):
                if name in read[trip]:
                    identity = self.program.weights.identity(name, entry)
                    index.append(numbers.setdefault(identity, len(numbers)))
                else:
                    index.append(None)
            groups.setdefault(tuple(index), []).append(name)
        shared = [
            Sharing(
                tuple(_short(name, f"{loop.name}.*.") for name in group),
                index,
                sum(self.program.weights[name].meta.elements for name in group),
            )
            for index, group in groups.items()
        ]
        return tuple(sorted(shared, key=lambda s: (not s.is_shared, -s.parameters * s.entries)))

    def residuals(self, loop: Loop) -> tuple[Residual, ...]:
        """The ranks of the residuals of each weight; parts of one residual add up."""
        by_weight: dict[str, list[int]] = {}
        for each in low_rank_terms(loop.body.graph):
            name = _short(str(each.base.args[1].target), f"{loop.name}.*.")  # type: ignore[union-attr]
            old = by_weight.get(name, [0] * loop.trips)
            new = ranks(self.program, loop, each)
            by_weight[name] = [a + b for a, b in zip(old, new, strict=True)]
        return tuple(Residual(name, tuple(each)) for name, each in by_weight.items())

    def exits(self, loop: Loop) -> tuple[Exit, ...]:
        """The exits of a loop, closed ones too where the passes say where they stand."""
        exits = exits_of(loop)
        if exits is None:
            return ()
        try:
            at = exit_trips(self.program, exits)
        except RerollError:
            at = []
        values = exits.thresholds
        return tuple(Exit(t + 1, values[t] if is_open(values[t]) else None) for t in at)

    def stored(self, names: Iterable[str]) -> tuple[int, int]:
        """Parameters and bytes of weights that have not been counted yet."""
        table = self.program.weights
        parameters = size = 0
        for name in names:
            for entry in range(len(table[name].entries)):
                identity = table.identity(name, entry)
                if identity not in self.counted:
                    self.counted.add(identity)
                    parameters += table[name].meta.elements * table[name].trainable
                    size += table[name].meta.bytes
        return parameters, size

    # ---- ops

    def lines(self, nodes: Sequence[fx.Node], stem: str) -> Iterator[Line]:
        """The ops of a graph; those of a low-rank residual stand with the layer they belong to."""
        if not nodes:
            return
        residuals = low_rank_terms(nodes[0].graph)
        notes: dict[fx.Node, int] = {}
        for each in residuals:
            rank = self.program.weights[each.factors[0]].meta.shape[0]
            notes[each.base] = notes.get(each.base, 0) + rank
        names = _numbered(nodes[0].graph, residuals)
        hidden = {n for each in residuals for n in (each.down, each.up, each.add)}
        for node in nodes:
            if node.op == "call_function" and node not in hidden:
                note = f"+ residual of rank {notes[node]}" if node in notes else ""
                yield _line(node, stem, names, note)


def _numbered(graph: fx.Graph, residuals: Sequence[LowRankTerm]) -> dict[fx.Node, str]:
    """What the values of a graph are called: results by number, loops and inputs by name."""
    sums = {each.add: each.base for each in residuals}
    hidden = {n for each in residuals for n in (each.down, each.up)}
    names: dict[fx.Node, str] = {}
    count = 0
    for node in graph.nodes:
        if node.op == "placeholder":
            names[node] = node.name
        elif op_name(node.target) == LOOP:
            names[node] = str(node.args[0])
        elif node in sums:
            names[node] = names[sums[node]]
        elif node.op == "call_function" and node not in hidden:
            count += 1
            names[node] = f"%{count}"
    return names


def _line(node: fx.Node, stem: str, names: Mapping[fx.Node, str], note: str) -> Line:
    op = op_name(node.target) or str(node.target)
    weights = [n for n in node.all_input_nodes if is_weight(n)]

    def name(other: fx.Node) -> str:
        return names.get(other) or _short(node_name(other).removeprefix("@"), stem)

    def text(value: Any) -> str:
        return f"{value:.6g}" if isinstance(value, float) else value_to_text(value, name)

    operands = [text(v) for v in node.args if v not in weights]
    operands += [f"{k}={text(v)}" for k, v in node.kwargs.items()]
    type_ = type_of(node)
    library, _, rest = op.partition(".")
    return Line(
        names[node],
        rest.partition(".")[0] if library in ("aten", "reroll") else op,
        tuple(_short(str(n.target), stem) for n in weights),
        ", ".join(operands),
        "" if type_ is None else type_to_text(type_),
        node_to_text(node),
        op in MINOR,
        note,
    )


def _short(name: str, stem: str) -> str:
    """The name of a weight without what all names of its loop begin and end with."""
    if stem:
        # where a trip holds several layers, its weights are under the name of the trip
        name = name.removeprefix(stem).removeprefix(f"{stem.removesuffix('*.')}trips.*.")
    return name.removesuffix(".weight")


def _read(nodes: Iterable[fx.Node]) -> set[str]:
    return {str(n.target) for n in nodes if is_weight(n)}


def _typed(node: fx.Node) -> str:
    type_ = type_of(node)
    return f"{node.name} {type_to_text(type_)}" if type_ is not None else node.name


def _attention(visibility: Visibility, cross: bool) -> Mixing:
    """An attention in words."""
    if cross:
        return Mixing("cross", "attention to another sequence")
    window, prefix, chunk = visibility.window, visibility.prefix, visibility.chunk
    back = visibility.causal is True
    if isinstance(window, int):
        if not window:
            return Mixing("first", f"attention to the first {prefix} tokens")
        words = f"last {window:,} tokens" if back else f"{window:,} tokens to each side"
        first = f" and the first {prefix}" if isinstance(prefix, int) and prefix else ""
        return Mixing(f"window {window:,}", f"attention to the {words}{first}")
    if isinstance(chunk, int):
        return Mixing(f"chunk {chunk:,}", f"attention in chunks of {chunk:,}")
    return Mixing("all", f"attention to all tokens{' before' if back else ''}")
