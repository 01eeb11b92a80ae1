"""Combine the output of windowed attention and that of a mixer into one output.

With o the window's output, m the sum of its softmax weights before division, y the mixer's output
and g a gain:

    disjoint   o + g y
    joint      (m o + g y) / (m + g z), where z is the sum of the mixer's weights
               or w o + (1 - w) y, w = m / (m + g z), with a mixer that divides by z and gives log z
    sum        (1 - mix) o + mix y

Without a window the output is g y, or y / z.
"""

from __future__ import annotations

import torch
from torch import Tensor, fx

from reroll.passes.linearize.linearized_attention import LinearizedAttention
from reroll.rewrite.analysis.layers import per_trip
from reroll.rewrite.ir.builder import Builder
from reroll.rewrite.ir.ops import ATTENTION_MASS
from reroll.rewrite.ir.weights import zeros

MUL, ADD = torch.ops.aten.mul.Tensor, torch.ops.aten.add.Tensor

# lower bound of a divisor: a sum of weights is 0 where no feature is active
FLOOR = 1e-6


def joined(window: Tensor, mass: Tensor, mixed: Tensor, gain: Tensor) -> Tensor:
    """Combine outputs of a window [batch, time, heads, size] and a mixer under one normalisation.

    `mass` [batch, time, heads] is the sum that the window's softmax divides by. The last channel of
    `mixed` is the sum of the mixer's weights. All of `mixed` is multiplied by `gain` [heads].
    """
    mass, gain = mass.unsqueeze(-1), gain.float().unsqueeze(-1)
    values, weights = mixed[..., :-1].float() * gain, mixed[..., -1:].float() * gain
    return ((window.float() * mass + values) / (mass + weights)).to(window.dtype)


def merged(window: Tensor, log_mass: Tensor, mixed: Tensor, gain: Tensor) -> Tensor:
    """Combine two outputs that are each normalised already, from the logs of their divisors.

    `log_mass` [batch, time, heads] is the log of the window's divisor; the last channel of `mixed`
    is the log of the mixer's. `gain` [heads] multiplies the mixer's divisor.
    """
    mine = mixed[..., -1:].float() + gain.float().clamp(min=FLOOR).log().unsqueeze(-1)
    part = (log_mass.unsqueeze(-1) - mine).sigmoid()
    values = mixed[..., :-1].float()
    return (values + part * (window.float() - values)).to(window.dtype)


def normalised(mixed: Tensor) -> Tensor:
    """Divide the output of a mixer by the sum of its weights, which is its last channel."""
    wide = mixed.float()
    return (wide[..., :-1] / wide[..., -1:].clamp(min=FLOOR)).to(mixed.dtype)


def times_heads(x: Tensor, gain: Tensor) -> Tensor:
    """Multiply x [batch, time, heads, size] by a factor per head."""
    return x * gain.unsqueeze(-1)


# ---- in the graph: each inserts its result after an attention, and returns its node


def disjoint(attention: LinearizedAttention, mixed: fx.Node) -> fx.Node:
    """Add the mixer's output, times a gain per head, to the window's output."""
    with attention.graph.inserting_before(attention.node):
        gained = Builder(attention.graph).trace(times_heads, mixed, _gain(attention))
    return attention.after(attention.node, ADD, (attention.node, gained))


def joint(attention: LinearizedAttention, mixed: fx.Node, logs: bool) -> fx.Node:
    """Combine window and mixer under one normalisation.

    `logs` says that the mixer's last channel is the log of its sum of weights, not the sum.
    """
    with attention.graph.inserting_before(attention.node):
        gain = _gain(attention)
    attention.mass = _mass(attention, logs)
    with attention.graph.inserting_before(attention.mass.next):
        unite = merged if logs else joined
        return Builder(attention.graph).trace(unite, attention.node, attention.mass, mixed, gain)


def alone(attention: LinearizedAttention, mixed: fx.Node) -> fx.Node:
    """Add the mixer's output, divided by its sum of weights, to the attention's.

    There is no window: `confine` removes the attention, or leaves it to the trips whose layers were
    not chosen, in which the mixer is inactive.
    """
    with attention.graph.inserting_before(attention.node):
        divided = Builder(attention.graph).trace(normalised, mixed)
    return attention.after(attention.node, ADD, (attention.node, divided))


def weighted(attention: LinearizedAttention, mixed: fx.Node, mix: float) -> fx.Node:
    """Add both outputs with weights 1 - mix and mix; other layers keep their attention alone."""
    loop, active = attention.layer.loop, attention.active
    window = [1 - mix if a else 1.0 for a in active]
    left = attention.after(
        attention.node, MUL, (attention.node, per_trip(loop, "window_part", window))
    )
    mixer = [mix if a else 0.0 for a in active]
    right = attention.after(mixed, MUL, (mixed, per_trip(loop, "mixer_part", mixer)))
    return attention.after(left, ADD, (left, right))


def confine(attention: LinearizedAttention, window: int, sinks: int) -> None:
    """Restrict the attention to window and sinks; remove it if no trip needs it."""
    if not window and all(attention.active):
        (total,) = attention.node.users
        total.replace_all_uses_with(total.args[1])  # type: ignore[arg-type]
        return
    prefix = (sinks or None) if window else None
    attention.layer.set("window", dict.fromkeys(attention.chosen, window))
    attention.layer.set("prefix", dict.fromkeys(attention.chosen, prefix))
    if attention.mass is not None:
        _look_alike(attention.mass, attention.node)


def _gain(attention: LinearizedAttention) -> fx.Node:
    """Add a weight with one factor per head to the graph; it is 0 until `Linearize` writes it."""
    zero = zeros((attention.heads,), attention.dtype)
    gain = attention.new_weight("gain", (attention.heads,), lambda _: zero)
    attention.gain = str(gain.target)
    return gain


def _mass(attention: LinearizedAttention, log: bool) -> fx.Node:
    """Add the node, after the attention, that computes its softmax divisor, or the log of it."""
    q, k, _, scale = attention.node.args[:4]
    kwargs = {**attention.node.kwargs, **({"log": True} if log else {})}
    build = Builder(attention.graph, attention.layer.loop)
    with build.after(attention.node):
        return build.call(ATTENTION_MASS, q, k, scale, **kwargs)


def _look_alike(mass: fx.Node, attention: fx.Node) -> None:
    """Give the mass node the same arguments as the attention, so that both have one window."""
    q, k, _, scale = attention.args[:4]
    log = {name: value for name, value in mass.kwargs.items() if name == "log"}
    mass.args, mass.kwargs = (q, k, scale), dict(attention.kwargs) | log
