"""Hidden states and attention weights of a forward: marked values, collected while it runs."""

from __future__ import annotations

import operator
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx, nn

from reroll.errors import UsageError
from reroll.rewrite.ir.hidden import NAMES, NO_WEIGHTS, STATES, WEIGHTS, marked_names, marks
from reroll.rewrite.ir.program import Loop, Program
from reroll.runtime.functions.attention import attend, attend_with_weights

Names = tuple[str, ...]
# values of `output_hidden_states`, as in transformers: all, none, or the numbers of entries
Wish = bool | int | Sequence[int] | None


@dataclass(frozen=True)
class TripStates:
    """Entries that one loop's trips give: inputs and outputs of a trip, by position.

    `carried` are positions in the carry that a trip takes, `returned` positions in the one that it
    returns. Where some marked values are not in the carry, `returned` is empty. A trip that runs
    `function` then returns all of them behind the carry, in the order of `extra`.
    """

    carried: tuple[tuple[int, Names], ...]
    returned: tuple[tuple[int, Names], ...]
    extra: tuple[Names, ...] = ()
    function: str = ""


NO_STATES = TripStates((), ())


class Entries:
    """Entries collected so far for each of the outputs that a caller wants."""

    def __init__(self, wanted: Collection[str], wish: Wish = None) -> None:
        self.wanted, self.wish = frozenset(wanted), wish
        self.entries: dict[str, list[Tensor]] = {}

    @property
    def weights(self) -> bool:
        """Whether attention weights are wanted."""
        return not self.wanted.isdisjoint(WEIGHTS)

    def add(self, value: Tensor, names: Names) -> None:
        """Append an entry to those of these outputs that are wanted."""
        for name in names:
            if name in self.wanted:
                self.entries.setdefault(name, []).append(value)

    def of(self, name: str) -> tuple[Tensor | None, ...] | None:
        """Return the entries of one output; None if it has none.

        Hidden states that were not requested by number are None.
        """
        found = self.entries.get(name)
        wish = self.wish
        if found is None:
            return None
        if name not in STATES or isinstance(wish, bool) or wish is None:
            return tuple(found)
        numbers = {wish} if isinstance(wish, int) else set(wish)
        wanted = {n % len(found) for n in numbers if -len(found) <= n < len(found)}
        return tuple(value if n in wanted else None for n, value in enumerate(found))


def wanted_entries(model: Any, states: Wish, weights: bool | None) -> Entries | None:
    """Make the collector of one forward's hidden states and attention weights; None for neither.

    `states` and `weights` are the caller's `output_hidden_states` and `output_attentions`; None
    means the configuration's. Raises UsageError if the Program does not mark what is wanted.
    """
    states = model.config.output_hidden_states if states is None else states
    weights = getattr(model.config, "output_attentions", False) if weights is None else weights
    wanted: list[str] = []
    if states is not None and states is not False:
        wanted += marked_names(model.program, STATES)
        if not wanted:
            raise UsageError(
                "it is not known which values of the model are its hidden states",
                where=type(model).__name__,
                hint="its layers have no hidden states in common, or a pass has replaced some",
            )
    if weights:
        of_weights = list(marked_names(model.program, WEIGHTS))
        if not of_weights:
            raise _no_weights(model)
        wanted += of_weights
    return Entries(wanted, states) if wanted else None


def _no_weights(model: Any) -> UsageError:
    """Make the error for attention weights of a model that has none, with the reason if known."""
    remarks = [remark for step in model.program.origin.steps for remark in step.remarks]
    known = next((r for r in reversed(remarks) if NO_WEIGHTS in r), None)
    other = "the original returns none, or was captured by an older version: convert it again"
    return UsageError(
        "the model has no attention weights to return",
        where=f"output_attentions of {type(model).__name__}",
        hint=known or other,
    )


def note(value: Tensor, state: Any, names: Names) -> Tensor:
    """Record a value of the main graph as an entry of some outputs, and return it."""
    if state.hidden is not None:
        state.hidden.add(value, names)
    return value


def attend_noting(state: Any, names: Names, *args: Any) -> Tensor:
    """Compute an attention of the main graph; record its weights if they are wanted."""
    if state.hidden is None or not state.hidden.weights:
        return attend(*args)
    out, weights = attend_with_weights(*args)
    state.hidden.add(weights, names)
    return out


def note_in_main(program: Program, state: fx.Node) -> None:
    """Let the main graph record the entries that its nodes are marked with, in place.

    `state` is the graph's state input.
    """
    graph = program.graph
    for node in [n for n in graph.nodes if marks(n)]:
        if node.target is attend:
            node.target, node.args = attend_noting, (state, marks(node), *node.args)
            continue
        with graph.inserting_after(node):
            noted = graph.call_function(note, (node, state, marks(node)))
        noted.meta.update({k: v for k, v in node.meta.items() if k == "type"})
        node.replace_all_uses_with(noted, delete_user_cb=lambda user, new=noted: user is not new)


def states_of(loop: Loop) -> tuple[TripStates, list[fx.Node]]:
    """Return the hidden states of a loop, and the nodes to be returned behind its carry."""
    carried = _carried(loop)
    inner = _inner(loop.body.graph, STATES)
    returned: Any = loop.body.graph.output_node().args[0]
    if all(node in returned for node in inner):
        places = tuple((list(returned).index(node), marks(node, STATES)) for node in inner)
        return TripStates(carried, places), []
    return TripStates(carried, (), tuple(marks(n, STATES) for n in inner), "observed"), inner


def weights_of(loop: Loop, graph: fx.Graph) -> TripStates | None:
    """Return what a loop's trips give where weights are wanted; None if its body has none.

    `graph` is the body's code, which `with_weights` turns into the function `weighed`.
    """
    if not _inner(graph, WEIGHTS):
        return None
    return TripStates(_carried(loop), (), tuple(map(marks, _inner(graph))), "weighed")


def _carried(loop: Loop) -> tuple[tuple[int, Names], ...]:
    places = enumerate(loop.places[: len(loop.carry)])
    return tuple((i, marks(place, STATES)) for i, place in places if marks(place, STATES))


def _inner(graph: fx.Graph, among: Names = NAMES) -> list[fx.Node]:
    return [n for n in graph.nodes if n.op != "placeholder" and marks(n, among)]


def returning(graph: fx.Graph, extra: Sequence[fx.Node], weigh: bool = False) -> fx.Graph:
    """Copy a body so that it also returns the entries of the nodes of `extra` behind the carry.

    With `weigh`, the entry of a call of `attend` is its weights.
    """
    new = fx.Graph()
    values: dict[fx.Node, fx.Node] = {}
    entries: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        if node.op == "output":
            carry: Any = node.args[0]
            new.output((*(values[n] for n in carry), *(entries.get(n, values[n]) for n in extra)))
            continue
        values[node] = copied = new.node_copy(node, lambda n: values[n])
        if weigh and node.target is attend and node in extra:
            copied.target = attend_with_weights
            values[node] = new.call_function(operator.getitem, (copied, 0))
            entries[node] = new.call_function(operator.getitem, (copied, 1))
    return new


def with_weights(graph: fx.Graph) -> fx.Graph:
    """Copy the code of a body so that it also returns all of its entries behind the carry."""
    return returning(graph, _inner(graph), weigh=True)


def run_observed(
    trip: nn.Module,
    states: TripStates,
    hidden: Entries,
    carry: tuple[Any, ...],
    values: Sequence[Any],
    layers: Any,
) -> tuple[Any, ...]:
    """Run one trip and collect its entries; returns its carry."""
    for position, names in states.carried:
        hidden.add(carry[position], names)
    options = {"function": states.function} if states.function else {}
    out = trip(*carry, *values, past_key_values=layers, **options)
    for position, names in states.returned:
        hidden.add(out[position], names)
    for value, names in zip(out[len(carry) :], states.extra, strict=True):
        hidden.add(value, names)
    result: tuple[Any, ...] = out[: len(carry)]
    return result
