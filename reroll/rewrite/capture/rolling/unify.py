"""Unify regions into the trips of a loop: what is shared, what differs, what is carried."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from reroll.rewrite.ir.hidden import STATES, WEIGHTS, mark, marks, unmark
from reroll.rewrite.ir.patterns import Miss

aten = torch.ops.aten


@dataclass
class Region:
    """Nodes of one trip, in the order in which they run."""

    nodes: list[fx.Node]
    indices: dict[fx.Node, int] = field(init=False)

    def __post_init__(self) -> None:
        self.indices = {node: index for index, node in enumerate(self.nodes)}


# classes of arguments of the body; constants stand for themselves
@dataclass(frozen=True)
class Inner:
    """Value of the same trip, by the index of its node in the region."""

    index: int


@dataclass(frozen=True)
class Carried:
    """Value of the previous trip; `position` is its index among the carried values."""

    position: int


@dataclass(frozen=True)
class LoopInput:
    """Input of the loop; `position` is its index among the inputs."""

    position: int


@dataclass(frozen=True)
class Stacked:
    """Weight per trip, named after the first trip's."""

    name: str


@dataclass(frozen=True)
class Computed:
    """Value that each trip computes itself, by an op that does not depend on the data."""

    like: fx.Node
    args: Any
    kwargs: Any


class Differ(Exception):
    """Raised where two trips differ; `miss` is the reason."""

    def __init__(self, reason: str, *nodes: str) -> None:
        super().__init__(reason)
        self.miss = Miss(reason, nodes)


def unify(regions: list[Region], outside: dict[str, list[fx.Node]]) -> Unifier | Miss:
    """Unify regions into the trips of one loop, or return a Miss with the reason why not.

    `outside` maps names to the graph's weight nodes.
    """
    try:
        return Unifier(regions, outside)
    except Differ as differ:
        return differ.miss


class Unifier:
    """Loop made of unified regions; construction raises Differ.

    `carry` are the indices of the nodes whose values go to the next trip, and `initial` their
    values before the first. `inputs` are the inputs of the loop node. `stacks` maps the first
    trip's name of a weight to its names in all trips.
    """

    def __init__(self, regions: list[Region], outside: dict[str, list[fx.Node]]) -> None:
        self.regions = regions
        self.trips = len(regions)
        self.carry: list[int] = []
        self.initial: list[fx.Node] = []
        self.inputs: list[Any] = []
        self.stacks: dict[str, tuple[str, ...]] = {}
        self._owner = {node: t for t, region in enumerate(regions) for node in region.nodes}
        self._memo: dict[Any, Any] = {}
        self._weights = outside
        self.body = [self._unify_at(index) for index in range(len(regions[0].nodes))]
        self._check_uses()
        self._check_order()
        if not self.stacks:
            raise Differ("no weight is stacked over the trips", regions[0].nodes[0].name)

    def _unify_at(self, index: int) -> tuple[Any, Any]:
        nodes = [region.nodes[index] for region in self.regions]
        is_reroll_op = "reroll" in str(nodes[0].target)
        args = self._zip([n.args for n in nodes], nodes, is_reroll_op)
        keywords = sorted({k for n in nodes for k in n.kwargs})
        kwargs = {
            k: self._zip([n.kwargs.get(k) for n in nodes], nodes, is_reroll_op) for k in keywords
        }
        return args, kwargs

    def _zip(self, values: list[Any], nodes: list[fx.Node], is_reroll_op: bool) -> Any:
        """Unify one argument over all trips."""
        first = values[0]
        if isinstance(first, (list, tuple)) and all(isinstance(v, (list, tuple)) for v in values):
            if len({len(v) for v in values}) != 1:
                raise Differ("argument lists differ in length", *(n.name for n in nodes[:2]))
            return [
                self._zip(list(part), nodes, is_reroll_op) for part in zip(*values, strict=True)
            ]
        if any(isinstance(v, fx.Node) for v in values):
            return self._value(values, nodes)
        if all(type(v) is type(first) and v == first for v in values):
            return first
        if is_reroll_op or all(isinstance(v, float) for v in values):
            return self._loop_input(tuple(values))
        raise Differ(f"a constant differs: {first!r} and others", *(n.name for n in nodes[:2]))

    def _value(self, values: list[Any], nodes: list[fx.Node]) -> Any:
        key = tuple(values)
        if key not in self._memo:
            self._memo[key] = self._classify(values, nodes)
        return self._memo[key]

    def _classify(self, values: list[Any], nodes: list[fx.Node]) -> Any:
        owners = [self._owner.get(v) for v in values]
        if owners == list(range(self.trips)):
            indices = {self.regions[t].indices[v] for t, v in enumerate(values)}
            if len(indices) == 1:
                return Inner(indices.pop())
            raise Differ("a value comes from different places", *(n.name for n in nodes[:2]))
        if owners[1:] == list(range(self.trips - 1)) and owners[0] is None:
            indices = {self.regions[t].indices[v] for t, v in enumerate(values[1:])}
            if len(indices) == 1:
                return self._carried(indices.pop(), values[0], nodes[0])
        if any(owner is not None for owner in owners):
            raise Differ(
                "a value is not of the same or of the previous trip throughout",
                *(n.name for n in nodes[:2]),
            )
        return self._outside(values, nodes)

    def _carried(self, index: int, initial: Any, node: fx.Node) -> Carried:
        for position, known in enumerate(self.carry):
            if known == index and self.initial[position] is initial:
                return Carried(position)
        if index in self.carry:
            raise Differ("a carried value starts in two ways", node.name)
        self.carry.append(index)
        self.initial.append(initial)
        return Carried(len(self.carry) - 1)

    def _outside(self, values: list[Any], nodes: list[fx.Node]) -> Any:
        if all(v is values[0] for v in values):
            return self._same(values[0])
        if all(isinstance(v, fx.Node) and v.op == "get_attr" for v in values):
            return self._stacked(tuple(str(v.target) for v in values))
        distinct = len(set(values))
        if distinct == self.trips and self._alike(values):
            like = values[0]
            args = self._zip([v.args for v in values], values, False)
            kwargs = {
                k: self._zip([v.kwargs[k] for v in values], values, False) for k in like.kwargs
            }
            return Computed(like, args, kwargs)
        return self._loop_input(tuple(values))

    def _alike(self, values: list[Any]) -> bool:
        """Whether values are results of the same op with equal constants, one in each trip."""
        first = values[0]
        return all(
            isinstance(v, fx.Node)
            and v.op == "call_function"
            and v.target is first.target
            and len(v.args) == len(first.args)
            and v.kwargs.keys() == first.kwargs.keys()
            and not _has_constants_unlike(v, first)
            for v in values
        )

    def _same(self, value: Any) -> Any:
        """Classify a value that is the same in every trip: a shared weight, or an invariant."""
        if isinstance(value, fx.Node) and value.op == "get_attr" and self._only_inside(value):
            return self._stacked((str(value.target),) * self.trips)
        return self._loop_input(value)

    def _only_inside(self, weight: fx.Node) -> bool:
        nodes = self._weights[str(weight.target)]
        return all(user in self._owner for node in nodes for user in node.users)

    def _stacked(self, names: tuple[str, ...]) -> Stacked:
        for first, known in self.stacks.items():
            if known == names:
                return Stacked(first)
        if names[0] in self.stacks:
            raise Differ("a weight is stacked in two ways", names[0])
        self.stacks[names[0]] = names
        return Stacked(names[0])

    def _loop_input(self, value: Any) -> LoopInput:
        for position, known in enumerate(self.inputs):
            if _identical(known, value):
                return LoopInput(position)
        self.inputs.append(value)
        return LoopInput(len(self.inputs) - 1)

    def _check_uses(self) -> None:
        """Check that nodes after the loop use only values that the last trip carries out."""
        for t, region in enumerate(self.regions):
            for node in region.nodes:
                outer = [u for u in node.users if u not in self._owner]
                if outer and (t != self.trips - 1 or region.indices[node] not in self.carry):
                    raise Differ("a value inside a trip is used after the loop", node.name)

    def _check_order(self) -> None:
        """Check that the loop's inputs do not depend on nodes inside the loop."""
        inside = set(self._owner)
        known: set[fx.Node] = set()
        queue = [v for v in _leaves((self.initial, self.inputs)) if isinstance(v, fx.Node)]
        while queue:
            node = queue.pop()
            if node in known:
                continue
            known.add(node)
            if node in inside:
                raise Differ("an input of the loop depends on the loop", node.name)
            queue += node.all_input_nodes

    def build(self, renamed: dict[str, str]) -> fx.Graph:
        """Build the body: the first trip's nodes over placeholders, with weights renamed."""
        graph = fx.Graph()
        first = self.regions[0]
        carried = []
        for position, index in enumerate(self.carry):
            carried.append(graph.placeholder("h" if len(self.carry) == 1 else f"h{position}"))
            carried[-1].meta.update(_typed(first.nodes[index]))
        inputs = []
        for value in self.inputs:
            example = next((v for v in _leaves(value) if isinstance(v, fx.Node)), None)
            inputs.append(graph.placeholder(example.name if example is not None else "constant"))
            if example is not None:
                inputs[-1].meta.update(_typed(example))
        values: list[fx.Node] = []
        weights: dict[str, fx.Node] = {}
        computed: dict[int, fx.Node] = {}

        def resolve(value: Any) -> Any:
            if isinstance(value, Inner):
                return values[value.index]
            if isinstance(value, Carried):
                return carried[value.position]
            if isinstance(value, LoopInput):
                return inputs[value.position]
            if isinstance(value, Stacked):
                if value.name not in weights:
                    weights[value.name] = graph.get_attr(renamed[value.name])
                    weights[value.name].meta.update(_typed(self._weights[value.name][0]))
                return weights[value.name]
            if isinstance(value, Computed):
                if id(value) not in computed:
                    computed[id(value)] = make(value.like, value.args, value.kwargs)
                return computed[id(value)]
            if isinstance(value, list):
                return [resolve(v) for v in value]
            return value

        def make(like: fx.Node, args: Any, kwargs: Any) -> fx.Node:
            node = graph.call_function(
                like.target,  # type: ignore[arg-type]
                tuple(resolve(a) for a in args),
                {k: resolve(v) for k, v in kwargs.items()},
            )
            node.meta.update(_typed(like))
            return node

        for node, (args, kwargs) in zip(first.nodes, self.body, strict=True):
            values.append(make(node, args, kwargs))
        graph.output(tuple(values[index] for index in self.carry))
        self._built = values
        return graph

    def mark(self, body: fx.Graph) -> tuple[str, ...]:
        """Mark the trips' hidden states and weights in the built body.

        Returns the names of the marks in which the trips differ, which are then incomplete. If all
        trips but the last have a mark on a carried value, it belongs to the input of the next trip.
        Then the placeholder in the body is marked instead of the value before the first trip.
        """
        places = body.find_nodes(op="placeholder")
        carried: list[tuple[int, tuple[str, ...]]] = []
        for index, node in enumerate(self._built):
            weights = {marks(region.nodes[index], WEIGHTS) for region in self.regions}
            if len(weights) > 1:
                return WEIGHTS
            mark(node, *weights)
        for index, node in enumerate(self._built):
            marks_of = [marks(region.nodes[index], STATES) for region in self.regions]
            if not any(marks_of):
                continue
            if len(set(marks_of)) == 1:
                mark(node, marks_of[0])
                continue
            position = self.carry.index(index) if index in self.carry else None
            if position is None or marks_of[-1] or len({*marks_of[:-1]}) != 1:
                return STATES
            if marks(self.initial[position])[-len(marks_of[0]) :] != marks_of[0]:
                return STATES
            carried.append((position, marks_of[0]))
        for position, names in carried:
            start = unmark(self.initial[position])
            mark(self.initial[position], start[: -len(names)])
            mark(places[position], names)
        return ()


def _has_constants_unlike(a: fx.Node, b: fx.Node) -> bool:
    constants = [str(fx.node.map_arg((n.args, n.kwargs), lambda _: ".")) for n in (a, b)]
    return constants[0] != constants[1]


def _typed(node: fx.Node) -> dict[str, Any]:
    return {"type": node.meta["type"]} if "type" in node.meta else {}


def _identical(a: Any, b: Any) -> bool:
    if isinstance(a, tuple) and isinstance(b, tuple):
        return len(a) == len(b) and all(map(_identical, a, b))
    if isinstance(a, fx.Node) or isinstance(b, fx.Node):
        return a is b
    return type(a) is type(b) and bool(a == b)


def _leaves(value: Any) -> list[Any]:
    if isinstance(value, (list, tuple)):
        return [leaf for v in value for leaf in _leaves(v)]
    return [value]
