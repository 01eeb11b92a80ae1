"""HGRN2: the key is what the decay removes, 1 - f.

S_t = diag(f_t) S_{t-1} + (1 - f_t) v_t^T, o_t = q_t S_t: Qin et al., 2024 (arXiv 2404.07904),
equation 9. `k` itself is not read; f = lower_bound + (1 - lower_bound) sigmoid(raw).
"""

from __future__ import annotations

import math

from torch import Tensor

from reroll.bounds import Range
from reroll.mixers.base import Gates, Prepared
from reroll.mixers.core import Core
from reroll.mixers.diagonal import ChannelDiagonal
from reroll.mixers.gates import Gate, log_sigmoid, logit
from reroll.rewrite.pipeline.options import option


class HGRN2(ChannelDiagonal):
    """HGRN2: one decay for each channel, whose complement is the key."""

    name = "hgrn2"
    core = Core("channel", key="forgotten")

    floor: float = option(-5.0, within=Range(below=0), help="log decays below are raised to it")
    lower_bound: float = option(
        0.0,
        within=Range(least=0, below=1),
        help="the least that a channel keeps when its gate is made",
    )

    def gates(self, d_k: int, d_v: int) -> tuple[Gate, ...]:
        gate = Gate(
            name="log_decay",
            role="decay",
            shape=(d_k,),
            high=0.0,
            floor=self.floor,
            activation=self.log_decay,
            inverse=lambda value: logit(
                (math.exp(value) - self.lower_bound) / (1 - self.lower_bound)
            ),
            from_key={"paper": self.log_decay, "code": log_sigmoid},
        )
        return (gate,)

    def log_decay(self, raw: Tensor) -> Tensor:
        """Compute the log of lower_bound + (1 - lower_bound) sigmoid(raw)."""
        if self.lower_bound == 0:
            return log_sigmoid(raw)
        return (self.lower_bound + (1 - self.lower_bound) * log_sigmoid(raw).exp()).log()

    def features(self, d_k: int) -> int:
        return d_k

    def prepare(self, q: Tensor, k: Tensor, v: Tensor, gates: Gates) -> Prepared:
        q, _, v, gates = super().prepare(q, k, v, gates)
        return q, -gates[0].expm1(), v, gates
