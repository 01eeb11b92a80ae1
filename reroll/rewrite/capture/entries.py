"""Entries of `hidden_states` and `attentions`: asked of the original, and marked in its graph.

An attention op has no weights to give to the model that calls it. Inside a trace it gives a
stand-in, `reroll::weights_of`, of their shape. Where the model returns a stand-in as an entry of an
output, the op gets that mark, and the stand-in goes. So it is the original's own code that decides
which attentions have entries, of which outputs, and in which order.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, fx

from reroll.rewrite.ir.hidden import NAMES, STATES, WEIGHTS, count, mark, unmark
from reroll.rewrite.ir.matching import shape
from reroll.rewrite.ir.ops import ATTENTION


@torch.library.custom_op("reroll::weights_of", mutates_args=())
def weights_of(out: Tensor, q: Tensor, k: Tensor) -> Tensor:
    """Stand for the weights [batch, heads, queries, keys] of the attention that returned `out`."""
    return q.new_full((*q.shape[:3], k.shape[2]), math.nan)


@weights_of.register_fake
def _(out: Tensor, q: Tensor, k: Tensor) -> Tensor:
    return q.new_empty(*q.shape[:3], k.shape[2])


WEIGHTS_OF = torch.ops.reroll.weights_of.default


def asks(model: Any, name: str) -> bool:
    """Whether a model's forward takes the wish `name`, such as `output_hidden_states`."""
    import inspect

    parameters = inspect.signature(model.forward).parameters
    kinds = {p.kind for p in parameters.values()}
    open_ended = inspect.Parameter.VAR_KEYWORD in kinds and hasattr(model, "config")
    return open_ended or name in parameters


def entries_of(out: Any) -> dict[str, Tensor]:
    """Return the entries among a model's outputs, by name and number: `NAME.<number>`.

    An output with an entry that is no tensor has none.
    """
    found: dict[str, Tensor] = {}
    for name in NAMES:
        values = out.get(name) or ()
        if all(isinstance(value, Tensor) for value in values):
            found.update((f"{name}.{number}", value) for number, value in enumerate(values))
    return found


def kind_of(output: str) -> str:
    """Return the name of the output that an entry `NAME.<number>` is of."""
    return output.partition(".")[0]


def computes_with_weights(graph: fx.Graph) -> bool:
    """Whether a graph does more with a stand-in for weights than to return it."""
    stand_ins = (n for n in graph.nodes if n.target is WEIGHTS_OF)
    return any(user.op != "output" for node in stand_ins for user in node.users)


def take_marks(graph: fx.Graph, outputs: tuple[str, ...]) -> tuple[str, ...]:
    """Turn entries among a flat graph's outputs into marks, in place; return the other outputs.

    None of a kind is marked if an entry is no computed value, or if dead-code elimination removes
    one.
    """
    node = graph.output_node()
    pairs = list(zip(outputs, node.args[0], strict=True))  # type: ignore[arg-type]
    kept = [(name, value) for name, value in pairs if kind_of(name) not in NAMES]
    entries = [(kind_of(name), value) for name, value in pairs if kind_of(name) in NAMES]
    entries = [(n, v.args[0] if v.target is WEIGHTS_OF else v) for n, v in entries]
    for name, value in entries:
        mark(value, (name,))
    node.args = (tuple(value for _, value in kept),)
    graph.eliminate_dead_code()
    for among in (STATES, WEIGHTS):
        values = [value for name, value in entries if name in among]
        whole = all(value.op == "call_function" for value in values)
        if not whole or count(graph, among) != len(values):
            for each in graph.nodes:
                unmark(each, among)
    return tuple(name for name, _ in kept)


def move_weights(region: list[fx.Node], new: fx.Node) -> None:
    """Move the marks of weights in a region to the attention op that replaces it.

    `new` is the replacement's last node. Weights [batch * heads, queries, keys] keep no mark: those
    of the op have four dimensions.
    """
    while new.target is not ATTENTION and new.args and isinstance(new.args[0], fx.Node):
        new = new.args[0]
    for node in region:
        names = unmark(node, WEIGHTS)
        if new.target is ATTENTION and len(shape(node)) == 4:
            mark(new, names)
