"""The layers of a Program by what they add to a residual stream, in the order in which they run.

A sublayer reads the stream and adds to it: an attention, a recurrence, a convolution or a
feed-forward part. A layer begins with a sublayer that mixes tokens, and has those behind it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import fx

from reroll.rewrite.analysis.layers import is_self_attention
from reroll.rewrite.analysis.residual import Stream, Tracer
from reroll.rewrite.ir.hidden import stand_in
from reroll.rewrite.ir.ops import ATTENTION, CACHE, is_stateful
from reroll.rewrite.ir.patterns import Miss
from reroll.rewrite.ir.program import Loop, Program, ancestors

aten = torch.ops.aten


@dataclass(frozen=True)
class Sublayer:
    """What one part of a layer adds.

    Attributes:
        value: what is added.
        sum: the addition, a value of the stream.
        mixes: whether it mixes tokens and begins a layer; cross-attention does not begin one.
        attends: whether it has an attention or a state.
        reads: the values of the stream that it is computed from.
    """

    value: fx.Node
    sum: fx.Node
    mixes: bool
    attends: bool
    reads: frozenset[fx.Node]


@dataclass(frozen=True)
class Layer:
    """Layer of a Program: its sublayers, and the trip of the loop whose body has them.

    `place` is its number among the layers of its graph. Without sublayers, the loop's layers add
    nothing to a stream (they normalize it), and `place` counts the layers of a trip.
    """

    sublayers: tuple[Sublayer, ...]
    loop: Loop | None
    trip: int
    place: int


def find_layers(program: Program) -> list[Layer]:
    """Find the layers of a Program, as `attention_layers` counts them where all have attention.

    None are found in a graph whose attentions are written out in other operations: their scores are
    sums like those of a stream.
    """
    grouped = {
        graph: _grouped(found)
        for graph, found in _sublayers(program).items()
        if not _writes_out_attention(graph)
    }
    main = grouped.get(program.graph, [])
    begins = {group[0].sum: place for place, group in enumerate(main)}
    loops = {loop.node: loop for loop in program.loops}
    layers: list[Layer] = []
    for node in program.graph.nodes:
        if node in begins:
            layers.append(Layer(main[begins[node]], None, 0, begins[node]))
        elif node in loops:
            loop = loops[node]
            groups = grouped.get(loop.body.graph, [()] * loop.period)
            layers += [
                Layer(group, loop, trip, place)
                for trip in range(loop.trips)
                for place, group in enumerate(groups)
            ]
    return layers


def _writes_out_attention(graph: fx.Graph) -> bool:
    return bool(graph.find_nodes(op="call_function", target=CACHE)) and not graph.find_nodes(
        op="call_function", target=ATTENTION
    )


def leave_out(sublayer: Sublayer) -> None:
    """Remove a sublayer from its graph, in place: the stream goes on without what it adds.

    Nodes that nothing uses any more stay; `drop_unused` erases them.
    """
    node = sublayer.value
    while True:
        (user,) = node.users
        if user.target is aten.add.Tensor:
            (other,) = [each for each in user.args[:2] if each is not node]
            stand_in(user, other)  # type: ignore[arg-type]
            user.graph.erase_node(user)
            return
        node = user


def _sublayers(program: Program) -> dict[fx.Graph, list[Sublayer]]:
    """Find the sublayers of each graph, in the order of their additions."""
    tracer = Tracer(program)
    starts = [loop.places[0] for loop in program.loops]
    starts += program.graph.find_nodes(op="call_function", target=aten.add.Tensor)
    seen: set[fx.Node] = set()
    found: dict[fx.Graph, list[Sublayer]] = {}
    for start in starts:
        if start in seen:
            continue
        stream = tracer.trace(start)
        seen.add(start)
        if isinstance(stream, Miss):
            continue
        seen |= stream.nodes.keys()
        writing = list(_writing(stream))
        # a sum without any is inside a feed-forward part
        for each in writing if any(sublayer.mixes for sublayer in writing) else ():
            found.setdefault(each.sum.graph, []).append(each)
    for group in found.values():
        group.sort(key=lambda sublayer: sublayer.sum)
    return found


def _writing(stream: Stream) -> Iterator[Sublayer]:
    """Yield the sublayers that write to a stream."""
    for writer in stream.writers:
        others = stream.nodes.keys() - {writer}
        needed = ancestors([writer], stop=others)
        reads = needed & others
        total = _added(writer, stream)
        if not reads or total is None:
            continue
        inner = _between(needed, reads)
        stateful = any(map(is_stateful, inner))
        attends = stateful or any(node.target is ATTENTION for node in inner)
        # cross-attention reads what comes from another stream or from an encoder
        mixes = stateful or any(map(is_self_attention, inner))
        yield Sublayer(writer, total, mixes, attends, frozenset(reads))


def _between(needed: set[fx.Node], reads: set[fx.Node]) -> list[fx.Node]:
    """Return the nodes of `needed` that are computed from those of `reads`."""
    found: dict[fx.Node, None] = {}
    stack = list(reads)
    while stack:
        for user in stack.pop().users:
            if user in needed and user not in reads and user not in found:
                found[user] = None
                stack.append(user)
    return list(found)


def _added(writer: fx.Node, stream: Stream) -> fx.Node | None:
    """Return the addition of a writer to the stream; None where it is used in another way."""
    node = writer
    while node in stream.nodes and len(node.users) == 1:
        (user,) = node.users
        if user.target is aten.add.Tensor:
            apart = user.args[0] is not user.args[1]
            return user if apart and user in stream.nodes else None
        node = user
    return None


def _grouped(sublayers: list[Sublayer]) -> list[tuple[Sublayer, ...]]:
    """Group the sublayers of a graph into layers."""
    groups: list[list[Sublayer]] = []
    for number, each in enumerate(sublayers):
        behind = sublayers[number + 1 : number + 2]
        # side by side with the attention that follows it
        beside = [other for other in behind if other.mixes and other.reads == each.reads]
        last = groups[-1] if groups else []
        open_ = not any(s.mixes for s in last) and any(s.reads == each.reads for s in last)
        if not groups or beside or (each.mixes and not open_):
            groups.append([])
        groups[-1].append(each)
    return [tuple(group) for group in groups]
