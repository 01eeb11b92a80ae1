"""Hidden states of a depth loop on calibration inputs, and how much each layer changes them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, fx

from reroll.errors import ProgramError
from reroll.rewrite.analysis.context import Context
from reroll.rewrite.analysis.samples import random_inputs, rows_of, token_input
from reroll.rewrite.ir.program import Loop, Program

TOKENS = 512
LENGTH = 128
SHORTEST = 8
IMAGES = 8


def hidden_states(
    program: Program, loop: Loop, context: Context, *, tokens: int = TOKENS, length: int = LENGTH
) -> Tensor:
    """Return a loop's hidden states before each trip and after the last, in fp32.

    The shape is [trips + 1, tokens, width]. They are computed on the calibration text, cut into
    rows of `length` tokens, or on random tokens or images where there is no text.
    """
    returned: Any = loop.body.graph.output_node().args[0]
    values = values_of(program, [loop.carry[0], returned[0]], context, tokens=tokens, length=length)
    return torch.cat([values[loop.carry[0]][None, 0], values[returned[0]]])


def values_of(
    program: Program,
    nodes: Sequence[fx.Node],
    context: Context,
    *,
    tokens: int = TOKENS,
    length: int = LENGTH,
) -> dict[fx.Node, Tensor]:
    """Compute the values of nodes on calibration inputs, in fp32.

    The shape is [trips, tokens, width], with one trip for nodes outside of loops.
    """
    while True:
        try:
            return _values(program, nodes, context, tokens, length)
        except ProgramError:
            # a model with a table of positions takes no more tokens than that has rows
            if length <= SHORTEST or token_input(program) is None:
                raise
            length //= 2


def calibration_inputs(
    program: Program, context: Context, tokens: int, length: int
) -> list[Mapping[str, Tensor]]:
    """Return rows of the calibration text, or of random tokens without one, or random images."""
    if token_input(program) is None:
        return [random_inputs(program, rows=1, seed=seed) for seed in range(IMAGES)]
    ids, _ = context.some_tokens(program, tokens)
    return rows_of(program, ids[:tokens], length)


def _values(
    program: Program,
    nodes: Sequence[fx.Node],
    context: Context,
    tokens: int,
    length: int,
) -> dict[fx.Node, Tensor]:
    inputs = calibration_inputs(program, context, tokens, length)
    values: dict[fx.Node, dict[int, list[Tensor]]] = {node: {} for node in nodes}

    def observe(
        name: str, trip: int | None, node: fx.Node, args: tuple[Any, ...], result: Any
    ) -> None:
        if node in values:
            values[node].setdefault(trip or 0, []).append(result.float().flatten(0, -2))

    for number, each in enumerate(inputs):
        context.progress(number, len(inputs), "hidden states")
        context.outputs(program, each, observe=observe)
    return {
        node: torch.stack([torch.cat(trips[trip]) for trip in sorted(trips)])
        for node, trips in values.items()
    }


def cosine(a: Tensor, b: Tensor) -> float:
    """Compute the mean cosine similarity of two sets of vectors [tokens, width]."""
    return torch.cosine_similarity(a, b, dim=-1).mean().item()


def block_influence(states: Tensor) -> list[float]:
    """Compute 1 - cos of each layer's input and output (ShortGPT, arXiv 2403.03853)."""
    return [1 - cosine(a, b) for a, b in pairwise(states)]


def angular_distance(states: Tensor, start: int, stop: int) -> float:
    """Compute arccos(cos) / pi of the input of layer `start` and the output of layer `stop - 1`.

    The Unreasonable Ineffectiveness of the Deeper Layers (arXiv 2403.17887), equation 7.
    """
    return math.acos(min(1.0, max(-1.0, cosine(states[start], states[stop])))) / math.pi


def flattest(states: Tensor, starts: Sequence[int], count: int) -> int:
    """Return the start of the run of `count` layers with the least angular distance."""
    return min(starts, key=lambda start: angular_distance(states, start, start + count))
