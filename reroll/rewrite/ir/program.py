"""The Program: a captured model as graphs, a table of lazy weights, and its origin.

A Program holds `graph`, an `fx.Graph` over ATen and the ops of `reroll.rewrite.ir.ops`. For each
depth loop it holds a `Body`, the graph of one trip. `weights` maps each `get_attr` node's name to
the expression that computes its tensor. Nothing in it is code: text, JSON and files hold only op
names, constants and tensors.

The type of a node with a tensor value is in `node.meta["type"]`, a `TensorType`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import fx

from reroll.rewrite.ir import ops
from reroll.rewrite.ir.drafts import check_draft
from reroll.rewrite.ir.records import Body, Input, Origin
from reroll.rewrite.ir.text.printer import to_text
from reroll.rewrite.ir.weights import WeightTable
from reroll.rewrite.ir.weights.expressions import TensorSource


@dataclass(frozen=True)
class Loop:
    """Loop node of a Program's graph, with its arguments by name."""

    node: fx.Node
    body: Body

    @property
    def name(self) -> str:
        return str(self.node.args[0])

    @property
    def carry(self) -> tuple[Any, ...]:
        return tuple(self.node.args[1])  # type: ignore[arg-type]

    @property
    def inputs(self) -> tuple[Any, ...]:
        return tuple(self.node.args[2])  # type: ignore[arg-type]

    @property
    def trips(self) -> int:
        return int(self.node.args[3])  # type: ignore[arg-type]

    @property
    def period(self) -> int:
        return self.body.period

    @property
    def layers(self) -> int:
        """Number of layers of the original model that the loop runs."""
        return self.trips * self.period

    def input_for(self, position: int, trip: int) -> Any:
        """Return the value of the body's input at `position` (after the carry) in one trip."""
        value = self.inputs[position]
        return value[trip] if isinstance(value, tuple) else value

    @property
    def places(self) -> list[fx.Node]:
        """Placeholders of the body: those of the carry, then one for each of the inputs."""
        # lowering adds placeholders of its own after them
        places = self.body.graph.find_nodes(op="placeholder")
        return places[: len(self.carry) + len(self.inputs)]

    def resolve(self, value: Any, trip: int) -> Any:
        """Resolve an argument of a body's node in one trip, if it is an input of the loop.

        Other arguments, and carried values, are returned unchanged.
        """
        if not isinstance(value, fx.Node) or value.op != "placeholder":
            return value
        position = self.places.index(value) - len(self.carry)
        return value if position < 0 else self.input_for(position, trip)

    def change(
        self,
        *,
        carry: Sequence[Any] | None = None,
        inputs: Sequence[Any] | None = None,
        trips: int | None = None,
    ) -> None:
        """Set the loop's carry, inputs, or number of trips."""
        self.node.args = (
            self.name,
            self.carry if carry is None else tuple(carry),
            self.inputs if inputs is None else tuple(inputs),
            self.trips if trips is None else trips,
        )

    def add_input(self, name: str, value: Any) -> fx.Node:
        """Add an input to the loop; return its placeholder in the body."""
        with self.body.graph.inserting_after(self.places[-1]):
            placeholder = self.body.graph.placeholder(name)
        self.change(inputs=(*self.inputs, value))
        return placeholder

    def drop_unused_inputs(self) -> None:
        """Remove the inputs that the body does not use."""
        inputs = []
        for placeholder, value in zip(self.places[len(self.carry) :], self.inputs, strict=True):
            if placeholder.users:
                inputs.append(value)
            else:
                self.body.graph.erase_node(placeholder)
        self.change(inputs=inputs)


@dataclass(frozen=True)
class Program:
    """Model as a graph with rolled loops and lazy weights. Passes map one Program to another.

    `halves` are the half-precision dtypes that it can be converted to: see
    `reroll.rewrite.ir.dtypes`. `draft` is a rewriting of this Program that proposes tokens for it
    (see `with_draft`); passes drop it.
    """

    graph: fx.Graph
    bodies: Mapping[str, Body]
    weights: WeightTable
    source: TensorSource
    inputs: tuple[Input, ...]
    outputs: tuple[str, ...]
    dtype: torch.dtype
    origin: Origin
    # tied weights before they were tied, from which passes build low-rank residuals
    reference: WeightTable = field(default_factory=WeightTable)
    halves: tuple[torch.dtype, ...] = ()
    draft: Program | None = None

    @property
    def loops(self) -> tuple[Loop, ...]:
        """Depth loops in the order in which they run."""
        return tuple(
            Loop(node, self.bodies[str(node.args[0])])
            for node in self.graph.nodes
            if node.op == "call_function" and node.target is ops.loop
        )

    @property
    def has_past(self) -> bool:
        """Whether the graph continues from past tokens, because it was captured with a cache.

        Then padding masks cover more tokens than the input has.
        """
        lengths = {i.type.shape[-1] for i in self.inputs if i.role == "data" and i.type.shape}
        masks = [i.type.shape[-1] for i in self.inputs if i.role == "padding"]
        return not masks or any(length not in lengths for length in masks)

    def graphs(self) -> Iterator[tuple[str, fx.Graph]]:
        """Yield the main graph, named "main", and each loop's body under the loop's name."""
        yield "main", self.graph
        for name, body in self.bodies.items():
            yield name, body.graph

    def parameters(self) -> int:
        """Count the stored trainable scalars; a shared weight counts once."""
        return self.weights.parameters()

    def edit(self) -> Program:
        """Copy the Program's graphs, so that they may be edited without changing this Program."""
        bodies = {name: replace(body, graph=copy(body.graph)) for name, body in self.bodies.items()}
        return replace(self, graph=copy(self.graph), bodies=bodies)

    def with_weights(self, weights: WeightTable) -> Program:
        """Replace the weight table."""
        return replace(self, weights=weights)

    def pruned(self) -> Program:
        """Drop the weights that no graph reads."""
        used = {name for _, graph in self.graphs() for name in weight_nodes(graph)}
        weights, reference = (
            table.without(*(name for name in table if name not in used))
            for table in (self.weights, self.reference)
        )
        return replace(self, weights=weights, reference=reference)

    def to_module(self, **options: Any) -> Any:
        """Lower to a `transformers.PreTrainedModel`: see `reroll.runtime.lowering.lower`."""
        # the runtime imports this package, so only imports of these methods go the other way
        from reroll.runtime.lowering.lower import lower

        return lower(self, **options)

    def save(self, directory: str, **options: Any) -> None:
        """Write a Hugging Face directory: see `reroll.export.huggingface`."""
        from reroll.export.huggingface import save

        save(self, directory, **options)

    def twin(self, passes: Any, **options: Any) -> Program:
        """Rewrite the Program into one that reads the same weights: see `reroll.run_passes`.

        Nothing is measured unless `options` say so. The twin can draft: `reroll.generate` takes it,
        `reroll.twin(model, twin)` lowers it so that it shares the weights of a lowered model, and
        `with_draft` saves it with the Program.
        """
        from reroll._api import run_passes

        return run_passes(self, passes, **{"measure": "off", **options})

    def with_draft(self, draft: Program | None) -> Program:
        """Return the Program with a draft, which is saved and exported with it; None for without.

        Raises UsageError if `draft` is no rewriting of this Program, or gives no logits.
        """
        if draft is not None:
            check_draft(self, draft)
            draft = replace(draft, draft=None)
        return replace(self, draft=draft)

    def __str__(self) -> str:
        return to_text(self)


def copy(graph: fx.Graph) -> fx.Graph:
    """Copy a graph with its node names and metadata."""
    new = fx.Graph()
    # with return_output_node, graph_copy returns the new output's value and the old output node
    output: Any = new.graph_copy(graph, {}, return_output_node=True)
    value, old = output
    new.output(value).meta.update(old.meta)
    return new


def drop_unused(graph: fx.Graph) -> None:
    """Erase the nodes that no output needs, in place; inputs stay. No node has a side effect."""
    graph.eliminate_dead_code(is_impure_node=lambda node: node.op in ("placeholder", "output"))


def ancestors(roots: Iterable[fx.Node], stop: Collection[fx.Node] = ()) -> set[fx.Node]:
    """Return nodes and all that they depend on, up to and including nodes in `stop`."""
    reached: set[fx.Node] = set()
    stack = list(roots)
    while stack:
        node = stack.pop()
        if node not in reached:
            reached.add(node)
            stack += [] if node in stop else node.all_input_nodes
    return reached


def weight_nodes(graph: fx.Graph) -> dict[str, list[fx.Node]]:
    """Return the `get_attr` nodes of a graph, by the name of the weight that they read."""
    nodes: dict[str, list[fx.Node]] = {}
    for node in graph.nodes:
        if node.op == "get_attr":
            nodes.setdefault(str(node.target), []).append(node)
    return nodes
