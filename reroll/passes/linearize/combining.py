"""How what a window sees and what a mixer holds become one output.

With o the window's output, m what its softmax divides by, y the mixer's output and g a gain:

    disjoint   o + g y
    joint      (m o + g y) / (m + g z), where z is the sum of the mixer's weights
               or w o + (1 - w) y, w = m / (m + g z), with a mixer that divides by z and gives log z
    sum        (1 - mix) o + mix y

and without a window g y, or y / z.
"""

from __future__ import annotations

import torch
from torch import Tensor, fx

from reroll.passes.linearize.sites import Site
from reroll.rewrite.analysis.layers import per_trip
from reroll.rewrite.ir.builder import Builder
from reroll.rewrite.ir.ops import ATTENTION_MASS
from reroll.rewrite.ir.weights import zeros

MUL, ADD = torch.ops.aten.mul.Tensor, torch.ops.aten.add.Tensor

# under a sum of weights, which is 0 where no feature is active
FLOOR = 1e-6


def joined(window: Tensor, mass: Tensor, mixed: Tensor, gain: Tensor) -> Tensor:
    """What a window [batch, time, heads, size] and a mixer give under one normalisation.

    `mass` [batch, time, heads] is what the window divides by; `mixed` has one channel more, the sum
    of the mixer's weights. Those are multiplied by `gain` [heads].
    """
    mass, gain = mass.unsqueeze(-1), gain.float().unsqueeze(-1)
    values, weights = mixed[..., :-1].float() * gain, mixed[..., -1:].float() * gain
    return ((window.float() * mass + values) / (mass + weights)).to(window.dtype)


def merged(window: Tensor, log_mass: Tensor, mixed: Tensor, gain: Tensor) -> Tensor:
    """The same of two means over keys, by the logs of what each divides by.

    `log_mass` [batch, time, heads] is the window's; the last channel of `mixed` is the mixer's.
    """
    mine = mixed[..., -1:].float() + gain.float().clamp(min=FLOOR).log().unsqueeze(-1)
    part = (log_mass.unsqueeze(-1) - mine).sigmoid()
    values = mixed[..., :-1].float()
    return (values + part * (window.float() - values)).to(window.dtype)


def normalised(mixed: Tensor) -> Tensor:
    """What a mixer alone gives, divided by the sum of its weights, which is its last channel."""
    wide = mixed.float()
    return (wide[..., :-1] / wide[..., -1:].clamp(min=FLOOR)).to(mixed.dtype)


def times_heads(x: Tensor, gain: Tensor) -> Tensor:
    """A factor per head on [batch, time, heads, size]."""
    return x * gain.unsqueeze(-1)


# ---- in the graph: each puts its result behind an attention, and returns its node


def disjoint(site: Site, mixed: fx.Node) -> fx.Node:
    """The window's output, and the mixer's with a gain."""
    with site.graph.inserting_before(site.node):
        gained = Builder(site.graph).trace(times_heads, mixed, _gain(site))
    return site.after(site.node, ADD, (site.node, gained))


def joint(site: Site, mixed: fx.Node, logs: bool) -> fx.Node:
    """Both under one normalisation; `logs` says that the mixer gives the log of its mass."""
    with site.graph.inserting_before(site.node):
        gain = _gain(site)
    site.mass = _mass(site, logs)
    with site.graph.inserting_before(site.mass.next):
        unite = merged if logs else joined
        return Builder(site.graph).trace(unite, site.node, site.mass, mixed, gain)


def alone(site: Site, mixed: fx.Node) -> fx.Node:
    """The mixer under its own normalisation, beside an attention that is left where it is not."""
    with site.graph.inserting_before(site.node):
        divided = Builder(site.graph).trace(normalised, mixed)
    return site.after(site.node, ADD, (site.node, divided))


def weighted(site: Site, mixed: fx.Node, mix: float) -> fx.Node:
    """Both, with weights that add up to one."""
    loop, active = site.layer.loop, site.active
    window = [1 - mix if a else 1.0 for a in active]
    left = site.after(site.node, MUL, (site.node, per_trip(loop, "window_part", window)))
    mixer = [mix if a else 0.0 for a in active]
    right = site.after(mixed, MUL, (mixed, per_trip(loop, "mixer_part", mixer)))
    return site.after(left, ADD, (left, right))


def confine(site: Site, window: int, sinks: int) -> None:
    """Let the attention see only its window, or take it out if none of it is left."""
    if not window and all(site.active):
        (total,) = site.node.users
        total.replace_all_uses_with(total.args[1])  # type: ignore[arg-type]
        return
    prefix = (sinks or None) if window else None
    site.layer.set("window", dict.fromkeys(site.chosen, window))
    site.layer.set("prefix", dict.fromkeys(site.chosen, prefix))
    if site.mass is not None:
        _look_alike(site.mass, site.node)


def _gain(site: Site) -> fx.Node:
    """A new weight with a factor per head, 0 until somebody writes it."""
    zero = zeros((site.heads,), site.dtype)
    gain = site.new_weight("gain", (site.heads,), lambda _: zero)
    site.gain = str(gain.target)
    return gain


def _mass(site: Site, log: bool) -> fx.Node:
    """The node of what an attention divides by, behind it, or of its log."""
    q, k, _, scale = site.node.args[:4]
    kwargs = {**site.node.kwargs, **({"log": True} if log else {})}
    build = Builder(site.graph, site.layer.loop)
    with build.after(site.node):
        return build.call(ATTENTION_MASS, q, k, scale, **kwargs)


def _look_alike(mass: fx.Node, attention: fx.Node) -> None:
    """Give the mass the arguments that the attention has."""
    q, k, _, scale = attention.args[:4]
    log = {name: value for name, value in mass.kwargs.items() if name == "log"}
    mass.args, mass.kwargs = (q, k, scale), dict(attention.kwargs) | log
