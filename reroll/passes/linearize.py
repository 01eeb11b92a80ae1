"""Linearize: attention becomes a gated linear recurrence, often beside a window."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, fx

from reroll.errors import PassError, UsageError
from reroll.mixers import Mixer, make
from reroll.mixers.registry import find
from reroll.passes.linearization.features import Feature, mapped
from reroll.passes.linearization.gates import Projections, liger_gate
from reroll.passes.linearization.sites import Site, before_rotary, site_of
from reroll.rewrite.inserting import insert
from reroll.rewrite.layers import attention_layers, per_trip
from reroll.rewrite.passes.base import Context, Pass, option
from reroll.rewrite.passes.selection import Keep, Layers, choose, ranges
from reroll.rewrite.patterns import Miss, nearest
from reroll.rewrite.program import Program
from reroll.rewrite.raising.matching import argument, shape
from reroll.rewrite.weight_edit import WeightEditor
from reroll.rewrite.weights import Expr, full

RECURRENCE = torch.ops.reroll.recurrence.default
MUL, ADD = torch.ops.aten.mul.Tensor, torch.ops.aten.add.Tensor

Value = int | float | bool | str | None


class Linearize(Pass):
    """Let a token mixer with a state of constant size do the work of attention.

    The mixer reads the queries, keys and values that the attention reads: after norms, biases and
    the rotary embedding, or before the latter with `rotary=false`. With `window`, softmax attention
    stays for the last tokens and the first `sinks`, in the same layers; `combine` says how the two
    come together:

    - `disjoint`: the mixer sees only what the window does not, so its tokens are delayed; it is
      added with a gain per head, a new weight that starts as `gain`. At gain 0 the model starts
      as the pass `window` would leave it.
    - `sum`: both see everything that they can, weighted with 1 - mix and mix: Liger (arXiv
      2503.01496), equation 8.

    Without a window the mixer is alone, times a gain that starts as 1.

    `gates`: `liger` makes them of the key projection with no new weights, as the paper says, and
    `liger-code` as its released code does; `learned` makes them by low-rank projections of the
    layer's input, at the start constant for each head. State is kept per key-value head.

    Layers that see only a window already stay as they are unless `layers` names them. Nothing here
    is trained, and what comes out needs to be: a model in which too many layers are linearized
    gives words without sense before that.
    """

    name = "linearize"
    contract = "approximate"

    mixer: str = option("retention", help="which token mixer: see reroll.mixers")
    mixer_options: dict[str, Value] = option({}, help="options of the mixer")
    gates: Literal["learned", "liger", "liger-code"] = option(
        "learned", help="where the mixer's gates come from"
    )
    feature_map: Feature = option("none", help="what queries and keys go through first")
    rotary: bool = option(True, help="whether they have their rotary embedding")
    window: int = option(64, help="how many of the last tokens softmax attention sees; 0 for none")
    sinks: int = option(4, help="how many of the first tokens it sees beside them")
    combine: Literal["disjoint", "sum"] = option(
        "disjoint", help="how the window and the mixer come together"
    )
    mix: float = option(0.5, help="the mixer's part in a sum, from 0 to 1")
    gain: float | None = option(
        None, help="factor on the mixer at the start; by default 0 beside a window and 1 without"
    )
    rank: int = option(16, help="rank of learned gates")
    layers: Layers = option("all", help="numbers of the layers to change")
    keep: Keep = option(None, help="layers that stay: their numbers, or a period such as 7")

    def check(self) -> None:
        for name, least in (("window", 0), ("sinks", 0), ("rank", 1)):
            if getattr(self, name) < least:
                raise UsageError(f"{name} is {least} or more", f"pass linearize, option {name}")
        if not 0 <= self.mix <= 1:
            raise UsageError("mix is from 0 to 1", "pass linearize, option mix")
        find(self.mixer)

    def run(self, program: Program, context: Context) -> Program:
        layers = attention_layers(program)
        count = 1 + max((n for layer in layers for n in layer.numbers), default=-1)
        chosen = set(choose(count, self.layers, self.keep, self.name))
        edit = WeightEditor(program)
        done: list[int] = []
        misses: list[Miss] = []
        for layer in layers:
            near = {
                n
                for n, w in zip(layer.numbers, layer.values("window"), strict=True)
                if w is not None and self.layers == "all"
            }
            own = tuple(n for n in layer.numbers if n in chosen - near)
            site = site_of(layer, own, edit)
            if isinstance(site, Miss):
                misses.append(site)
            elif own:
                self._rewrite(site, context)
                done += own
        if not done:
            why = nearest(misses) if misses else "all see windows already"
            raise PassError(
                f"no attention can be linearized: {why}",
                hint="causal attention can; name layers that see a window already with layers=[..]",
            )
        context.remark(self._summary(done))
        return edit.result()

    def _summary(self, done: list[int]) -> str:
        beside = f" beside a window of {self.window} and {self.sinks} sinks" if self.window else ""
        return f"layers {ranges(done)} are {self.mixer}{beside}, gates {self.gates}"

    def _rewrite(self, site: Site, context: Context) -> None:
        graph, layer = site.graph, site.layer
        with graph.inserting_before(site.node):
            mixed = self._recurrence(site, context)
            old = site.node
            users = list(old.users)
            if not self.window and all(site.active):
                result = self._gained(site, mixed)
            elif self.window and self.combine == "sum":
                result = self._sum(site, mixed)
            else:
                gained = self._gained(site, mixed)
                result = _node_after(old, ADD, (old, gained), site)
        for user in users:
            user.replace_input_with(old, result)
        windows = dict.fromkeys(site.chosen, self.window)
        prefixes = dict.fromkeys(site.chosen, (self.sinks or None) if self.window else None)
        if self.window or not all(site.active):
            layer.set("window", windows)
            layer.set("prefix", prefixes)

    def _recurrence(self, site: Site, context: Context) -> fx.Node:
        """The mixer's node, [batch, time, heads, d_v]."""
        q, k = site.q, site.k
        if not self.rotary:
            q, k = before_rotary(q), before_rotary(k)
        q, k = mapped(site, q, self.feature_map, "q"), mapped(site, k, self.feature_map, "k")
        mixer = self._mixer(site)
        gates = self._gates(site, mixer, int(shape(k)[3]), context)
        delay = self.window if self.window and self.combine == "disjoint" else 0
        kwargs: dict[str, Any] = {
            "padding": argument(site.node, "padding"),
            "delay": delay,
            "skip": self.sinks if delay else 0,
            "active": per_trip(site.layer.loop, "recurrent", site.active),
        }
        node = site.graph.call_function(
            RECURRENCE,
            (q, k, site.v, gates, self.mixer, mixer.text()),
            {name: v for name, v in kwargs.items() if v not in (None, 0) and v is not True},
        )
        node.meta["type"] = site.node.meta["type"]
        return node

    def _mixer(self, site: Site) -> Mixer:
        options = dict(self.mixer_options)
        if "scale" not in options and self.feature_map == "none":
            options["scale"] = float(argument(site.node, "scale"))
        elif "scale" not in options:
            options["scale"] = 1.0
        return make(self.mixer, options)

    def _gates(self, site: Site, mixer: Mixer, d_k: int, context: Context) -> list[fx.Node]:
        made = []
        projections = Projections(self.rank, context.seed)
        for gate in mixer.gates(d_k, site.d_v):
            if self.gates == "learned":
                made.append(projections.gate(site, gate))
            else:
                variant = "paper" if self.gates == "liger" else "code"
                made.append(liger_gate(site, mixer, gate, variant))
        return made

    def _gained(self, site: Site, mixed: fx.Node) -> fx.Node:
        start = self.gain
        if start is None:
            start = 0.0 if self.window else 1.0
        dtype = site.dtype

        def make_gain(layer: int) -> Expr:
            del layer
            return full((site.heads,), start, dtype)

        gain = site.new_weight("gain", (site.heads,), make_gain)
        return insert(site.graph, _times_heads, [mixed, gain])

    def _sum(self, site: Site, mixed: fx.Node) -> fx.Node:
        loop, active = site.layer.loop, site.active
        parts = [
            (
                site.node,
                per_trip(loop, "window_part", [1 - self.mix if a else 1.0 for a in active]),
            ),
            (mixed, per_trip(loop, "mixer_part", [self.mix if a else 0.0 for a in active])),
        ]
        left, right = (_node_after(x, MUL, (x, part), site) for x, part in parts)
        return _node_after(left, ADD, (left, right), site)


def _times_heads(x: Tensor, gain: Tensor) -> Tensor:
    """A factor per head on [batch, time, heads, size]."""
    return x * gain.unsqueeze(-1)


def _node_after(after: fx.Node, target: Any, args: tuple[Any, ...], site: Site) -> fx.Node:
    with site.graph.inserting_after(after):
        node = site.graph.call_function(target, args)
    node.meta["type"] = site.node.meta["type"]
    return node
