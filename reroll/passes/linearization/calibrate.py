"""Starting values measured on text: how far back heads look, and how loud a mixer has to be.

After Taylor-Calibrate (arXiv 2606.16429): a head's decay has the half-life of its mean look-back
distance, its write strength follows from the entropy of its attention, and a factor per head brings
what the mixer gives nearest to what the attention gave, by least squares. Everything is measured on
the inputs that the original's layers have.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, fx

from reroll.passes.linearization.gates import Start
from reroll.rewrite.layers import ATTENTION, Layer
from reroll.rewrite.passes.base import Context
from reroll.rewrite.passes.samples import token_inputs
from reroll.rewrite.program import Program
from reroll.rewrite.raising.attention import ARGUMENTS

MASS = torch.ops.reroll.attention_mass.default

LENGTH = 512
# half-lives that are less than a token or more than any text say nothing
SHORTEST, LONGEST = 1.0, 65536.0


@dataclass(frozen=True)
class Reach:
    """The tokens that a mixer sees: not the last `window`, nor the first `sinks`."""

    window: int
    sinks: int

    def hides(self, time: int) -> Tensor:
        """[time, time]: True where a query's mixer does not see a key."""
        at = torch.arange(time)
        distance = at[:, None] - at[None, :]
        return (distance < self.window) | (distance < 0) | (at[None, :] < self.sinks)


def samples(program: Program, context: Context, count: int) -> list[Mapping[str, Tensor]] | None:
    """Up to `count` pieces of the user's text as inputs; None if there is no text to be had."""
    if context.is_large(program):
        return None
    tokens = context.tokens(program)
    if tokens is None or tokens.numel() < 2 * LENGTH // 4:
        return None
    pieces = [p for p in torch.split(tokens, LENGTH) if p.numel() >= LENGTH // 4][:count]
    return [token_inputs(program, piece[None]) for piece in pieces]


@dataclass(frozen=True)
class Seen:
    """What one attention got and gave for one input; `mixed` is what its mixer gave, if any."""

    number: int
    q: Tensor
    k: Tensor
    v: Tensor
    scale: float
    named: Mapping[str, Any]
    out: Tensor
    mixed: Tensor | None


def observed(
    program: Program,
    layers: Sequence[Layer],
    inputs: Sequence[Mapping[str, Tensor]],
    context: Context,
    mixers: Mapping[fx.Node, fx.Node] | None = None,
) -> Iterator[Seen]:
    """What the attentions of `layers` get and give, for each input, layer after layer.

    `mixers` has the mixer's node, which runs before it, of an attention.
    """
    numbers = {layer.node: layer.numbers for layer in layers}
    owner = {mixer: node for node, mixer in (mixers or {}).items()}
    for done, each in enumerate(inputs):
        context.progress(done, len(inputs), "calibrating")
        found: list[Seen] = []
        beside: dict[fx.Node, Tensor] = {}

        def keep(
            name: str,
            trip: int | None,
            node: fx.Node,
            args: tuple[Any, ...],
            out: Any,
            found: list[Seen] = found,
            beside: dict[fx.Node, Tensor] = beside,
        ) -> None:
            del name
            if node in owner:
                beside[owner[node]] = out
            elif node in numbers:
                number = numbers[node][trip or 0]
                q, k, v, scale = args[:4]
                named = dict(zip(ARGUMENTS[4:], args[4:], strict=True))
                mixed = beside.pop(node, None)
                found.append(Seen(number, q, k, v, scale, named, out, mixed))

        context.outputs(program, each, fast=False, observe=keep)
        yield from found


@dataclass
class _Sums:
    """Sums over tokens for the query heads of one layer."""

    distance: Tensor | float = 0.0
    mass: Tensor | float = 0.0
    entropy: Tensor | float = 0.0
    count: int = 0


def measure_starts(
    program: Program,
    layers: Sequence[Layer],
    inputs: Sequence[Mapping[str, Tensor]],
    reach: Reach,
    context: Context,
) -> dict[int, Start]:
    """Half-lives and write strengths of every layer's key-value heads."""
    sums: dict[int, _Sums] = {}
    kv_heads: dict[int, int] = {}
    for seen in observed(program, layers, inputs, context):
        kv_heads[seen.number] = seen.k.shape[1]
        _look_back(sums.setdefault(seen.number, _Sums()), seen, reach)
    return {n: _start(s, kv_heads[n]) for n, s in sums.items()}


def _look_back(sums: _Sums, seen: Seen, reach: Reach) -> None:
    q, k = seen.q, seen.k
    time = q.shape[2]
    at = torch.arange(time)
    scores = q @ k.repeat_interleave(q.shape[1] // k.shape[1], 1).mT * seen.scale
    weights = scores.masked_fill(at[None, :] > at[:, None], -math.inf).softmax(-1)
    old = weights.masked_fill(reach.hides(time), 0.0)
    # a delayed token has been in the state for as long as it is out of the window
    age = (at[:, None] - at[None, :] - max(reach.window, 0)).clamp(min=0)
    sums.distance = sums.distance + (old * age).sum((0, 2, 3))
    sums.mass = sums.mass + old.sum((0, 2, 3))
    entropy = -(weights * weights.clamp(min=1e-9).log()).sum(-1) / (at + 2).log()
    sums.entropy = sums.entropy + entropy.sum((0, 2))
    sums.count += q.shape[0] * time


def _start(sums: _Sums, kv_heads: int) -> Start:
    def grouped(x: Any) -> Tensor:
        groups: Tensor = x.unflatten(0, (kv_heads, -1))
        return groups.sum(1)

    life = grouped(sums.distance) / grouped(sums.mass).clamp(min=1e-6)
    spread = grouped(sums.entropy) / (sums.count * len(sums.entropy) / kv_heads)  # type: ignore[arg-type]
    strength = 0.3 + 0.4 * (1 - spread.clamp(0, 1))
    return Start(life.clamp(SHORTEST, LONGEST).tolist(), strength.tolist())


def measure_gains(
    program: Program,
    pairs: Mapping[fx.Node, fx.Node],
    layers: Sequence[Layer],
    inputs: Sequence[Mapping[str, Tensor]],
    reach: Reach,
    context: Context,
    least: Callable[[Seen, Reach], Errors],
) -> tuple[dict[int, Tensor], dict[int, float]]:
    """For every layer the gain per query head, and how much of what is missing it brings back.

    `pairs` has the mixer's node of each attention, whose arguments are still the original's;
    `least` says what each of a set of gains would miss on one input.
    """
    sums: dict[int, Errors] = {}
    for seen in observed(program, layers, inputs, context, pairs):
        if seen.mixed is not None:
            new, old = least(seen, reach), sums.get(seen.number)
            sums[seen.number] = new if old is None else old.plus(new)
    best = {number: errors.best() for number, errors in sums.items()}
    gains = {number: gain for number, (gain, _) in best.items()}
    explained = {
        n: 1 - float(missed.sum() / sums[n].nothing().sum().clamp(min=1e-12))
        for n, (_, missed) in best.items()
    }
    return gains, explained


class Errors(Protocol):
    """The squared error [heads] of a layer's output as a function of the gain."""

    def plus(self, other: Any) -> Any:
        """The errors over both sets of tokens."""

    def nothing(self) -> Tensor:
        """The error at gain 0."""

    def best(self) -> tuple[Tensor, Tensor]:
        """The gain with the least error, and that error."""


@dataclass
class Quadratic:
    """|missing - gain * mixed|^2."""

    rest: Tensor
    product: Tensor
    square: Tensor

    def plus(self, other: Quadratic) -> Quadratic:
        """The sum of both."""
        return Quadratic(
            self.rest + other.rest, self.product + other.product, self.square + other.square
        )

    def nothing(self) -> Tensor:
        """The error at gain 0."""
        return self.rest

    def best(self) -> tuple[Tensor, Tensor]:
        """The least squares solution, or 0 if that is negative."""
        gain = (self.product / self.square.clamp(min=1e-12)).clamp(min=0.0)
        return gain, self.rest - 2 * gain * self.product + gain.square() * self.square


@dataclass
class Table:
    """The error at each of a number of gains: [gains, heads]."""

    gains: Tensor
    errors: Tensor

    def plus(self, other: Table) -> Table:
        """The sum of both."""
        return Table(self.gains, self.errors + other.errors)

    def nothing(self) -> Tensor:
        """The error at gain 0."""
        return self.errors[0]

    def best(self) -> tuple[Tensor, Tensor]:
        """The gain of the table with the least error."""
        least = self.errors.min(0)
        return self.gains[least.indices], least.values


def least_squares(seen: Seen, reach: Reach) -> Quadratic:
    """What a mixer misses that is added with a gain."""
    assert seen.mixed is not None
    missing = seen.out - (_windowed(ATTENTION, seen, reach) if reach.window else 0.0)

    def total(x: Tensor) -> Tensor:
        return x.sum((0, 1, 3))

    return Quadratic(
        total(missing.square()), total(missing * seen.mixed), total(seen.mixed.square())
    )


def least_joint(seen: Seen, reach: Reach) -> Table:
    """What a mixer misses that shares one normalisation with the window."""
    assert seen.mixed is not None
    window, mass = (_windowed(op, seen, reach) for op in (ATTENTION, MASS))
    gains = torch.cat((torch.zeros(1), torch.logspace(-3, 3, 49)))
    errors = [
        (joined(window, mass, seen.mixed, gain) - seen.out).square().sum((0, 1, 3))
        for gain in gains
    ]
    return Table(gains, torch.stack(errors))


def joined(window: Tensor, mass: Tensor, mixed: Tensor, gain: Tensor) -> Tensor:
    """What a window [batch, time, heads, size] and a mixer give under one normalisation.

    `mass` [batch, time, heads] is what the window divides by; `mixed` has one channel more, the sum
    of the mixer's weights. Those are multiplied by `gain` [heads].
    """
    mass, gain = mass.unsqueeze(-1), gain.float().unsqueeze(-1)
    values, weights = mixed[..., :-1].float() * gain, mixed[..., -1:].float() * gain
    return ((window.float() * mass + values) / (mass + weights)).to(window.dtype)


def _windowed(op: Any, seen: Seen, reach: Reach) -> Tensor:
    """What the attention would give, or divide by, over the window and the first tokens."""
    named = {**seen.named, "causal": True, "window": reach.window, "prefix": reach.sinks or None}
    tensors = (seen.q, seen.k, seen.v) if op is ATTENTION else (seen.q, seen.k)
    with torch.no_grad():
        out: Tensor = op(*tensors, seen.scale, **named)
    return out
