"""Initialize gates from the look-back distance and the entropy of each head's attention.

After Taylor-Calibrate (arXiv 2606.16429): a head's decay has the half-life of its mean look-back
distance, and its write strength follows from the entropy of its attention.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from reroll.passes.linearize.attention_calls import AttentionCall, Reach, attention_calls
from reroll.passes.linearize.gates import Start
from reroll.rewrite.analysis.layers import AttentionLayer
from reroll.rewrite.ir.program import Program
from reroll.rewrite.pipeline.base import Context

# bounds of half-lives in tokens: shorter than a token, or longer than any text, is noise
SHORTEST, LONGEST = 1.0, 65536.0


@dataclass
class _Sums:
    """Sums over tokens, for each query head of one layer."""

    distance: Tensor | float = 0.0
    mass: Tensor | float = 0.0
    entropy: Tensor | float = 0.0
    count: int = 0


def measure_starts(
    program: Program,
    layers: Sequence[AttentionLayer],
    inputs: Sequence[Mapping[str, Tensor]],
    reach: Reach,
    context: Context,
) -> dict[int, Start]:
    """Measure half-lives and write strengths of the key-value heads of every layer."""
    sums: dict[int, _Sums] = {}
    kv_heads: dict[int, int] = {}
    for call in attention_calls(program, layers, inputs, context):
        kv_heads[call.number] = call.k.shape[1]
        _add_call(sums.setdefault(call.number, _Sums()), call, reach)
    return {n: _start(s, kv_heads[n]) for n, s in sums.items()}


def _add_call(sums: _Sums, call: AttentionCall, reach: Reach) -> None:
    q = call.q
    time = q.shape[2]
    at = torch.arange(time)
    weights, age = call.weights(), reach.ages(time, call.causal)
    old = weights.masked_fill(age < 0, 0.0)
    sums.distance = sums.distance + (old * age).sum((0, 2, 3))
    sums.mass = sums.mass + old.sum((0, 2, 3))
    # number of tokens each query attends to, plus one so that its log is not 0
    count = at + 2 if call.causal else torch.full_like(at, time + 1)
    entropy = -(weights * weights.clamp(min=1e-9).log()).sum(-1) / count.log()
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
