"""Triton kernel: the confidence of a head in its next token, without writing logits to memory.

From hidden states and the vocabulary matrix it computes the highest probability, its lead over the
second, the entropy, and the likeliest token. The vocabulary is split into parts, one for each
program. A program keeps the two highest logits of its part, the sum of exp(l - highest) and that of
l exp(l - highest). The parts are then combined, a few numbers for each row. Such scores decide
exits: CALM (arXiv 2207.07061), section 3.5.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from reroll.kernels.diagonal import number_type


class Confidence(NamedTuple):
    """Confidence of each row's prediction.

    These are the highest probability, its lead over the second, the entropy in nats, and the
    likeliest token.
    """

    highest: Tensor
    lead: Tensor
    entropy: Tensor
    token: Tensor


def confidence_reference(hidden: Tensor, weight: Tensor) -> Confidence:
    """Compute the definition in fp32: hidden [rows, D], weight [vocabulary, D]."""
    log_p = (hidden.float() @ weight.float().T).log_softmax(-1)
    top = log_p.topk(2, -1)
    p = top.values.exp()
    entropy = -(log_p.exp() * log_p).sum(-1)
    return Confidence(p[:, 0], p[:, 0] - p[:, 1], entropy, top.indices[:, 0])


@triton.jit
def confidence_part(
    hidden, weight, numbers, tokens, rows, vocabulary, per_part, h_m,
    D: tl.constexpr, DT: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Compute one part of the vocabulary; grid (parts, blocks of rows).

    Writes numbers [parts, 4, rows] and tokens [parts, rows].
    """
    part, i_m = tl.program_id(0), tl.program_id(1)
    om = i_m * BM + tl.arange(0, BM)
    here = om < rows
    best = tl.full([BM], float("-inf"), dtype=tl.float32)
    second = tl.full([BM], float("-inf"), dtype=tl.float32)
    total = tl.zeros([BM], dtype=tl.float32)
    weighted = tl.zeros([BM], dtype=tl.float32)
    token = tl.zeros([BM], dtype=tl.int32)
    for j in range(per_part):
        on = (part * per_part + j) * BN + tl.arange(0, BN)
        inside = on < vocabulary
        logits = tl.zeros([BM, BN], dtype=tl.float32)
        for i in range(tl.cdiv(D, BK)):
            ok = i * BK + tl.arange(0, BK)
            b_h = tl.load(hidden + om[:, None].to(tl.int64) * h_m + ok[None, :],
                          mask=here[:, None] & (ok < D)[None, :], other=0.0).to(DT)  # fmt: skip
            b_w = tl.load(weight + on[None, :].to(tl.int64) * D + ok[:, None],
                          mask=inside[None, :] & (ok < D)[:, None], other=0.0).to(DT)  # fmt: skip
            logits = tl.dot(b_h, b_w, acc=logits, input_precision=PRECISION)
        masked = tl.where(inside[None, :], logits, float("-inf"))
        high, at = tl.max(masked, axis=1), tl.argmax(masked, axis=1).to(tl.int32)
        others = tl.where(tl.arange(0, BN)[None, :] == at[:, None], float("-inf"), masked)
        second = tl.maximum(tl.maximum(second, tl.max(others, axis=1)), tl.minimum(best, high))
        token = tl.where(high > best, (part * per_part + j) * BN + at, token)
        new = tl.maximum(best, high)
        # a part may begin after the end of the vocabulary, and then has no finite logit
        shift = tl.where(new == float("-inf"), 0.0, new)
        shrink = tl.exp(best - shift)
        p = tl.exp(masked - shift[:, None])
        total = total * shrink + tl.sum(p, axis=1)
        weighted = weighted * shrink + tl.sum(tl.where(inside[None, :], p * logits, 0.0), axis=1)
        best = new
    out = numbers + part * 4 * rows + om
    tl.store(out, best, mask=here)
    tl.store(out + rows, second, mask=here)
    tl.store(out + 2 * rows, total, mask=here)
    tl.store(out + 3 * rows, weighted, mask=here)
    tl.store(tokens + part * rows + om, token, mask=here)


def confidence(
    hidden: Tensor, weight: Tensor, tiles: dict[str, Any], parts: int = 132,
    precision: str = "ieee",
) -> Confidence:  # fmt: skip
    """Compute `confidence_reference`; `tiles` has BM, BN, BK, `parts` is the number of programs."""
    rows, vocabulary = hidden.shape[0], weight.shape[0]
    blocks = triton.cdiv(vocabulary, tiles["BN"])
    per_part = triton.cdiv(blocks, min(parts, blocks))
    parts = triton.cdiv(blocks, per_part)
    numbers = hidden.new_empty(parts, 4, rows, dtype=torch.float32)
    tokens = hidden.new_empty(parts, rows, dtype=torch.int32)
    confidence_part[(parts, triton.cdiv(rows, tiles["BM"]))](
        hidden, weight, numbers, tokens, rows, vocabulary, per_part, hidden.stride(0),
        D=hidden.shape[1], DT=number_type(hidden), PRECISION=precision, **tiles,
    )  # fmt: skip
    best, second, total, weighted = numbers.unbind(1)
    high, part = best.max(0)
    scale = (best - high).exp()
    z = (total * scale).sum(0)
    # the second is that of the best part, or the highest of another part
    others = torch.cat([best.scatter(0, part[None], float("-inf")), second]).max(0).values
    entropy = z.log() + high - (weighted * scale).sum(0) / z
    token = tokens.gather(0, part[None])[0].long()
    return Confidence(1 / z, (1 - (others - high).exp()) / z, entropy, token)
