"""Softmax attention for the lowered module: PyTorch's fused kernel wherever it can express the op.

The reference is `reroll.rewrite.ir.ops.attention`. The mask here is a boolean tensor that was made
once per forward (see `masks`). It is None where every query may see every key that causality
allows.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from reroll.rewrite.ir.ops import mass_of
from reroll.runtime.functions.bands import Band, attend_band, mass_band

# `_over_scores` holds the scores of this many queries in memory at a time
_QUERY_BLOCK = 1024
# up to this many queries are computed as rows: beyond it, PyTorch's own grouping is as fast
_FEW_QUERIES = 16


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    causal: bool,
    mask: Tensor | Band | None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """Compute attention of `q` over `k` and `v`.

    `q` is [batch, heads, time, head_dim]; `k` and `v` are [batch, kv_heads, keys, ...]. `mask`
    [batch or 1, 1, time or 1, keys] is True where a query may see a key; a floating-point mask is
    added to the scores. Without a mask, `causal` lets query i see the keys up to i. Keys beyond the
    last query are then the unfilled slots of a static cache. Returns [batch, time, heads,
    v_head_dim]; zeros if the mask has no columns.
    """
    length = q.shape[2]
    if isinstance(mask, Band):
        if softcap is None and sinks is None and bias is None:
            return attend_band(q, k, v, scale, mask).transpose(1, 2).contiguous()
        mask = mask.written_out(q.device)
    if mask is not None and mask.shape[-1] == 0:
        return q.new_zeros(q.shape[0], length, q.shape[1], v.shape[-1])
    if mask is None and causal and length > 1:
        k, v = k[:, :, :length], v[:, :, :length]
    else:
        causal = False
    if bias is not None:
        bias = _fit(bias, k.shape[2])
    if softcap is not None or sinks is not None:
        mask = _causal(length, q.device) if causal else mask
        out = _explicit(q, k, v, scale, mask, softcap, sinks, bias)
        return out.transpose(1, 2).contiguous()
    if bias is not None:
        mask, causal = _additive(bias, mask, causal, q), False
    groups = q.shape[1] // k.shape[1]
    if groups > 1 and length <= _FEW_QUERIES and not causal:
        return _as_rows(q, k, v, scale, mask)
    out = F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=causal, scale=scale, enable_gqa=groups > 1
    )
    return out.transpose(1, 2).contiguous()


def _as_rows(q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Tensor | None) -> Tensor:
    """Compute `attend` with the query heads of one KV head as rows of one matrix.

    No key is repeated or read twice, so that few queries cost little more than one.
    """
    (batch, heads, length, size), kv_heads = q.shape, k.shape[1]
    rows = q.reshape(batch, kv_heads, heads // kv_heads * length, size)
    if mask is not None and (mask.shape[1] > 1 or mask.shape[2] > 1):
        mask = mask.expand(-1, heads, length, -1)
        if mask.stride(1):
            mask = mask.reshape(mask.shape[0], kv_heads, rows.shape[2], mask.shape[3])
        else:
            mask = mask[:, :1].repeat(1, 1, heads // kv_heads, 1)
    out = F.scaled_dot_product_attention(rows, k, v, attn_mask=mask, scale=scale)
    out = out.reshape(batch, heads, length, v.shape[3])
    return out.transpose(1, 2).contiguous()


def _fit(bias: Tensor, keys: int) -> Tensor:
    """Fit a bias over all tokens to the keys that a cache returns.

    A cache may return the last keys only, or unfilled slots behind them.
    """
    extra = keys - bias.shape[-1]
    if extra == 0 or bias.shape[-1] == 1:
        return bias
    return F.pad(bias, (0, extra)) if extra > 0 else bias[..., -keys:]


def _additive(bias: Tensor, mask: Tensor | None, causal: bool, q: Tensor) -> Tensor:
    """Combine bias, mask and causality into one additive mask.

    Hidden keys get the lowest finite value, so that queries that see no key give finite outputs.
    """
    bias = bias.to(q.dtype)
    if causal:
        mask = _causal(q.shape[2], q.device)
    bias = _hide(bias, mask)
    return bias[(None,) * (4 - bias.dim())] if bias.dim() < 4 else bias


def _hide(scores: Tensor, mask: Tensor | None) -> Tensor:
    if mask is None:
        return scores
    if mask.dtype == torch.bool:
        # added, as the op defines it: a query that sees no key gets the mean of all values
        lowest = torch.finfo(scores.dtype).min
        mask = torch.zeros(mask.shape, dtype=scores.dtype, device=mask.device).masked_fill(
            ~mask, lowest
        )
    return scores + mask


def _causal(length: int, device: torch.device, keys: int | None = None) -> Tensor:
    at = torch.arange(length, device=device)
    return at[:, None] >= (at if keys is None else torch.arange(keys, device=device))


def _explicit(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    mask: Tensor | None,
    softcap: float | None,
    sinks: Tensor | None,
    bias: Tensor | None,
) -> Tensor:
    """Compute attention from explicit scores: [batch, heads, time, v_head_dim]."""
    groups = q.shape[1] // k.shape[1]
    if groups > 1:
        v = v.repeat_interleave(groups, 1)

    def read(scores: Tensor) -> Tensor:
        return torch.matmul(_weights(scores, q, sinks), v)

    return _over_scores(read, q, k, scale, mask, softcap, sinks, bias)


def _weights(scores: Tensor, q: Tensor, sinks: Tensor | None) -> Tensor:
    """Normalise scores to weights, in the arithmetic of the op; those of sinks are left out."""
    if sinks is None:
        return F.softmax(scores, dim=-1, dtype=torch.float32).to(q.dtype)
    scores = scores - scores.max(dim=-1, keepdim=True).values
    return F.softmax(scores, dim=-1, dtype=scores.dtype)[..., :-1]


def attend_with_weights(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    causal: bool,
    mask: Tensor | Band | None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute `attend`, and its weights [batch, heads, time, keys].

    Keys that a query does not see have weight 0, with unfilled slots of a static cache among them.
    With gradients, the result is computed from the weights, so that these flow through them.
    Without, it is `attend`'s own: whoever only looks at the weights gets the same tokens.
    """
    given = q, k, v, scale, causal, mask, softcap, sinks, bias
    (batch, heads, length, _), keys = q.shape, k.shape[2]
    if isinstance(mask, Band):
        mask = mask.written_out(q.device)
    if mask is not None and mask.shape[-1] == 0:
        out = q.new_zeros(batch, length, heads, v.shape[-1])
        return out, q.new_zeros(batch, heads, length, keys)
    if mask is None and causal and length > 1:
        mask = _causal(length, q.device, keys)
    if bias is not None:
        bias = _fit(bias, keys)
    weights = _over_scores(
        lambda scores: _weights(scores, q, sinks), q, k, scale, mask, softcap, sinks, bias
    )
    if not torch.is_grad_enabled():
        return attend(*given), weights
    out = torch.matmul(weights, v.repeat_interleave(heads // v.shape[1], 1))
    return out.transpose(1, 2).contiguous(), weights


def _over_scores(
    function: Callable[[Tensor], Tensor],
    q: Tensor,
    k: Tensor,
    scale: float,
    mask: Tensor | None,
    softcap: float | None,
    sinks: Tensor | None,
    bias: Tensor | None,
) -> Tensor:
    """Apply a function to the scores [batch, heads, time, keys] of a block of queries at a time.

    `sinks` are a last column of the scores. Results are joined along the time.
    """
    groups = q.shape[1] // k.shape[1]
    if groups > 1:
        k = k.repeat_interleave(groups, 1)
    parts = []
    blocks = (q,) if q.shape[2] <= _QUERY_BLOCK else q.split(_QUERY_BLOCK, 2)
    for number, queries in enumerate(blocks):
        scores = torch.matmul(queries, k.transpose(2, 3)) * scale
        if softcap is not None:
            scores = torch.tanh(scores / softcap) * softcap
        rows = slice(number * _QUERY_BLOCK, (number + 1) * _QUERY_BLOCK)
        if bias is not None:
            scores = scores + (bias[..., rows, :] if bias.shape[-2] > 1 else bias)
        part = mask if mask is None or mask.shape[-2] == 1 else mask[..., rows, :]
        scores = _hide(scores, part)
        if sinks is not None:
            column = sinks.reshape(1, -1, 1, 1).expand(q.shape[0], -1, queries.shape[2], -1)
            scores = torch.cat([scores, column], dim=-1)
        parts.append(function(scores))
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)


def mass(
    q: Tensor,
    k: Tensor,
    scale: float,
    causal: bool,
    mask: Tensor | Band | None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    bias: Tensor | None = None,
    log: bool = False,
) -> Tensor:
    """Compute `reroll.attention_mass` with a mask as in `attend`: [batch, time, heads] in fp32."""
    length = q.shape[2]
    if isinstance(mask, Band):
        if softcap is None and sinks is None and bias is None:
            return mass_band(q, k, scale, mask, log).transpose(1, 2)
        mask = mask.written_out(q.device)
    if mask is None and causal and length > 1:
        k, mask = k[:, :, :length], _causal(length, q.device)
    if bias is not None:
        bias = _fit(bias, k.shape[2])
    masses = _over_scores(
        lambda scores: mass_of(scores.float(), log), q, k, scale, mask, softcap, sinks, bias
    )
    return masses.transpose(1, 2)
