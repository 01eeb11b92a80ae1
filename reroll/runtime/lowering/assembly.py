"""Putting a lowered Program together: its modules, and one function for each of its graphs."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from torch import fx, nn

from reroll.rewrite.analysis.mixing import other_mixing
from reroll.rewrite.analysis.state_plan import CacheLayer, plan_states, stateful_nodes
from reroll.rewrite.capture.pictures import picture_inputs, text_part
from reroll.rewrite.ir.defaults import looks_into, reads
from reroll.rewrite.ir.exits import exits_of
from reroll.rewrite.ir.program import Program
from reroll.runtime.functions.hidden import note_in_main, observed, states_of
from reroll.runtime.functions.loops import Trips
from reroll.runtime.lowering.attention_masks import place_masks
from reroll.runtime.lowering.codegen import compile_graph, runnable
from reroll.runtime.lowering.exit_graphs import loop_exits, split_exits
from reroll.runtime.lowering.halves import cut
from reroll.runtime.lowering.heads import head_path, keep_before_head, take_embeddings
from reroll.runtime.lowering.hoisting import OWN_INPUTS, hoist_invariants
from reroll.runtime.lowering.modules import Tree, Trip, build_tree
from reroll.runtime.lowering.padding import read_padding
from reroll.runtime.lowering.statics import is_decoder_input, split_statics
from reroll.runtime.models.pictures import count_places, put_pictures, with_pictures
from reroll.runtime.state.caches import tell_padding, update_function


@dataclass
class HalfFunctions:
    """The functions of an encoder-decoder model: see `halves`."""

    encode: Callable[..., tuple[Any, ...]]
    extend: Callable[..., tuple[Any, ...]]
    decode: Callable[..., tuple[Any, ...]]


@dataclass(frozen=True)
class Default:
    """What stands for an input that is left out: a function of the module and of other inputs.

    Of those in `reads` that are not in `looks_into`, it takes the sizes only.
    """

    function: Callable[..., tuple[Any, ...]]
    reads: tuple[str, ...]
    looks_into: frozenset[str]


@dataclass
class Assembly:
    """A Program in a form that runs.

    `main` takes the module, the Program's inputs in order and a `State`, and returns the outputs.
    `masks` are the padding inputs that it needs as tensors; the others may be None. `keeps` says
    whether it applies `logits_to_keep` itself. `embeddings` and `head` are the paths of the modules
    that look up the tokens and make the logits. `sources` is the generated code by graph.
    `defaults` make the inputs that are left out and do not follow from sizes alone.
    `takes_embeddings`: embeddings can be given instead of tokens. `mixing` names what mixes tokens
    and knows nothing of documents.
    """

    main: Callable[..., tuple[Any, ...]]
    loops: dict[str, Trips]
    tree: Tree
    layers: tuple[CacheLayer, ...]
    masks: frozenset[str]
    keeps: bool
    embeddings: str | None
    head: str | None
    sources: dict[str, str]
    defaults: dict[str, Default]
    takes_embeddings: bool
    mixing: str | None = None
    halves: HalfFunctions | None = None


def assemble(model: nn.Module, program: Program) -> Assembly:
    """Grow a Program's modules under `model`, and generate its code. Its weights have no data
    yet.
    """
    tree = build_tree(model, program)
    program = hoist_invariants(program)
    plan = plan_states(program)
    mixing = other_mixing(program)
    layers, state = _cache_inputs(program)
    masks = read_padding(program, state)
    readings = tree.readings["main"]
    head = head_path(program, readings)
    embeddings, takes_embeddings = take_embeddings(program, readings, state)
    keeps = keep_before_head(program, state)
    if pictures := picture_inputs(program.inputs):
        count_places(program)
    statics = split_statics(program, state)
    updates = {node: update_function(node) for node in plan.numbers}
    for node in plan.numbers:
        tell_padding(node)
    place_masks(program, layers)
    note_in_main(program, state)
    loops, sources = {}, {}
    for loop in program.loops:
        name, caches = loop.name, stateful_nodes(loop.body.graph)
        own = {node: (updates[node], number) for number, node in enumerate(caches)}
        exits = exits_of(loop)
        running = None if exits is None else loop_exits(loop, exits)
        graphs = {}
        if exits is not None:
            split = split_exits(loop, exits)
            own_test = {split.tested[node]: own[node] for node in split.tested}
            graphs["test"] = runnable(split.test, tree.readings[name], split.layers, own_test)
            own_fill = {new: own[node] for node, new in split.filled.items() if node in own}
            filled = split.filled[layers[name]]
            graphs["fill"] = runnable(split.fill, tree.readings[name], filled, own_fill)
        graphs["forward"] = runnable(loop.body.graph, tree.readings[name], layers[name], own)
        hidden, inner = states_of(loop)
        if inner:
            seen = observed(loop.body.graph, inner)
            # a copy has the nodes of the original in their order
            copies = dict(zip(loop.body.graph.nodes, seen.nodes, strict=True))
            own_seen = {copies[node]: update for node, update in own.items()}
            seen_layers = copies[layers[name]]
            graphs["observed"] = runnable(seen, tree.readings[name], seen_layers, own_seen)
        if name in statics:
            graphs["static"] = runnable(statics[name], tree.readings[name])
        trip_type = _trip_type(name, graphs)
        for trip in tree.trips[name]:
            trip.__class__ = trip_type
        sources[name] = trip_type.source
        first = plan.number(caches[0]) if caches else 0
        loops[name] = Trips(tree.trips[name], first, len(caches), exits=running, hidden=hidden)
    own = {n: (updates[n], plan.number(n)) for n in stateful_nodes(program.graph)}
    graph = runnable(program.graph, readings, layers["main"], own, state)
    main, sources["main"] = compile_graph(graph, "main")
    if pictures:
        part = text_part(graph, pictures, program.outputs, put_pictures)
        text, sources["text"] = compile_graph(part, "text")
        main = with_pictures(main, text, program.inputs)
    assembly = Assembly(
        main,
        loops,
        tree,
        plan.layers,
        masks,
        keeps,
        embeddings,
        head,
        sources,
        _defaults(program, sources),
        takes_embeddings,
        mixing,
    )
    if any(is_decoder_input(i.name) for i in program.inputs):
        assembly.halves = _halves(graph, program, sources)
    return assembly


def _defaults(program: Program, sources: dict[str, str]) -> dict[str, Default]:
    """The functions of inputs that may be left out."""
    functions = {}
    for item in program.inputs:
        if item.default is not None:
            name = f"default {item.name}"
            function, sources[name] = compile_graph(runnable(item.default, {}), name)
            functions[item.name] = Default(function, reads(item), looks_into(item))
    return functions


def reassemble(model: Any, program: Program) -> Assembly:
    """The code of a Program for a model that has its modules: one that differs in dtypes alone."""
    own: Assembly = model._assembly
    new = assemble(nn.Module(), program)
    for name, trips in new.tree.trips.items():
        for trip, source in zip(own.tree.trips[name], trips, strict=True):
            trip.__class__ = type(source)
    return replace(new, loops=own.loops, tree=own.tree)


def _halves(graph: fx.Graph, program: Program, sources: dict[str, str]) -> HalfFunctions:
    outputs = program.outputs
    name = "encoder_last_hidden_state"
    halves = cut(graph, program.inputs, outputs.index(name) if name in outputs else None)
    functions = []
    for part in ("encode", "extend", "decode"):
        function, sources[part] = compile_graph(getattr(halves, part), part)
        functions.append(function)
    return HalfFunctions(*functions)


def _trip_type(name: str, graphs: dict[str, fx.Graph]) -> type[Trip]:
    members: dict[str, Any] = {"source": ""}
    for method, graph in graphs.items():
        members[method], source = compile_graph(graph, f"{name} {method}")
        members["source"] += source
    if "observed" in members:
        members["forward"] = _either(members["forward"], members["observed"])
    title = "".join(part.capitalize() for part in re.split(r"\W|_", name, flags=re.ASCII))
    return type(f"{title}Trip", (Trip,), members)


def _either(plain: Callable[..., Any], observed: Callable[..., Any]) -> Callable[..., Any]:
    """The forward of a trip that returns its hidden states as well if it is asked to."""

    def forward(self: Trip, *args: Any, observe: bool = False, **kwargs: Any) -> Any:
        return (observed if observe else plain)(self, *args, **kwargs)

    return forward


def _cache_inputs(program: Program) -> tuple[dict[str, fx.Node], fx.Node]:
    """Give each graph its cache layers as an input; returns those nodes and the main graph's
    state.
    """
    body_input, main_input = OWN_INPUTS
    nodes: dict[str, fx.Node] = {}
    for name, graph in program.graphs():
        last = [n for n in graph.nodes if n.op == "placeholder"][-1]
        with graph.inserting_after(last):
            if name == "main":
                state = graph.create_node("placeholder", main_input, name=main_input)
            else:
                # a keyword, because gradient checkpointing looks for it
                nodes[name] = graph.create_node("placeholder", body_input, (None,), name=body_input)
    with program.graph.inserting_after(state):
        nodes["main"] = program.graph.call_function(getattr, (state, "layers"))
    return nodes, state
