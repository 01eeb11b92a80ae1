"""Build the gates of a mixer, from the key projection or from new low-rank projections."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, fx

from reroll.errors import PassError
from reroll.mixers import Gate, Mixer
from reroll.mixers.gates import wide
from reroll.passes.linearize.clusters import Clusters
from reroll.passes.linearize.linearized_attention import LINEAR, LinearizedAttention, before_rotary
from reroll.rewrite.ir.builder import Builder
from reroll.rewrite.ir.records import TensorType
from reroll.rewrite.ir.weights import Expr, Source, cast, concat, full, normal, zeros
from reroll.rewrite.ir.weights.expressions import meta_of

# half-lives in tokens where none are measured: those of the first and of the last head
SHORTEST, LONGEST = 32.0, 512.0


@dataclass(frozen=True)
class Start:
    """Initial values of the gates of one layer, for each key-value head.

    `half_life` is in tokens; `strength` is a position in the range of a write gate, from 0 to 1.
    """

    half_life: Sequence[float]
    strength: Sequence[float]

    @classmethod
    def unmeasured(cls, kv_heads: int) -> Start:
        """Return half-lives spread geometrically over heads, as in RetNet, and strengths 0.5."""
        steps = [n / max(kv_heads - 1, 1) for n in range(kv_heads)]
        lives = [SHORTEST * (LONGEST / SHORTEST) ** s for s in steps]
        return cls(lives, [0.5] * kv_heads)


@dataclass
class Projections:
    """Low-rank projections of the layer's input with biases: raw = W2 (W1 x) + b.

    W1 is random and W2 is zero, so that each gate starts as the value that its bias gives. A gate
    that is the same for all tokens is its bias alone.
    `starts` has those constants by layer number, and `clusters` the key clusters of
    `gates=clustered`.
    """

    rank: int
    seed: int
    starts: Mapping[int, Start] = field(default_factory=dict)
    clusters: Mapping[int, Clusters] = field(default_factory=dict)

    def gate(self, attention: LinearizedAttention, gate: Gate) -> fx.Node:
        """Add a gate that is projected from the layer's input: [batch, kv_heads, time, *shape].

        One that is constant is a weight, with 1 in place of batch and time.
        """
        graph, heads = attention.graph, attention.kv_heads
        x = attention.projection().args[0]
        assert isinstance(x, fx.Node)
        type_: TensorType = x.meta["type"]
        width, each = int(type_.shape[-1]), math.prod(gate.shape)
        rank, dtype = min(self.rank, width), type_.dtype

        def down(layer: int) -> Expr:
            seed = _seed(self.seed, layer, gate.name)
            return normal((rank, width), width**-0.5, seed, dtype)

        def up(layer: int) -> Expr:
            if gate.role in ("key", "value"):
                seed = _seed(self.seed, layer, f"{gate.name} up")
                return normal((heads * each, rank), rank**-0.5, seed, dtype)
            return zeros((heads * each, rank), dtype)

        def bias(layer: int) -> Expr:
            start = self.starts.get(layer) or Start.unmeasured(heads)
            parts = [full((each,), raw, torch.float32) for raw in _raw(gate, start)]
            return cast(concat(0, parts), dtype)

        def values(raw: Tensor) -> Tensor:
            return gate.activation(torch.unflatten(raw, -1, (heads, *gate.shape)).transpose(1, 2))

        build, size = Builder(graph), (heads * each,)
        if gate.constant:
            raw = attention.new_weight(gate.name, size, bias)
            return build.trace(lambda raw: values(raw[None, None]), raw)
        weights = [
            attention.new_weight(f"{gate.name}_down.weight", (rank, width), down),
            attention.new_weight(f"{gate.name}_up.weight", (heads * each, rank), up),
            attention.new_weight(f"{gate.name}_up.bias", size, bias),
        ]
        raw = build.call(LINEAR, build.call(LINEAR, x, weights[0]), weights[1], weights[2])
        return build.trace(values, raw)

    def clustered(self, attention: LinearizedAttention, gate: Gate) -> fx.Node:
        """Add log decays of slots [batch, kv_heads, time, slots], from the clusters of keys.

        A slot keeps 1 - p of its content, and e^floor at least; p is as in `clusters`.
        """
        k = before_rotary(attention.k)
        clusters = self.clusters[attention.chosen[0]]

        def measured(part: str, like: Tensor) -> fx.Node:
            def start(layer: int) -> Expr:
                name = f"linearize.clusters.{layer}.{part}"
                return cast(Source(name, meta_of(like)), attention.dtype)

            return attention.new_weight(f"slots.{part}", tuple(like.shape), start)

        def values(k: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
            near = wide(k) @ wide(weight).transpose(1, 2) + wide(bias).unsqueeze(1)
            return (near.softmax(-1) * -most + 1.0).log()

        most = 1.0 if gate.floor is None else -math.expm1(gate.floor)
        parts = [measured("weight", clusters.weight), measured("bias", clusters.bias)]
        return Builder(attention.graph).trace(values, k, *parts)

    def tensors(self) -> dict[str, Tensor]:
        """Return the measured clusters, by the tensor names that weights read them by."""
        return {
            f"linearize.clusters.{layer}.{part}": tensor
            for layer, clusters in self.clusters.items()
            for part, tensor in vars(clusters).items()
        }


def liger_gate(attention: LinearizedAttention, mixer: Mixer, gate: Gate, variant: str) -> fx.Node:
    """Build a gate from the key projection before its rotary embedding: arXiv 2503.01496, table 1.

    `variant` is "paper", or "code" for the released code, which has other constants. Raises
    PassError where Liger has no such gate.
    """
    if variant not in gate.from_key:
        known = ", ".join(gate.from_key) or "none"
        raise PassError(
            f"Liger has no gate {gate.name} for the mixer {mixer.name} in its {variant}",
            where=attention.node.name,
            hint=f"there is: {known}; or use gates=learned",
        )
    return Builder(attention.graph).trace(gate.from_key[variant], before_rotary(attention.k))


def _raw(gate: Gate, start: Start) -> list[float]:
    """Return the raw number of each head at which the gate has its initial value."""
    raws = []
    for life, strength in zip(start.half_life, start.strength, strict=True):
        if gate.role == "decay":
            value = -math.log(2) / life
        elif gate.role == "rate":
            # the write gate, which starts at its strength, is the size of a step
            value = -math.log(2) / life / strength
        elif gate.role == "write" and math.isfinite(gate.high):
            value = max(gate.low, 0.0) + strength * (gate.high - max(gate.low, 0.0))
        elif gate.role == "write":
            value = strength
        else:
            value = None
        raws.append(0.0 if value is None or gate.inverse is None else gate.inverse(value))
    return raws


def _seed(seed: int, layer: int, name: str) -> int:
    """Return the seed of one weight: the same for the same pass, layer and gate."""
    return (seed * 1_000_003 + layer * 8_191 + sum(name.encode())) % 2**31
