"""The Program: a captured model as graphs, a table of lazy weights, and where it came from.

A Program holds `graph`, an `fx.Graph` over ATen and the ops of `reroll.rewrite.ir.ops`; for each
depth loop a `Body`, the graph of one trip; and `weights`, which says what tensor stands behind each
`get_attr` node. Nothing in it runs code of its own: text, JSON and files hold only op names,
constants and tensors.

Node types are in `node.meta["type"]`, a `TensorType`, wherever the node makes a tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import fx

from reroll.errors import ProgramError
from reroll.rewrite.ir import ops
from reroll.rewrite.ir.weights import WeightTable
from reroll.rewrite.ir.weights.expressions import TensorSource

Dim = int | str
Loss = Literal["shifted", "aligned"]

# how the remark begins that a Program has lost the state of its original
NO_CACHE = "captured without a cache"


@dataclass(frozen=True)
class TensorType:
    """The dtype and shape of a tensor in a graph; a dimension known only at run time is a name."""

    dtype: torch.dtype
    shape: tuple[Dim, ...]


@dataclass(frozen=True)
class Input:
    """One input of a Program.

    `role` says what stands in its place when a caller leaves the input out: "data" (nothing: it is
    required), "padding" (ones over past and present tokens), "positions" (counted from the past;
    where they begin anew, so does a document), "offsets" (counted from the past, and nothing else
    depends on them), "pictures" (nothing: the text is read without), or "zeros". Where the model
    computes something else from the inputs before it, `default` is the graph of that: its
    placeholders are inputs by name, and it returns one value.
    """

    name: str
    type: TensorType
    role: str = "data"
    # graphs have no equality of their own: `text.compare` compares them
    default: fx.Graph | None = field(default=None, compare=False)

    @property
    def counts(self) -> bool:
        """Whether it numbers the tokens from the first on."""
        return self.role in ("positions", "offsets")


@dataclass(frozen=True)
class Step:
    """A pass that has run: its text, how long it took, and what it remarked and measured."""

    text: str
    seconds: float
    remarks: tuple[str, ...] = ()
    measured: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Origin:
    """What a Program was made from, and the passes that it has been through.

    `config` is the original model's configuration as JSON data; `files` are the side files
    (see `reroll.rewrite.capture.side_files`) that are saved again, name to path;
    `auto_class` names the transformers auto class that loads the saved model; `remarks` say what of
    the original the capture left out. `rereads_at` is the length at which the original's generation
    drops its cache and reads the text anew, because its rotary frequencies change there. `loss` is
    what a language model computes from labels: the cross entropy of each position with the next
    label ("shifted") or with its own ("aligned"); None if it is another, or none. `cache_span` is
    the number of tokens beyond which the original computes something else with its cache than
    without: 0 if it always does, None if it never does. `adds_tokens`: the original's generation
    reads tokens beside those that it is given. `wraps_labels`: given labels alone, its decoder
    begins with the last of them.
    """

    model: str
    revision: str | None = None
    architecture: str = ""
    auto_class: str = "AutoModel"
    config: Mapping[str, Any] = field(default_factory=dict)
    files: Mapping[str, str] = field(default_factory=dict)
    steps: tuple[Step, ...] = ()
    remarks: tuple[str, ...] = ()
    rereads_at: int | None = None
    loss: Loss | None = "shifted"
    cache_span: int | None = None
    adds_tokens: bool = False
    wraps_labels: bool = False

    @property
    def paths(self) -> tuple[str, ...]:
        """Where the original and the side files lie; the original may be a hub id."""
        folders = [path.removesuffix(name) for name, path in self.files.items()]
        return tuple(dict.fromkeys([self.model, *folders]))

    @property
    def positions(self) -> int | None:
        """How many tokens the configuration allows; None if it does not say."""
        nested = self.config.get("text_config")
        for config in (self.config, nested if isinstance(nested, Mapping) else {}):
            for name in ("max_position_embeddings", "n_positions"):
                if isinstance(found := config.get(name), int) and found > 0:
                    return found
        return None


@dataclass(frozen=True)
class Body:
    """One trip of a depth loop.

    The first placeholders of `graph` are the carry, in the order in which its output returns them;
    the others take the loop's inputs. `period` is how many of the original layers one trip runs.
    """

    graph: fx.Graph
    period: int = 1


@dataclass(frozen=True)
class Loop:
    """A loop node of a Program's graph, with its arguments by name."""

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
        """How many layers of the original model the loop runs."""
        return self.trips * self.period

    def input_for(self, position: int, trip: int) -> Any:
        """What the body's input at `position` (after the carry) is in one trip."""
        value = self.inputs[position]
        return value[trip] if isinstance(value, tuple) else value

    @property
    def places(self) -> list[fx.Node]:
        """The placeholders of the body: those of the carry, then one for each of the inputs."""
        # lowering puts inputs of its own behind them
        places = self.body.graph.find_nodes(op="placeholder")
        return places[: len(self.carry) + len(self.inputs)]

    def resolve(self, value: Any, trip: int) -> Any:
        """What an argument of a body's node is in one trip, if the loop's inputs say it."""
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
        """Give the loop another carry, other inputs, or another number of trips."""
        self.node.args = (
            self.name,
            self.carry if carry is None else tuple(carry),
            self.inputs if inputs is None else tuple(inputs),
            self.trips if trips is None else trips,
        )

    def add_input(self, name: str, value: Any) -> fx.Node:
        """Give the loop one more input; returns its placeholder in the body."""
        with self.body.graph.inserting_after(self.places[-1]):
            place = self.body.graph.placeholder(name)
        self.change(inputs=(*self.inputs, value))
        return place

    def drop_unused_inputs(self) -> None:
        """Remove the inputs that the body does not use."""
        inputs = []
        for place, value in zip(self.places[len(self.carry) :], self.inputs, strict=True):
            if place.users:
                inputs.append(value)
            else:
                self.body.graph.erase_node(place)
        self.change(inputs=inputs)


@dataclass(frozen=True)
class Program:
    """A model as a graph with rolled loops and lazy weights. Passes map one Program to another.

    `halves` are the half precisions that it can be brought to: see `reroll.rewrite.ir.dtypes`.
    """

    graph: fx.Graph
    bodies: Mapping[str, Body]
    weights: WeightTable
    source: TensorSource
    inputs: tuple[Input, ...]
    outputs: tuple[str, ...]
    dtype: torch.dtype
    origin: Origin
    # tied weights as they were before they were tied, for passes that build residuals from them
    reference: WeightTable = field(default_factory=WeightTable)
    halves: tuple[torch.dtype, ...] = ()

    @property
    def loops(self) -> tuple[Loop, ...]:
        """The depth loops in the order in which they run."""
        return tuple(
            Loop(node, self.bodies[str(node.args[0])])
            for node in self.graph.nodes
            if node.op == "call_function" and node.target is ops.loop
        )

    @property
    def has_past(self) -> bool:
        """Whether the graph goes on from tokens before its input: it was captured with a cache.

        Then padding masks are over more tokens than the input has.
        """
        lengths = {i.type.shape[-1] for i in self.inputs if i.role == "data" and i.type.shape}
        masks = [i.type.shape[-1] for i in self.inputs if i.role == "padding"]
        return not masks or any(length not in lengths for length in masks)

    def graphs(self) -> Iterator[tuple[str, fx.Graph]]:
        """The main graph, under the name "main", and each loop's body under the loop's name."""
        yield "main", self.graph
        for name, body in self.bodies.items():
            yield name, body.graph

    def parameters(self) -> int:
        """Number of stored trainable scalars; a shared weight counts once."""
        return self.weights.parameters()

    def edit(self) -> Program:
        """A copy whose graphs may be changed in place without changing this Program."""
        bodies = {name: replace(body, graph=copy(body.graph)) for name, body in self.bodies.items()}
        return replace(self, graph=copy(self.graph), bodies=bodies)

    def with_weights(self, weights: WeightTable) -> Program:
        """The same graphs over another weight table."""
        return replace(self, weights=weights)

    def pruned(self) -> Program:
        """The Program without the weights that no graph reads."""
        used = {name for _, graph in self.graphs() for name in weight_nodes(graph)}
        weights, reference = (
            table.without(*(name for name in table if name not in used))
            for table in (self.weights, self.reference)
        )
        return replace(self, weights=weights, reference=reference)

    def to_module(self, **options: Any) -> Any:
        """Lower to a `transformers.PreTrainedModel`: see `reroll.runtime.lowering.lower`."""
        return _service("to_module")(self, **options)

    def save(self, directory: str, **options: Any) -> None:
        """Write a Hugging Face directory: see `reroll.export.huggingface`."""
        _service("save")(self, directory, **options)

    def __str__(self) -> str:
        from reroll.rewrite.ir.text.printer import to_text

        return to_text(self)


def copy(graph: fx.Graph) -> fx.Graph:
    """A copy of a graph with the same node names and metadata."""
    new = fx.Graph()
    # with return_output_node, a graph gives its new output's value and its old output
    output: Any = new.graph_copy(graph, {}, return_output_node=True)
    value, old = output
    new.output(value).meta.update(old.meta)
    return new


def ancestors(roots: Iterable[fx.Node], stop: Collection[fx.Node] = ()) -> set[fx.Node]:
    """Nodes and all that they depend on, down to those of `stop`, which are included."""
    found: set[fx.Node] = set()
    stack = list(roots)
    while stack:
        node = stack.pop()
        if node not in found:
            found.add(node)
            stack += [] if node in stop else node.all_input_nodes
    return found


def weight_nodes(graph: fx.Graph) -> dict[str, list[fx.Node]]:
    """The `get_attr` nodes of a graph, by the name of the weight that they read."""
    nodes: dict[str, list[fx.Node]] = {}
    for node in graph.nodes:
        if node.op == "get_attr":
            nodes.setdefault(str(node.target), []).append(node)
    return nodes


# the packages above `rewrite` say here how a Program is lowered and saved, so that imports run one
# way
_services: dict[str, Callable[..., Any]] = {}


def provide(name: str, function: Callable[..., Any]) -> None:
    """Register what `Program.to_module` or `Program.save` calls."""
    _services[name] = function


def _service(name: str) -> Callable[..., Any]:
    if name not in _services:
        raise ProgramError(f"Program.{name} is not available", hint="import reroll first")
    return _services[name]
