"""Replace an attention by a mixer on its queries, keys and values, and windowed attention."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from reroll.errors import PassError
from reroll.mixers import Mixer, make
from reroll.mixers.feature_maps import FEATURE_MAPS
from reroll.mixers.registry import find
from reroll.passes.linearize import combining
from reroll.passes.linearize.attention_calls import Reach
from reroll.passes.linearize.gates import Projections, liger_gate
from reroll.passes.linearize.linearized_attention import LinearizedAttention, before_rotary
from reroll.rewrite.analysis.layers import per_trip
from reroll.rewrite.ir.builder import Builder
from reroll.rewrite.ir.matching import argument, shape
from reroll.rewrite.ir.ops import BIDIRECTIONAL, RECURRENCE
from reroll.rewrite.ir.weights import Expr, build
from reroll.rewrite.ir.weights.expressions import DTYPE_NAMES, Meta, dtype_from_name
from reroll.rewrite.ir.weights.registry import weight_function

Combine = Literal["disjoint", "joint", "sum"]
Gates = Literal["learned", "calibrated", "clustered", "liger", "liger-code"]


@dataclass(frozen=True)
class Design:
    """Options of `linearize` that say what replaces an attention."""

    mixer: str
    mixer_options: Mapping[str, Any]
    gates: Gates
    feature_map: Feature
    rotary: bool
    combine: Combine
    mix: float
    reach: Reach

    @property
    def has_gain(self) -> bool:
        """Whether the mixer has a gain; a normalisation of its own would cancel it."""
        if self.combine == "disjoint":
            return True
        return (self.combine == "joint") == (self.reach.window > 0)

    @property
    def logs(self) -> bool:
        """Whether the mixer gives the log of its sum of weights, to share with a window."""
        shared = self.combine == "joint" and self.reach.window > 0
        return shared and find(self.mixer).divides == "log_mass"

    @property
    def slots(self) -> int:
        """Number of slots of the mixer's state; 0 if it has none."""
        mixer: Any = make(self.mixer, self.mixer_options)
        return mixer.slots if mixer.has_slots else 0

    def insert(self, attention: LinearizedAttention, projections: Projections) -> fx.Node:
        """Insert a mixer and combine it with the attention; return the mixer's node.

        The attention itself is left as it is; `combining.confine` restricts it to its window.
        """
        old, users = attention.node, list(attention.node.users)
        with attention.graph.inserting_before(old):
            mixed = self._recurrence(attention, projections)
        if self.combine == "joint":
            if self.reach.window:
                result = combining.joint(attention, mixed, self.logs)
            else:
                result = combining.alone(attention, mixed)
        elif self.combine == "sum" and self.reach.window:
            result = combining.weighted(attention, mixed, self.mix)
        else:
            result = combining.disjoint(attention, mixed)
        for user in users:
            user.replace_input_with(old, result)
        return mixed

    def _recurrence(self, attention: LinearizedAttention, projections: Projections) -> fx.Node:
        """Add the mixer's node, whose output is [batch, time, heads, d_v]."""
        q, k = attention.q, attention.k
        if not self.rotary:
            q, k = before_rotary(q), before_rotary(k)
        q = mapped(attention, q, self.feature_map, "q")
        k = mapped(attention, k, self.feature_map, "k")
        mixer, v = self._mixer(attention), attention.v
        d_v = attention.d_v + (self.combine == "joint")
        gates = self._gates(attention, mixer, (int(shape(k)[3]), d_v), projections)
        if self.combine == "joint":
            # a channel of ones: the mixer's output in it is the sum of its weights
            v = Builder(attention.graph).trace(lambda v: F.pad(v, (0, 1), value=1.0), v)
        delay = self.reach.delay(attention.causal) if self.combine != "sum" else 0
        kwargs: dict[str, Any] = {
            "padding": argument(attention.node, "padding"),
            "delay": delay,
            "skip": self.reach.sinks if delay else 0,
            "active": per_trip(attention.layer.loop, "recurrent", attention.active),
        }
        return Builder(attention.graph, attention.layer.loop).call(
            RECURRENCE if attention.causal else BIDIRECTIONAL,
            *(q, k, v, gates, self.mixer, mixer.text()),
            **{name: v for name, v in kwargs.items() if v not in (None, 0) and v is not True},
        )

    def _mixer(self, attention: LinearizedAttention) -> Mixer:
        options, known = dict(self.mixer_options), find(self.mixer).options()
        normalises = find(self.mixer).divides == "normalise"
        if self.logs:
            options["log_mass"] = True
            if not attention.causal:
                raise PassError(
                    f"{self.mixer} divides each direction by a sum of its own",
                    where=attention.node.name,
                    hint="use combine=disjoint",
                )
        if self.feature_map == "none" and not normalises:
            options.setdefault("scale", float(argument(attention.node, "scale")))
        else:
            options.setdefault("scale", 1.0)
        if self.feature_map != "none" and "feature_map" in known:
            # the pass applies its map already; the mixer's own would be a second one
            options.setdefault("feature_map", "none")
        if normalises and self.combine == "joint":
            options["normalise"] = False
        elif normalises and not attention.causal:
            raise PassError(
                f"{self.mixer} divides by a sum over both directions, which is combine=joint",
                where=attention.node.name,
                hint="add combine=joint",
            )
        return make(self.mixer, options)

    def _gates(
        self,
        attention: LinearizedAttention,
        mixer: Mixer,
        sizes: tuple[int, int],
        projections: Projections,
    ) -> list[fx.Node]:
        gates = []
        for gate in mixer.gates(*sizes):
            if self.gates in ("learned", "calibrated"):
                gates.append(projections.gate(attention, gate))
            elif self.gates == "clustered":
                gates.append(projections.clustered(attention, gate))
            else:
                variant = "paper" if self.gates == "liger" else "code"
                gates.append(liger_gate(attention, mixer, gate, variant))
        return gates


# ---- feature maps of queries and keys


Feature = Literal["none", "softmax", "elu", "relu", "hedgehog"]


@weight_function(
    lambda count, size, dtype: Meta((count, size, size), dtype_from_name(dtype)), arithmetic=False
)
def identities(count: int, size: int, dtype: str) -> Tensor:
    """Return `count` identity matrices, [count, size, size]."""
    return torch.eye(size, dtype=dtype_from_name(dtype)).repeat(count, 1, 1)


def mapped(attention: LinearizedAttention, x: fx.Node, feature: Feature, name: str) -> fx.Node:
    """Apply a feature map to queries or keys [batch, heads, time, size]; `name` is "q" or "k"."""
    if feature == "none":
        return x
    features = FEATURE_MAPS[feature]
    builder = Builder(attention.graph)
    if feature != "hedgehog":
        return builder.trace(lambda x: features(x).to(x.dtype), x)
    type_ = x.meta["type"]
    heads, size = int(type_.shape[1]), int(type_.shape[3])

    def start(layer: int) -> Expr:
        del layer
        return build("identities", heads, size, DTYPE_NAMES[type_.dtype])

    # the paper's projection, per head
    weight = attention.new_weight(f"{name}_features", (heads, size, size), start)
    return builder.trace(lambda x, w: features(torch.matmul(x, w)).to(x.dtype), x, weight)
