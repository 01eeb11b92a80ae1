"""Lowering as a list of passes over one record, each of which can be printed after.

A pass changes the record in place. `PASSES` is their order. After the last one, `Lowering.graphs`
has a runnable graph for each function that is compiled.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from torch import fx

from reroll.rewrite.analysis.mixing import branch_mixing, other_mixing
from reroll.rewrite.analysis.state_plan import StatePlan, plan_states, stateful_nodes
from reroll.rewrite.capture.pictures import picture_inputs
from reroll.rewrite.ir.exits import exits_of
from reroll.rewrite.ir.program import Loop, Program
from reroll.runtime.functions.exits import LoopExits
from reroll.runtime.functions.hidden import note_in_main, returning, states_of, weights_of
from reroll.runtime.lowering.attention_masks import place_masks
from reroll.runtime.lowering.codegen import Update, runnable
from reroll.runtime.lowering.encoder_decoder import split_static_graphs
from reroll.runtime.lowering.exit_graphs import loop_exits, split_exits
from reroll.runtime.lowering.heads import (
    head_path,
    keep_before_head,
    take_embeddings,
    without_factors,
)
from reroll.runtime.lowering.hoisting import OWN_INPUTS, hoist_invariants
from reroll.runtime.lowering.modules import Tree
from reroll.runtime.lowering.padding import read_padding
from reroll.runtime.models.pictures import count_places
from reroll.runtime.state.caches import tell_padding, update_function


@dataclass
class Interface:
    """Properties of a lowered main graph on which the model's `forward` depends.

    Attributes:
        mixing: the name of an operation that mixes tokens of different documents, if any.
        branching: the name of an operation that mixes the branches of a tree of tokens, if any.
        masks: the padding inputs that are needed as tensors; the others may be None.
        head: the path of the module that computes the logits.
        embeddings: the path of the module that looks up the tokens, by the input that has them.
        takes_embeddings: the inputs in whose place embeddings can be given.
        keeps_positions: whether it applies `logits_to_keep` itself.
    """

    mixing: str | None = None
    branching: str | None = None
    masks: frozenset[str] = frozenset()
    head: str | None = None
    embeddings: Mapping[str, str] = field(default_factory=dict)
    takes_embeddings: frozenset[str] = frozenset()
    keeps_positions: bool = False


@dataclass
class Lowering:
    """A Program during its lowering to a module that runs.

    Attributes:
        program: the Program, whose graphs the passes change.
        tree: the modules that hold its weights.
        plan: its states.
        state: the node of the running forward's `ForwardState`, an input of the main graph.
        layers: the node of its cache layers in each graph.
        interface: properties of the main graph on which `forward` depends.
        updates: the function by which each stateful node updates its layer.
        static_graphs: for loops over an encoder's result, the graph of values that are the same
            for all tokens.
        states: for each loop, the number of its first state and how many a trip has.
        exits: the properties of exits, for each loop that has them.
        hidden: the hidden states of each loop.
        weighed: the hidden states and attention weights of each loop that has weights.
        graphs: runnable graphs by loop ("main" for the main graph) and function.
    """

    program: Program
    tree: Tree
    plan: StatePlan = field(init=False)
    state: fx.Node = field(init=False)
    layers: dict[str, fx.Node] = field(default_factory=dict)
    interface: Interface = field(default_factory=Interface)
    updates: dict[fx.Node, Callable[..., Any]] = field(default_factory=dict)
    static_graphs: dict[str, fx.Graph] = field(default_factory=dict)
    states: dict[str, tuple[int, int]] = field(default_factory=dict)
    exits: dict[str, LoopExits] = field(default_factory=dict)
    hidden: dict[str, Any] = field(default_factory=dict)
    weighed: dict[str, Any] = field(default_factory=dict)
    graphs: dict[str, dict[str, fx.Graph]] = field(default_factory=dict)

    def text(self) -> str:
        """Print all graphs as they are now."""
        named = {} if self.graphs else dict(self.program.graphs())
        for owner, functions in self.graphs.items():
            for name, graph in functions.items():
                named[owner if name == owner else f"{owner}, {name}"] = graph
        return "\n\n".join(f"---- {name}\n{graph}" for name, graph in named.items()) + "\n"


LoweringPass: TypeAlias = Callable[[Lowering], None]
# called after each pass with its name and the record
Observer: TypeAlias = Callable[[str, Lowering], None]


def lower_graphs(program: Program, tree: Tree, observe: Observer | None = None) -> Lowering:
    """Run all passes over a Program whose modules are those of `tree`."""
    record = Lowering(program, tree)
    for each in PASSES:
        each(record)
        if observe is not None:
            observe(each.__name__, record)
    return record


def fold_factors(x: Lowering) -> None:
    """Leave the factor of scaled embeddings to the modules that look them up."""
    if x.program.origin.scales_embeddings:
        x.program = without_factors(x.program, x.tree.readings)


def hoist(x: Lowering) -> None:
    """Move values that are the same in every trip out of loops."""
    x.program = hoist_invariants(x.program)


def plan_state(x: Lowering) -> None:
    """Number the states, and find what mixes tokens of different documents or branches."""
    x.plan, x.interface.mixing = plan_states(x.program), other_mixing(x.program)
    x.interface.branching = branch_mixing(x.program)


def add_state_inputs(x: Lowering) -> None:
    """Give each graph its cache layers, and the main graph the state of a forward."""
    body_input, main_input = OWN_INPUTS
    for name, graph in x.program.graphs():
        last = [n for n in graph.nodes if n.op == "placeholder"][-1]
        with graph.inserting_after(last):
            if name == "main":
                x.state = graph.create_node("placeholder", main_input, name=main_input)
            else:
                # a keyword, because gradient checkpointing looks for it
                x.layers[name] = graph.create_node(
                    "placeholder", body_input, (None,), name=body_input
                )
    with x.program.graph.inserting_after(x.state):
        x.layers["main"] = x.program.graph.call_function(getattr, (x.state, "layers"))


def check_padding(x: Lowering) -> None:
    """Let attentions read one boolean mask per padding input, or None."""
    x.interface.masks = read_padding(x.program, x.state)


def open_ends(x: Lowering) -> None:
    """Take embeddings instead of tokens, and compute logits only where they are wanted."""
    readings, interface = x.tree.readings["main"], x.interface
    interface.head = head_path(x.program, readings)
    interface.embeddings, interface.takes_embeddings = take_embeddings(x.program, readings, x.state)
    interface.keeps_positions = keep_before_head(x.program, x.state)


def place_pictures(x: Lowering) -> None:
    """Count the positions of pictures among the tokens."""
    if picture_inputs(x.program.inputs):
        count_places(x.program)


def split_encoded(x: Lowering) -> None:
    """Split off what a decoder computes from the encoder's result alone."""
    x.static_graphs = split_static_graphs(x.program, x.state)


def make_masks(x: Lowering) -> None:
    """Make each attention's mask, as early and as rarely as possible.

    How a state is updated depends on which nodes read it; this pass is the last that can see them.
    """
    x.updates = {node: update_function(node) for node in x.plan.numbers}
    for node in x.plan.numbers:
        tell_padding(node)
    place_masks(x.program, x.layers)


def note_hidden(x: Lowering) -> None:
    """Insert calls that record the hidden states and attention weights of the main graph."""
    note_in_main(x.program, x.state)


def make_runnable(x: Lowering) -> None:
    """Make the graphs that are compiled, from every graph and the parts of loops with exits."""
    for loop in x.program.loops:
        x.graphs[loop.name] = _functions(x, loop)
    updates = {n: (x.updates[n], x.plan.number(n)) for n in stateful_nodes(x.program.graph)}
    main = runnable(x.program.graph, x.tree.readings["main"], x.layers["main"], updates, x.state)
    x.graphs["main"] = {"main": main}


PASSES: tuple[LoweringPass, ...] = (
    fold_factors,
    hoist,
    plan_state,
    add_state_inputs,
    check_padding,
    open_ends,
    place_pictures,
    split_encoded,
    make_masks,
    note_hidden,
    make_runnable,
)


def _functions(x: Lowering, loop: Loop) -> dict[str, fx.Graph]:
    """Return the graphs of a trip: `forward`, and those for exits, hidden states and an encoder."""
    name, body, readings = loop.name, loop.body.graph, x.tree.readings[loop.name]
    layers = x.layers[name]
    # before the body is split: the test of an exit may keep state as well
    stateful = stateful_nodes(body)
    x.states[name] = x.plan.number(stateful[0]) if stateful else 0, len(stateful)
    updates: dict[fx.Node, Update] = {
        node: (x.updates[node], number) for number, node in enumerate(stateful)
    }
    graphs = {}
    exits = exits_of(loop)
    if exits is not None:
        x.exits[name] = loop_exits(loop, exits)
        split = split_exits(loop, exits)
        test_updates = {split.tested[node]: updates[node] for node in split.tested}
        graphs["test"] = runnable(split.test, readings, split.layers, test_updates)
        fill_updates = {new: updates[node] for node, new in split.filled.items() if node in updates}
        graphs["fill"] = runnable(split.fill, readings, split.filled[layers], fill_updates)
    graphs["forward"] = runnable(body, readings, layers, updates)
    x.weighed[name] = weights_of(loop, graphs["forward"])
    x.hidden[name], inner = states_of(loop)
    if inner:
        observed = returning(body, inner)
        # a copy has the same nodes in the same order
        copies = dict(zip(body.nodes, observed.nodes, strict=True))
        observed_updates = {copies[node]: update for node, update in updates.items()}
        graphs["observed"] = runnable(observed, readings, copies[layers], observed_updates)
    if name in x.static_graphs:
        graphs["static"] = runnable(x.static_graphs[name], readings)
    return graphs
