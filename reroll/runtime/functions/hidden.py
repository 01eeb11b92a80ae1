"""The hidden states of a forward: values that the Program marks, collected while it runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx, nn

from reroll.errors import UsageError
from reroll.rewrite.ir.hidden import hidden_names, marks
from reroll.rewrite.ir.program import Loop, Program

Names = tuple[str, ...]
# values of `output_hidden_states`, as in transformers: all, none, or the numbers of entries
Wish = bool | int | Sequence[int] | None


@dataclass(frozen=True)
class TripStates:
    """Hidden states of one loop's trips: inputs and outputs of a trip, by position.

    `carried` are positions in the carry that a trip takes, `returned` positions in the one that it
    returns. Where some marked values are not in the carry, `returned` is empty. A trip called with
    `observe` then returns all of them behind the carry, in the order of `extra`.
    """

    carried: tuple[tuple[int, Names], ...]
    returned: tuple[tuple[int, Names], ...]
    extra: tuple[Names, ...] = ()


NO_STATES = TripStates((), ())


class HiddenStates:
    """Entries collected so far for each output."""

    def __init__(self) -> None:
        self.entries: dict[str, list[Tensor]] = {}

    def add(self, value: Tensor, names: Names) -> None:
        """Append an entry to these outputs."""
        for name in names:
            self.entries.setdefault(name, []).append(value)

    def chosen(self, name: str, wish: Wish) -> tuple[Tensor | None, ...] | None:
        """Return the entries of one output, with None in place of those that were not requested."""
        states = self.entries.get(name)
        if states is None:
            return None
        if isinstance(wish, bool) or wish is None:
            return tuple(states)
        numbers = {wish} if isinstance(wish, int) else set(wish)
        wanted = {n % len(states) for n in numbers if -len(states) <= n < len(states)}
        return tuple(value if n in wanted else None for n, value in enumerate(states))


def hidden_states(model: Any, wish: Wish) -> tuple[HiddenStates | None, Wish]:
    """Make the collector of one forward's hidden states, and resolve which are wanted.

    `wish` is the caller's `output_hidden_states`; None means the configuration's. The collector is
    None if none are wanted. Raises UsageError if the Program does not mark which values are hidden
    states.
    """
    if wish is None:
        wish = model.config.output_hidden_states
    if wish is None or wish is False:
        return None, wish
    if not any(hidden_names(model.program)):
        raise UsageError(
            "it is not known which values of the model are its hidden states",
            where=type(model).__name__,
            hint="its layers have no hidden states in common, or a pass has replaced some",
        )
    return HiddenStates(), wish


def note(value: Tensor, state: Any, names: Names) -> Tensor:
    """Record a value of the main graph as an entry of some outputs, and return it."""
    if state.hidden is not None:
        state.hidden.add(value, names)
    return value


def note_in_main(program: Program, state: fx.Node) -> None:
    """Insert `note` after every marked value of the main graph, in place.

    `state` is the graph's state input.
    """
    graph = program.graph
    for node in [n for n in graph.nodes if marks(n)]:
        with graph.inserting_after(node):
            noted = graph.call_function(note, (node, state, marks(node)))
        noted.meta.update({k: v for k, v in node.meta.items() if k == "type"})
        node.replace_all_uses_with(noted, delete_user_cb=lambda user, new=noted: user is not new)


def states_of(loop: Loop) -> tuple[TripStates, list[fx.Node]]:
    """Return the hidden states of a loop, and the nodes to be returned behind its carry."""
    carried = tuple((i, marks(p)) for i, p in enumerate(loop.places[: len(loop.carry)]) if marks(p))
    inner = [n for n in loop.body.graph.nodes if n.op != "placeholder" and marks(n)]
    returned: Any = loop.body.graph.output_node().args[0]
    if all(node in returned for node in inner):
        places = tuple((list(returned).index(node), marks(node)) for node in inner)
        return TripStates(carried, places), []
    return TripStates(carried, (), tuple(marks(node) for node in inner)), inner


def returning(graph: fx.Graph, extra: Sequence[fx.Node]) -> fx.Graph:
    """Copy a body so that it also returns the nodes of `extra` behind the carry."""
    new = fx.Graph()
    values: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        if node.op == "output":
            carry: Any = node.args[0]
            new.output(tuple(values[n] for n in (*carry, *extra)))
        else:
            values[node] = new.node_copy(node, lambda n: values[n])
    return new


def run_observed(
    trip: nn.Module,
    states: TripStates,
    hidden: HiddenStates,
    carry: tuple[Any, ...],
    values: Sequence[Any],
    layers: Any,
) -> tuple[Any, ...]:
    """Run one trip and collect its hidden states; returns its carry."""
    for position, names in states.carried:
        hidden.add(carry[position], names)
    options = {"observe": True} if states.extra else {}
    out = trip(*carry, *values, past_key_values=layers, **options)
    for position, names in states.returned:
        hidden.add(out[position], names)
    for value, names in zip(out[len(carry) :], states.extra, strict=True):
        hidden.add(value, names)
    result: tuple[Any, ...] = out[: len(carry)]
    return result
