"""Softmax attention and its normaliser."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from reroll.rewrite.ir.matching import shape
from reroll.rewrite.ir.ops.base import Place, count, register
from reroll.rewrite.ir.visibility import Visibility


@torch.library.custom_op("reroll::attention", mutates_args=())
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    causal: bool = False,
    window: int | None = None,
    chunk: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    bias: Tensor | None = None,
    padding: Tensor | None = None,
    blocks: Tensor | None = None,
    prefix: int | None = None,
) -> Tensor:
    """Compute softmax attention over grouped heads.

    `q`: [batch, heads, time, head_dim]; `k`: [batch, kv_heads, kv_time, head_dim]; `v` likewise
    with its own head_dim. Scores are `q k^T * scale`, bounded to `softcap * tanh(scores /
    softcap)`, plus `bias` (anything that broadcasts to [batch, heads, time, kv_time]). `sinks`
    [heads] are logits that take part in the normalisation and carry no value. The other arguments
    determine which keys a query sees (`Visibility`); the queries are the last tokens of the keys.

    Returns [batch, time, heads, v_head_dim]: zeros where a window is 0 and there is no prefix.
    """
    visibility = Visibility(causal, window, chunk, padding, blocks, prefix)
    if visibility.is_empty:
        return q.new_zeros(q.shape[0], q.shape[2], q.shape[1], v.shape[-1])
    scores = _scores(q, k, scale, visibility, softcap, sinks, bias)
    groups = q.shape[1] // k.shape[1]
    if groups > 1:
        v = v.repeat_interleave(groups, 1)
    if sinks is not None:
        scores = scores - scores.max(dim=-1, keepdim=True).values
        weights = F.softmax(scores, dim=-1, dtype=scores.dtype)[..., :-1]
    else:
        weights = F.softmax(scores, dim=-1, dtype=torch.float32).to(q.dtype)
    return torch.matmul(weights, v).transpose(1, 2).contiguous()


def _scores(
    q: Tensor,
    k: Tensor,
    scale: float,
    visibility: Visibility,
    softcap: float | None,
    sinks: Tensor | None,
    bias: Tensor | None,
) -> Tensor:
    """Compute the scores before the softmax: [batch, heads, time, keys], sinks as a last key."""
    groups = q.shape[1] // k.shape[1]
    if groups > 1:
        k = k.repeat_interleave(groups, 1)
    scores = torch.matmul(q, k.transpose(2, 3)) * scale
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    if bias is not None:
        scores = scores + bias
    if visibility.causal or visibility.is_limited:
        q_length, keys = q.shape[2], k.shape[2]
        at = torch.arange(q_length, device=q.device) + keys - q_length
        scores = scores + visibility.added(at, keys, scores.dtype)
    if sinks is not None:
        column = sinks.reshape(1, -1, 1, 1).expand(q.shape[0], -1, q.shape[2], -1)
        scores = torch.cat([scores, column], dim=-1)
    return scores


@attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, scale: float, *_: object, **__: object) -> Tensor:
    return q.new_empty(q.shape[0], q.shape[2], q.shape[1], v.shape[-1])


def mass_of(scores: Tensor, log: bool) -> Tensor:
    """Compute `attention_mass` of scores [..., time, keys]: [..., time]."""
    if log:
        return scores.logsumexp(-1)
    highest = scores.max(dim=-1, keepdim=True).values.detach()
    return (scores - highest).exp().sum(-1)


@torch.library.custom_op("reroll::attention_mass", mutates_args=())
def attention_mass(
    q: Tensor,
    k: Tensor,
    scale: float,
    causal: bool = False,
    window: int | None = None,
    chunk: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    bias: Tensor | None = None,
    padding: Tensor | None = None,
    blocks: Tensor | None = None,
    prefix: int | None = None,
    log: bool = False,
) -> Tensor:
    """Compute the normaliser of an attention's softmax: the sum of exp(score - highest score).

    The arguments are those of `attention`; with `log` it is the log of the sum of exp(score)
    instead. Returns [batch, time, heads] in fp32.
    """
    visibility = Visibility(causal, window, chunk, padding, blocks, prefix)
    scores = _scores(q, k, scale, visibility, softcap, sinks, bias).float()
    return mass_of(scores, log).transpose(1, 2).contiguous()


@attention_mass.register_fake
def _(q: Tensor, k: Tensor, scale: float, *_: object, **__: object) -> Tensor:
    return q.new_empty(q.shape[0], q.shape[2], q.shape[1], dtype=torch.float32)


ATTENTION = torch.ops.reroll.attention.default
ATTENTION_MASS = torch.ops.reroll.attention_mass.default


def _attention(node: fx.Node, place: Place) -> int:
    q, k, v = (shape(a) for a in node.args[:3])
    rows = count((*q[:1], *q[1:3]))  # [batch, heads, time]
    return 2 * rows * keys_seen(node, place) * (count(q[-1:]) + count(v[-1:])) if k else 0


def _mass(node: fx.Node, place: Place) -> int:
    q = shape(node.args[0])
    return 2 * count((*q[:1], *q[1:3])) * keys_seen(node, place) * count(q[-1:])


def keys_seen(node: fx.Node, place: Place) -> int:
    """Return the maximum number of keys that one query of an attention sees."""
    length = shape(node.args[1])[2]
    keys = length if isinstance(length, int) else place.context
    return Visibility.of(node).map(place.resolve).most_keys(keys)


register(ATTENTION, flops=_attention)
register(ATTENTION_MASS, flops=_mass)
