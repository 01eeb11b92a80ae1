"""The op set of the intermediate representation: the few idioms that passes reason about.

Everything else in a Program stays plain ATen. Each op is a `torch.library` custom op, so that
`torch.export` and `torch.compile` keep it whole; its body here is the reference that defines it, in
the arithmetic of transformers' eager attention, and `reroll.runtime` runs faster forms of it.

The one op that is not a tensor function is `loop`: the depth loop, whose body is a graph of its
own.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from reroll.rewrite.ir.recurrence import bidirectional, recurrence

__all__ = ["bidirectional", "recurrence"]

NAMESPACE = "reroll"


@torch.library.custom_op(f"{NAMESPACE}::mask", mutates_args=())
def mask(
    padding: Tensor | None,
    batch: int,
    q_length: int,
    kv_length: int,
    q_offset: int,
    causal: bool,
    window: int | None,
    chunk: int | None,
    blocks: Tensor | None,
    dtype: torch.dtype,
    prefix: int | None = None,
) -> Tensor:
    """The additive attention mask: 0 where a query may see a key, else the lowest finite value.

    Position `i` of the queries stands at `q_offset + i` of the keys. `causal`: no key after the
    query. `window`: with `causal` the last `window` keys including the query's own, without it the
    keys at a distance of at most `window`. `chunk`: only keys of the query's own chunk, counted
    from the first token that is not padding. `blocks` [batch, kv_length]: tokens with the same
    number of 0 or more see each other in both directions, whatever the rest says. `prefix`: the
    first so many tokens that are not padding stay in sight of all that causality lets see them,
    whatever window and chunk say (attention sinks, arXiv 2309.17453). `padding` [batch, kv_length]
    is 0 at keys that nobody sees.

    Returns [batch, 1, q_length, kv_length] of `dtype`.
    """
    q = torch.arange(q_length)[:, None] + q_offset
    kv = torch.arange(kv_length)[None, :]
    if padding is not None:
        q, kv = q.to(padding.device), kv.to(padding.device)
    keep = visible(q, kv, causal, window)[None, None].expand(batch, 1, -1, -1)
    if chunk is not None:
        first = torch.zeros(batch, dtype=torch.long, device=q.device)
        if padding is not None:
            first = (padding.bool().cumsum(-1) == 0).sum(-1)
        first = first[:, None, None, None]
        keep = keep & ((kv - first) // chunk == (q - first) // chunk)
    if prefix is not None:
        keep = keep | (in_prefix(padding, kv[0], prefix) & visible(q, kv, causal, None))
    if blocks is not None:
        of_query = blocks[:, q_offset : q_offset + q_length, None]
        same = (of_query == blocks[:, None, :kv_length]) & (of_query >= 0)
        keep = keep | same[:, None]
    if padding is not None:
        keep = keep & padding[:, None, None, :kv_length].bool()
    return torch.where(keep, torch.zeros((), dtype=dtype), torch.finfo(dtype).min).contiguous()


@mask.register_fake
def _(
    padding: Tensor | None,
    batch: int,
    q_length: int,
    kv_length: int,
    q_offset: int,
    causal: bool,
    window: int | None,
    chunk: int | None,
    blocks: Tensor | None,
    dtype: torch.dtype,
    prefix: int | None = None,
) -> Tensor:
    device = padding.device if padding is not None else None
    return torch.empty(batch, 1, q_length, kv_length, dtype=dtype, device=device)


def visible(q: Tensor, kv: Tensor, causal: bool, window: int | None) -> Tensor:
    """Which keys at positions `kv` a query at position `q` may see (the two broadcast)."""
    if causal:
        seen = kv <= q
        return seen if window is None else seen & (kv > q - window)
    if window is None:
        return (kv >= 0) & (q >= 0)
    return ((q - kv).abs() <= window) & (window > 0)


def in_prefix(padding: Tensor | None, kv: Tensor, prefix: int) -> Tensor:
    """Which of the keys at positions `kv` [keys] are among the first `prefix` that are not padding.

    Returns [batch or 1, 1, 1, keys]; `padding` is over all tokens from the first on.
    """
    if padding is None:
        return (kv < prefix)[None, None, None]
    number = padding.long().cumsum(-1)[:, kv.clamp(max=padding.shape[1] - 1)]
    return (number <= prefix)[:, None, None]


@torch.library.custom_op(f"{NAMESPACE}::cache", mutates_args=())
def cache(k: Tensor, v: Tensor, length: int | None = None) -> tuple[Tensor, Tensor]:
    """The state of one attention: the keys and values of all tokens so far.

    `k`, `v`: [batch, kv_heads, time, head_dim] of the new tokens. The lowered module appends them
    to the cache of the running generation; here, without one, they are all there is. `length` is
    the number of tokens there will be, known while capturing.
    """
    if length is not None and length != k.shape[-2]:
        raise ValueError(f"the reference of {NAMESPACE}::cache has no past: run the lowered module")
    return k.clone(), v.clone()


@cache.register_fake
def _(k: Tensor, v: Tensor, length: int | None = None) -> tuple[Tensor, Tensor]:
    if length is None:
        return torch.empty_like(k), torch.empty_like(v)
    return (
        k.new_empty(*k.shape[:-2], length, k.shape[-1]),
        v.new_empty(*v.shape[:-2], length, v.shape[-1]),
    )


@torch.library.custom_op(f"{NAMESPACE}::attention", mutates_args=())
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
    """Softmax attention over grouped heads.

    `q`: [batch, heads, time, head_dim]; `k`: [batch, kv_heads, kv_time, head_dim]; `v` likewise
    with its own head_dim. Scores are `q k^T * scale`, bounded to `softcap * tanh(scores /
    softcap)`, plus `bias` (anything that broadcasts to [batch, heads, time, kv_time]). `causal`,
    `window`, `chunk`, `blocks`, `padding` and `prefix` mean what they mean in `mask`, with the
    queries at the end of the keys.
    `sinks` [heads] are logits that take part in the normalisation and carry no value.

    Returns [batch, time, heads, v_head_dim]: zeros where a window is 0 and there is no prefix.
    """
    if window == 0 and not prefix:
        return q.new_zeros(q.shape[0], q.shape[2], q.shape[1], v.shape[-1])
    scores = _scores(
        q, k, scale, causal, window, chunk, softcap, sinks, bias, padding, blocks, prefix
    )
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
    causal: bool,
    window: int | None,
    chunk: int | None,
    softcap: float | None,
    sinks: Tensor | None,
    bias: Tensor | None,
    padding: Tensor | None,
    blocks: Tensor | None,
    prefix: int | None,
) -> Tensor:
    """What the softmax of an attention is over: [batch, heads, time, keys], sinks in a last one."""
    groups = q.shape[1] // k.shape[1]
    if groups > 1:
        k = k.repeat_interleave(groups, 1)
    scores = torch.matmul(q, k.transpose(2, 3)) * scale
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    if bias is not None:
        scores = scores + bias
    if causal or window is not None or chunk or padding is not None or blocks is not None:
        length, kv_length = q.shape[2], k.shape[2]
        scores = scores + mask(
            padding, q.shape[0], length, kv_length, kv_length - length,
            causal, window, chunk, blocks, scores.dtype, prefix,
        )  # fmt: skip
    if sinks is not None:
        column = sinks.reshape(1, -1, 1, 1).expand(q.shape[0], -1, q.shape[2], -1)
        scores = torch.cat([scores, column], dim=-1)
    return scores


@attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, scale: float, *_: object, **__: object) -> Tensor:
    return q.new_empty(q.shape[0], q.shape[2], q.shape[1], v.shape[-1])


def mass_of(scores: Tensor, log: bool) -> Tensor:
    """`attention_mass` of scores [..., time, keys]: [..., time]."""
    if log:
        return scores.logsumexp(-1)
    highest = scores.max(dim=-1, keepdim=True).values.detach()
    return (scores - highest).exp().sum(-1)


@torch.library.custom_op(f"{NAMESPACE}::attention_mass", mutates_args=())
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
    """What the softmax of an attention divides by: the sum of exp(score - highest score).

    The arguments are those of `attention`; with `log` it is the log of the sum of exp(score)
    instead. Returns [batch, time, heads] in fp32.
    """
    scores = _scores(
        q, k, scale, causal, window, chunk, softcap, sinks, bias, padding, blocks, prefix
    ).float()
    return mass_of(scores, log).transpose(1, 2).contiguous()


@attention_mass.register_fake
def _(q: Tensor, k: Tensor, scale: float, *_: object, **__: object) -> Tensor:
    return q.new_empty(q.shape[0], q.shape[2], q.shape[1], dtype=torch.float32)


@torch.library.custom_op(f"{NAMESPACE}::widen", mutates_args=())
def widen(x: Tensor) -> Tensor:
    """`x` in fp32, whatever the dtype of the program.

    Stands where a model asks for fp32 itself. In a program in fp32 it says which conversions to
    fp32 are of this kind; the others are to the dtype of the program.
    """
    return x.to(torch.float32, copy=True)


@widen.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x, dtype=torch.float32)


@torch.library.custom_op(f"{NAMESPACE}::rms_norm", mutates_args=())
def rms_norm(x: Tensor, weight: Tensor | None, eps: float, offset: float = 0.0) -> Tensor:
    """RMS norm: x / sqrt(mean(x^2) + eps) * (offset + weight), over the last dimension, in fp32.

    Zhang and Sennrich, 2019 (arXiv 1910.07467), equation 4. `offset` is 1 where the stored weight
    is the distance from one.
    """
    wide = x.float()
    normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    if weight is not None:
        normed = normed * (weight.float() + offset)
    return normed.to(x.dtype)


@rms_norm.register_fake
def _(x: Tensor, weight: Tensor | None, eps: float, offset: float = 0.0) -> Tensor:
    return torch.empty_like(x)


@torch.library.custom_op(f"{NAMESPACE}::rope", mutates_args=())
def rope(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False) -> Tensor:
    """Rotary position embedding (Su et al., 2021, arXiv 2104.09864, equation 34).

    `cos`, `sin` broadcast to `x` in all but the last dimension, whose size R says how many of the
    leading channels of `x` turn; the rest pass. Channel pairs are (i, i + R/2), or (2i, 2i + 1)
    when `interleaved`.
    """
    size = cos.shape[-1]
    turned, rest = x[..., :size], x[..., size:]
    if interleaved:
        quarter = torch.stack((-turned[..., 1::2], turned[..., ::2]), dim=-1).flatten(-2)
    else:
        quarter = torch.cat((-turned[..., size // 2 :], turned[..., : size // 2]), dim=-1)
    turned = turned * cos + quarter * sin
    return torch.cat((turned, rest), dim=-1) if rest.shape[-1] else turned.contiguous()


@rope.register_fake
def _(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@torch.library.custom_op(f"{NAMESPACE}::glu", mutates_args=())
def glu(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """Gated linear unit: activation(gate) * up (Shazeer, 2020, arXiv 2002.05202)."""
    return activate(gate, activation) * up


@glu.register_fake
def _(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    return torch.empty_like(gate)


def activate(x: Tensor, activation: str) -> Tensor:
    """The activation functions that `glu` knows, by name."""
    if activation == "silu":
        return F.silu(x)
    if activation == "gelu":
        return F.gelu(x)
    if activation == "gelu_tanh":
        return F.gelu(x, approximate="tanh")
    if activation == "relu":
        return F.relu(x)
    if activation == "sigmoid":
        return torch.sigmoid(x)
    raise ValueError(f"unknown activation {activation!r}")


@torch.library.custom_op(f"{NAMESPACE}::exit", mutates_args=())
def exit(done: Tensor, score: Tensor, threshold: float) -> Tensor:
    """Which tokens [batch, time] are done: those that were, and those whose score is higher.

    Stands in the body of a loop, with a threshold for each trip; at an infinite one nobody leaves,
    and what is computed for the score alone need not be computed. The score has the shape of
    `done`.
    """
    return done | (score > threshold)


@exit.register_fake
def _(done: Tensor, score: Tensor, threshold: float) -> Tensor:
    return torch.empty_like(done)


@torch.library.custom_op(f"{NAMESPACE}::hold", mutates_args=())
def hold(done: Tensor, old: Tensor, new: Tensor) -> Tensor:
    """`old` [batch, time, width] where a token is done [batch, time], and `new` where it is not."""
    return torch.where(done[..., None], old, new)


@hold.register_fake
def _(done: Tensor, old: Tensor, new: Tensor) -> Tensor:
    return torch.empty_like(new)


@torch.library.custom_op(f"{NAMESPACE}::streak", mutates_args=())
def streak(token: Tensor, last: Tensor, count: Tensor, threshold: float) -> tuple[Tensor, Tensor]:
    """The token that was predicted last, and how often in a row it was predicted before.

    All are [batch, time]. At an infinite threshold there is no exit, and both stay as they were.
    """
    if threshold == float("inf"):
        return last.clone(), count.clone()
    return token.clone(), torch.where(token == last, count + 1, 0)


@streak.register_fake
def _(token: Tensor, last: Tensor, count: Tensor, threshold: float) -> tuple[Tensor, Tensor]:
    return torch.empty_like(last), torch.empty_like(count)


# what `mark_keys` adds to the scores, before the scale, of a key that is not there: enough that its
# weight is 0, and not too much for fp16
ABSENT = -3e4


@torch.library.custom_op(f"{NAMESPACE}::mark_keys", mutates_args=())
def mark_keys(k: Tensor, absent: Tensor) -> Tensor:
    """Keys [batch, kv_heads, time, head_dim + 1] that nobody reads where `absent` [batch, time].

    The last channel is `ABSENT` there and 0 elsewhere; queries have a 1 in theirs. So a cache holds
    with its keys which of its tokens are there.
    """
    mark = absent.to(k.dtype)[:, None, :, None] * ABSENT
    return torch.cat((k, mark.expand(-1, k.shape[1], -1, -1)), -1)


@mark_keys.register_fake
def _(k: Tensor, absent: Tensor) -> Tensor:
    return k.new_empty(*k.shape[:-1], k.shape[-1] + 1)


@torch.library.custom_op(f"{NAMESPACE}::exit_linear", mutates_args=())
def exit_linear(
    x: Tensor, depth: Tensor, stops: list[int], weights: list[Tensor], biases: list[Tensor]
) -> Tensor:
    """A product with one of several matrices for each token, by how deep it went.

    `x` [batch, time, in]; `weights` [out, in] and `biases` [out], of which there may be none. A
    token of depth `stops[i]` ([batch, time] in `depth`) takes those numbered i + 1, any other the
    first. Returns [batch, time, out].
    """
    out = F.linear(x, weights[0], biases[0] if biases else None)
    for number, stop in enumerate(stops, 1):
        own = F.linear(x, weights[number], biases[number] if biases else None)
        out = torch.where((depth == stop)[..., None], own, out)
    return out


@exit_linear.register_fake
def _(
    x: Tensor, depth: Tensor, stops: list[int], weights: list[Tensor], biases: list[Tensor]
) -> Tensor:
    return x.new_empty(*x.shape[:-1], weights[0].shape[0])


def loop(body: str, carry: tuple[Any, ...], inputs: tuple[Any, ...], trips: int) -> tuple[Any, ...]:
    """The depth loop: runs the Program's body of this name `trips` times.

    The body's first placeholders take the `carry`, which each trip returns for the next one. Each
    further placeholder takes one of `inputs`: a value that is the same for all trips, or a tuple
    with one value per trip. Weights of the body are stacked in the Program's table: each names the
    entry that a trip uses. Returns the last trip's carry.
    """
    raise RuntimeError("a loop is run by the lowered module, not by the graph alone")


# what the nodes of a graph call
MASK = torch.ops.reroll.mask.default
CACHE = torch.ops.reroll.cache.default
ATTENTION = torch.ops.reroll.attention.default
ATTENTION_MASS = torch.ops.reroll.attention_mass.default
WIDEN = torch.ops.reroll.widen.default
RMS_NORM = torch.ops.reroll.rms_norm.default
ROPE = torch.ops.reroll.rope.default
GLU = torch.ops.reroll.glu.default
EXIT = torch.ops.reroll.exit.default
HOLD = torch.ops.reroll.hold.default
STREAK = torch.ops.reroll.streak.default
MARK_KEYS = torch.ops.reroll.mark_keys.default
EXIT_LINEAR = torch.ops.reroll.exit_linear.default
RECURRENCE = torch.ops.reroll.recurrence.default
BIDIRECTIONAL = torch.ops.reroll.bidirectional.default
