"""Assemble a lowered Program: its modules, and one function for each of its graphs."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from functools import cache, cached_property
from typing import Any

from torch import fx, nn

from reroll.errors import UsageError
from reroll.rewrite.analysis.state_plan import CacheLayer
from reroll.rewrite.capture.pictures import picture_inputs, text_part
from reroll.rewrite.ir.defaults import looks_into, reads
from reroll.rewrite.ir.program import Program
from reroll.runtime.functions.hidden import with_weights
from reroll.runtime.functions.loops import Trips
from reroll.runtime.lowering.codegen import compile_graph, runnable
from reroll.runtime.lowering.encoder_decoder import cut, has_decoder
from reroll.runtime.lowering.heads import backbone_part
from reroll.runtime.lowering.modules import Tree, TripModule, build_tree
from reroll.runtime.lowering.passes import PASSES, Interface, Lowering, Observer, lower_graphs
from reroll.runtime.models.pictures import put_pictures, with_pictures


@dataclass
class EncoderDecoder:
    """Functions of the graphs of an encoder-decoder model: see `cut`.

    `backbone` takes what `decode` does and returns the last hidden state; only a model with a head
    has one. `graph` is the code of `decode` before it is compiled.
    """

    encode: Callable[..., tuple[Any, ...]]
    extend: Callable[..., tuple[Any, ...]]
    decode: Callable[..., tuple[Any, ...]]
    graph: fx.Graph

    @cached_property
    def backbone(self) -> Callable[..., tuple[Any, ...]]:
        return compile_graph(backbone_part(self.graph), "decoder backbone")[0]


@dataclass(frozen=True)
class Default:
    """Default of an input that is left out: a function of the module and of other inputs.

    Of the inputs in `reads`, only those in `looks_into` need values; the others need sizes only.
    """

    function: Callable[..., tuple[Any, ...]]
    reads: tuple[str, ...]
    looks_into: frozenset[str]


@dataclass
class Assembly:
    """A Program in a form that runs. Copies share it; pickles have it assembled again.

    `main` takes the module, the Program's inputs in order and a `ForwardState`, and returns the
    outputs. `layers` are the layouts of its states. `sources` is the generated code by graph.
    `defaults` compute inputs that are left out and do not follow from sizes alone.
    `encoder_decoder` has the functions of a model with an encoder. `backbone` takes what `main`
    does and returns the last hidden state; only a model with a head has one. `graph` is the code
    of `main` before it is compiled.
    """

    program: Program
    graph: fx.Graph
    main: Callable[..., tuple[Any, ...]]
    loops: dict[str, Trips]
    tree: Tree
    layers: tuple[CacheLayer, ...]
    interface: Interface
    sources: dict[str, str]
    defaults: dict[str, Default]
    encoder_decoder: EncoderDecoder | None = None

    @cached_property
    def backbone(self) -> Callable[..., tuple[Any, ...]]:
        # few callers want it, and it is as long as `main`
        part, outputs = backbone_part(self.graph), ("last_hidden_state",)
        return _compiled(part, "backbone", self.program, outputs, self.sources)

    def __reduce__(self) -> tuple[Any, ...]:
        return reassemble, (self.program, self.loops, self.tree)

    def __deepcopy__(self, memo: dict[int, Any]) -> Assembly:
        loops, tree = copy.deepcopy((self.loops, self.tree), memo)
        return replace(self, loops=loops, tree=tree)


def assemble(model: nn.Module, program: Program, observe: Observer | None = None) -> Assembly:
    """Build a Program's modules under `model` and generate its code; its weights have no data yet.

    `observe` is called after every pass of the lowering (see `reroll.runtime.lowering.passes`).
    """
    tree = build_tree(model, program)
    lowering = lower_graphs(program, tree, observe)
    original, program, plan = program, lowering.program, lowering.plan
    loops, sources = {}, {}
    for loop in program.loops:
        name = loop.name
        weighs = lowering.weighed[name] is not None
        trip_type = _trip_type(name, lowering.graphs[name], weighs)
        for trip in tree.trips[name]:
            trip.__class__ = trip_type
        sources[name] = trip_type.source
        loops[name] = Trips(
            tree.trips[name],
            *lowering.states[name],
            exits=lowering.exits.get(name),
            hidden=lowering.hidden[name],
            weighed=lowering.weighed[name],
        )
    graph = lowering.graphs["main"]["main"]
    main = _compiled(graph, "main", program, program.outputs, sources)
    defaults = _defaults(program, sources)
    assembly = Assembly(
        original, graph, main, loops, tree, plan.layers, lowering.interface, sources, defaults
    )
    if has_decoder(program.inputs):
        functions, parts = {}, cut(graph, program)
        for name, part in parts.items():
            functions[name], sources[name] = compile_graph(part, name)
        assembly.encoder_decoder = EncoderDecoder(**functions, graph=parts["decode"])
    return assembly


def _compiled(
    graph: fx.Graph, name: str, program: Program, outputs: tuple[str, ...], sources: dict[str, str]
) -> Callable[..., tuple[Any, ...]]:
    """Compile a graph over the Program's inputs; one that reads pictures also without them."""
    function, sources[name] = compile_graph(graph, name)
    pictures = picture_inputs(program.inputs)
    if not pictures:
        return function
    part = text_part(graph, pictures, outputs, put_pictures)
    text, sources[f"{name} of text"] = compile_graph(part, f"{name} of text")
    return with_pictures(function, text, program.inputs)


def lowered_text(
    program: Program, print_after: Collection[str] = ()
) -> tuple[dict[str, str], dict[str, str]]:
    """Return the code of a lowered Program by graph, and its graphs after passes of the lowering.

    `print_after` names the passes; "all" means each. Raises UsageError for an unknown name.
    """
    known = [each.__name__ for each in PASSES]
    for name in print_after:
        if name not in (*known, "all"):
            raise UsageError(
                f"the lowering has no pass {name!r}",
                where="print_after",
                hint=f"its passes are {', '.join(known)}",
            )
    after: dict[str, str] = {}

    def observe(name: str, lowering: Lowering) -> None:
        if name in print_after or "all" in print_after:
            after[name] = lowering.text()

    return assemble(nn.Module(), program, observe).sources, after


def _defaults(program: Program, sources: dict[str, str]) -> dict[str, Default]:
    """Compile the functions of inputs that may be left out."""
    functions = {}
    for item in program.inputs:
        if item.default is not None:
            name = f"default {item.name}"
            function, sources[name] = compile_graph(runnable(item.default, {}), name)
            functions[item.name] = Default(function, reads(item), looks_into(item))
    return functions


def reassemble(
    program: Program, loops: dict[str, Trips], tree: Tree, model: nn.Module | None = None
) -> Assembly:
    """Generate the code of a Program for modules that were made for it.

    The modules may also have been made for a Program that differs in dtypes only. With `model`, to
    which they belong, its weights may have another shape and other expressions.
    """
    skeleton = nn.Module()
    new = assemble(skeleton, program)
    for name, trips in new.tree.trips.items():
        for trip, source in zip(tree.trips[name], trips, strict=True):
            trip.__class__ = type(source)
    if model is not None:
        names = {m: n for n, m in skeleton.named_modules(remove_duplicate=False)}
        slots = {
            key: replace(
                s, holders=[(model.get_submodule(names[m]), leaf) for m, leaf in s.holders]
            )
            for key, s in new.tree.slots.items()
        }
        tree = replace(tree, slots=slots)
    return replace(new, loops=loops, tree=tree)


def _trip_type(name: str, graphs: dict[str, fx.Graph], weighs: bool) -> type[TripModule]:
    members: dict[str, Any] = {"source": ""}
    for method, graph in graphs.items():
        members[method], source = compile_graph(graph, f"{name} {method}")
        members["source"] += source
    if len(graphs) > 1 or weighs:
        members["plain"] = members["forward"]

        def forward(self: TripModule, *args: Any, function: str = "plain", **kwargs: Any) -> Any:
            """Run one of the trip's functions; `observed` and `weighed` return more than it."""
            return getattr(self, function)(*args, **kwargs)

        members["forward"] = forward
    if weighs:

        @cache
        def weighed() -> Callable[..., Any]:
            # few callers want it
            return compile_graph(with_weights(graphs["forward"]), f"{name} weighed")[0]

        members["weighed"] = lambda self, *args, **kwargs: weighed()(self, *args, **kwargs)
    title = "".join(part.capitalize() for part in re.split(r"\W|_", name, flags=re.ASCII))
    return type(f"{title}Trip", (TripModule,), members)
