"""What a Program costs to run, counted from the types in its graphs.

Counted are matrix products and attention, at two operations for one multiply-add; the rest of a
transformer is small beside them. Ops that this file does not know, such as a new token mixer, come
with a rule of their own: see `register`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import fx

from reroll.rewrite.ir.exits import exits_of, is_open
from reroll.rewrite.ir.matching import argument
from reroll.rewrite.ir.ops import (
    ATTENTION,
    ATTENTION_MASS,
    BIDIRECTIONAL,
    CACHE,
    EXIT_LINEAR,
    RECURRENCE,
)
from reroll.rewrite.ir.program import Dim, Loop, Program, TensorType
from reroll.rewrite.ir.rules import find_rule

aten = torch.ops.aten

CONTEXT = 1024


@dataclass(frozen=True)
class Place:
    """Where a node is: which trip of which loop, if any, and how many tokens are in context."""

    context: int
    loop: Loop | None = None
    trip: int = 0

    def resolve(self, value: Any) -> Any:
        """A constant, or what a loop's input holds in this trip where that is a constant."""
        return value if self.loop is None else self.loop.resolve(value, self.trip)


Rule: TypeAlias = Callable[[fx.Node, Place], int]

_FLOPS: dict[Any, Rule] = {}
_STATE: dict[Any, Rule] = {}


def register(target: Any, *, flops: Rule | None = None, state: Rule | None = None) -> None:
    """Say what one op costs: operations per token, and bytes of state for each sequence."""
    if flops is not None:
        _FLOPS[target] = flops
    if state is not None:
        _STATE[target] = state


def flops_per_token(program: Program, context: int = CONTEXT) -> int:
    """Operations for one more token with `context` tokens before it.

    A model whose length is fixed (a vision transformer) counts as one token: the whole input.
    """
    return _total(program, _FLOPS, context)


def state_bytes(program: Program, context: int) -> int:
    """Bytes of state that one sequence of `context` tokens holds while it generates."""
    return _total(program, _STATE, context)


def keeps_state(program: Program) -> bool:
    """Whether any op of a Program has state, as those of models that generate do."""
    return any(n.target in _STATE for _, graph in program.graphs() for n in graph.nodes)


def _total(program: Program, rules: dict[Any, Rule], context: int) -> int:
    total = _graph(program.graph, rules, Place(context))
    for loop in program.loops:
        exits = exits_of(loop)
        for trip in range(loop.trips):
            # where nobody can leave, no score is computed
            closed = exits is not None and not is_open(exits.thresholds[trip])
            skipped = exits.tests if exits is not None and closed else frozenset()
            total += _graph(loop.body.graph, rules, Place(context, loop, trip), skipped)
    return total


def _graph(
    graph: fx.Graph,
    rules: dict[Any, Rule],
    place: Place,
    skipped: frozenset[fx.Node] = frozenset(),
) -> int:
    nodes = (n for n in graph.nodes if n.target in rules and n not in skipped)
    return sum(rules[n.target](n, place) for n in nodes)


def _shape(value: Any) -> tuple[Dim, ...]:
    kind = value.meta.get("type") if isinstance(value, fx.Node) else None
    return kind.shape if isinstance(kind, TensorType) else ()


def _count(dims: tuple[Dim, ...]) -> int:
    """Elements for one token: batch and length count once."""
    return math.prod(d for d in dims if isinstance(d, int))


# ---- matrix products


def _linear(node: fx.Node, place: Place) -> int:
    x, weight = _shape(node.args[0]), _shape(node.args[1])
    return 2 * _count(x[:-1]) * _count(weight)


def _matmul(operands: slice) -> Rule:
    """Products of two computed matrices [..., n, k] and [..., k, m]."""

    def rule(node: fx.Node, place: Place) -> int:
        left, _ = node.args[operands]
        inner, result = _shape(left)[-1:], _shape(node)
        # tokens along the columns or along the inner dimension are those in context
        seen = [d if isinstance(d, int) else place.context for d in (*inner, *result[-1:])]
        return 2 * _count(result[:-1]) * math.prod(seen)

    return rule


def _convolution(node: fx.Node, place: Place) -> int:
    return 2 * _count(_shape(node)) * _count(_shape(node.args[1])[1:])


def _exit_linear(node: fx.Node, place: Place) -> int:
    # a token has one head, whichever it is
    x, weight = _shape(node.args[0]), _shape(node.args[3][0])  # type: ignore[index]
    return 2 * _count(x[:-1]) * _count(weight)


register(aten.linear.default, flops=_linear)
register(EXIT_LINEAR, flops=_exit_linear)
for _op in (aten.mm.default, aten.bmm.default, aten.matmul.default):
    register(_op, flops=_matmul(slice(0, 2)))
for _op in (aten.addmm.default, aten.baddbmm.default):
    register(_op, flops=_matmul(slice(1, 3)))
for _op in (aten.conv1d.default, aten.conv2d.default, aten.conv3d.default):
    register(_op, flops=_convolution)


# ---- attention


def _attention(node: fx.Node, place: Place) -> int:
    q, k, v = (_shape(a) for a in node.args[:3])
    rows = _count((*q[:1], *q[1:3]))  # [batch, heads, time]
    return 2 * rows * _keys(node, place) * (_count(q[-1:]) + _count(v[-1:])) if k else 0


def _mass(node: fx.Node, place: Place) -> int:
    q = _shape(node.args[0])
    return 2 * _count((*q[:1], *q[1:3])) * _keys(node, place) * _count(q[-1:])


def _keys(node: fx.Node, place: Place) -> int:
    """How many keys one query of an attention sees at most."""
    length = _shape(node.args[1])[2]
    keys = length if isinstance(length, int) else place.context
    for name in ("window", "chunk"):
        limit = place.resolve(argument(node, name))
        if isinstance(limit, int):
            # without causality, a window reaches to both sides
            both = name == "window" and place.resolve(argument(node, "causal")) is False
            # what is in sight anyway, beside what the window reaches
            kept = place.resolve(argument(node, "prefix")) or 0
            keys = min(keys, kept + (2 * limit + 1 if both else limit))
    return keys


def _cache(node: fx.Node, place: Place) -> int:
    readers = _attentions(node)
    tokens = max((_keys(a, place) for a in readers), default=place.context)
    total = 0
    for tensor in node.args[:2]:
        assert isinstance(tensor, fx.Node)
        kind = tensor.meta["type"]  # [batch, kv_heads, time, head_dim]
        total += _count((kind.shape[1], kind.shape[3])) * tokens * kind.dtype.itemsize
    return total


def _attentions(node: fx.Node) -> list[fx.Node]:
    """The attentions that read a cache, through whatever reshapes and repeats its tensors."""
    found: list[fx.Node] = []
    seen: set[fx.Node] = set()
    stack = list(node.users)
    while stack:
        user = stack.pop()
        if user in seen or user.target is aten.linear.default:
            continue
        seen.add(user)
        if user.target is ATTENTION:
            found.append(user)
        else:
            stack += user.users
    return found


def _recurrence_flops(node: fx.Node, place: Place) -> int:
    if place.resolve(argument(node, "active")) is False:
        return 0
    rule, options, (heads, kv_heads, d_k, d_v) = _mixer(node, place)
    return find_rule(rule).flops(options, heads, kv_heads, d_k, d_v)


def _recurrence_state(node: fx.Node, place: Place) -> int:
    if place.resolve(argument(node, "active")) is False:
        return 0
    rule, options, (_, kv_heads, d_k, d_v) = _mixer(node, place)
    # tokens that have come and are not written yet
    waiting = min(int(place.resolve(argument(node, "delay"))), place.context)
    held = 0
    for tensor in (*node.args[1:3], *node.args[3]):  # type: ignore[misc]
        kind = tensor.meta["type"]  # [batch, kv_heads, time, ...]
        held += _count((kind.shape[1], *kind.shape[3:])) * kind.dtype.itemsize
    return find_rule(rule).state_bytes(options, kv_heads, d_k, d_v) + waiting * held


def _mixer(node: fx.Node, place: Place) -> tuple[str, str, tuple[int, ...]]:
    """The name, options and sizes of a recurrence."""
    rule, options = (str(place.resolve(argument(node, name))) for name in ("rule", "options"))
    q, k, v = (_shape(a) for a in node.args[:3])
    return rule, options, tuple(_count((d,)) for d in (q[1], k[1], q[3], v[3]))


register(ATTENTION, flops=_attention)
register(ATTENTION_MASS, flops=_mass)
register(RECURRENCE, flops=_recurrence_flops, state=_recurrence_state)
# what is run from both ends cannot be continued, so it keeps nothing
register(BIDIRECTIONAL, flops=lambda node, place: 2 * _recurrence_flops(node, place))
register(CACHE, state=_cache)
