"""Learned classifiers of exits: from hidden states to the logit that a token may leave.

They are functions of tensors, because the pass traces them into a graph and `fit_exits` trains the
same functions. Hidden states `unit` [batch, time, width] come at unit RMS, in fp32.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from reroll.mixers import make

# the mixer that runs the recurrence of `gated`: h_t = f_t h_{t-1} + (1 - f_t) v_t, elementwise
RULE, RULE_OPTIONS = "hgrn2", "{}"


def linear(unit: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Apply one matrix [1, width] (CALM, arXiv 2207.07061): logits [batch, time]."""
    return F.linear(unit, weight, bias).squeeze(-1)


def raised(unit: Tensor, up: Tensor) -> Tensor:
    """Compute the hidden units of `mlp`, [batch, time, units]; `up` is [units, width]."""
    return F.linear(unit, up).relu()


def gates(unit: Tensor, gate: Tensor, bias: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Compute the log decays and values of the recurrence of `gated`, [batch, units, time, 1].

    The minimal gated unit of arXiv 2410.01201, equation 9: both depend on the token alone.
    """
    decay = F.logsigmoid(F.linear(unit, gate, bias))
    new = F.linear(unit, value).tanh()
    return decay.transpose(1, 2)[..., None], new.transpose(1, 2)[..., None]


def read(state: Tensor, unit: Tensor, past: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Compute the logit of `gated` from token and recurrent state [batch, time, units, 1]."""
    return linear(unit, weight, bias) + F.linear(state.squeeze(-1), past).squeeze(-1)


def logits(weights: Mapping[str, Tensor], unit: Tensor) -> Tensor:
    """Compute the logits [batch, time] of a classifier with these weights on whole sequences."""
    score, bias = weights["score.weight"], weights["score.bias"]
    if "up.weight" in weights:
        return linear(raised(unit, weights["up.weight"]), score, bias)
    if "gate.weight" in weights:
        decay, new = gates(
            unit, *(weights[n] for n in ("gate.weight", "gate.bias", "value.weight"))
        )
        ones, mixer = torch.ones_like(new), make(RULE, RULE_OPTIONS)
        state = mixer.chunk(ones, ones, new, [decay])[0]
        return read(state, unit, weights["past.weight"], score, bias)
    return linear(unit, score, bias)
