"""Observe the inputs and outputs of a program's attentions on a sample of text.

Calibration measures on them: every attention gets the inputs that it has in the original.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from reroll.rewrite.analysis.layers import AttentionLayer
from reroll.rewrite.analysis.samples import rows_of
from reroll.rewrite.capture.raising.attention import ARGUMENTS
from reroll.rewrite.ir.program import Program
from reroll.rewrite.pipeline.base import Context

LENGTH = 512


@dataclass(frozen=True)
class Reach:
    """Tokens that a mixer reads: all but those of the window and the first `sinks`.

    The window is the last `window` tokens. Where attention is not causal, it is all tokens at a
    distance of at most `window`; 0 is no window.
    """

    window: int
    sinks: int

    def delay(self, causal: bool) -> int:
        """Return by how many tokens a mixer's writes are delayed, so that it skips the window."""
        return self.window if causal or not self.window else self.window + 1

    def ages(self, time: int, causal: bool) -> Tensor:
        """Return for how many tokens each query's mixer has held each key, [time, time], or -1.

        A key enters the state when it leaves the window, at age 0.
        """
        at = torch.arange(time)
        distance = at[:, None] - at[None, :]
        age = (distance if causal else distance.abs()) - self.delay(causal)
        return age.masked_fill((age < 0) | (at[None, :] < self.sinks), -1)


def samples(program: Program, context: Context, count: int) -> list[Mapping[str, Tensor]] | None:
    """Return up to `count` samples of the user's text as inputs; None if there is no text."""
    if context.is_large(program):
        return None
    tokens, length = context.tokens(program), min(LENGTH, program.origin.positions or LENGTH)
    if tokens is None or tokens.numel() < 2 * length // 4:
        return None
    return rows_of(program, tokens, length, least=length // 4)[:count]


@dataclass(frozen=True)
class AttentionCall:
    """Arguments and output of one attention for one input.

    `number` is that of its layer, `options` has its other arguments by name, and `mixed` is the
    output of its mixer, if it has one.
    """

    number: int
    q: Tensor
    k: Tensor
    v: Tensor
    scale: float
    options: Mapping[str, Any]
    out: Tensor
    mixed: Tensor | None = None

    @property
    def causal(self) -> bool:
        """Whether the attention is causal."""
        return bool(self.options["causal"])

    def weights(self) -> Tensor:
        """Compute the attention weights of all queries and keys, [batch, heads, time, time]."""
        time = self.q.shape[2]
        k = self.k.repeat_interleave(self.q.shape[1] // self.k.shape[1], 1)
        scores = self.q @ k.mT * self.scale
        if self.causal:
            at = torch.arange(time)
            scores = scores.masked_fill(at[None, :] > at[:, None], -torch.inf)
        return scores.softmax(-1)


def attention_calls(
    program: Program,
    layers: Sequence[AttentionLayer],
    inputs: Sequence[Mapping[str, Tensor]],
    context: Context,
    mixers: Mapping[fx.Node, fx.Node] | None = None,
) -> Iterator[AttentionCall]:
    """Yield arguments and outputs of the attentions of `layers`, input by input, layer by layer.

    `mixers` maps an attention to its mixer's node, which runs before it.
    """
    numbers = {layer.node: layer.numbers for layer in layers}
    owner = {mixer: node for node, mixer in (mixers or {}).items()}
    for done, each in enumerate(inputs):
        context.progress(done, len(inputs), "calibrating")
        calls: list[AttentionCall] = []
        beside: dict[fx.Node, Tensor] = {}

        def keep(
            name: str,
            trip: int | None,
            node: fx.Node,
            args: tuple[Any, ...],
            out: Any,
            calls: list[AttentionCall] = calls,
            beside: dict[fx.Node, Tensor] = beside,
        ) -> None:
            del name
            if node in owner:
                beside[owner[node]] = out
            elif node in numbers:
                number = numbers[node][trip or 0]
                q, k, v, scale = args[:4]
                options = dict(zip(ARGUMENTS[4:], args[4:], strict=True))
                mixed = beside.pop(node, None)
                calls.append(AttentionCall(number, q, k, v, scale, options, out, mixed))

        context.outputs(program, each, fast=False, observe=keep)
        yield from calls
