"""Linearize: attention becomes a gated linear recurrence, often beside a window."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from statistics import median
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from reroll.errors import PassError, UsageError
from reroll.mixers import Mixer, make
from reroll.mixers.registry import find
from reroll.passes.linearization.calibrate import (
    Reach,
    joined,
    least_joint,
    least_squares,
    measure_gains,
    measure_starts,
    samples,
)
from reroll.passes.linearization.features import Feature, mapped
from reroll.passes.linearization.gates import Projections, Start, liger_gate
from reroll.passes.linearization.sites import Site, before_rotary, site_of
from reroll.rewrite.inserting import insert
from reroll.rewrite.layers import Layer, attention_layers, per_trip
from reroll.rewrite.passes.base import Context, Pass, option
from reroll.rewrite.passes.keeping import keep_by_measure
from reroll.rewrite.passes.selection import Keep, Layers, choose, measured_part, ranges
from reroll.rewrite.patterns import Miss, nearest
from reroll.rewrite.program import Program, TensorType
from reroll.rewrite.raising.matching import argument, shape
from reroll.rewrite.weight_edit import WeightEditor
from reroll.rewrite.weights import cast, concat, full, zeros

RECURRENCE = torch.ops.reroll.recurrence.default
MASS = torch.ops.reroll.attention_mass.default
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
    - `joint`: as `disjoint`, under one normalisation: LoLCATs (arXiv 2410.10254), equation 6. What
      the mixer gives is weighted by the sum of its own weights times the gain, which takes features
      that are not negative; their part of the whole shrinks what the window gives.
    - `sum`: both see everything that they can, weighted with 1 - mix and mix: Liger (arXiv
      2503.01496), equation 8.

    Without a window the mixer is alone, times a gain that starts as 1.

    `gates`: `liger` makes them of the key projection with no new weights, as the paper says, and
    `liger-code` as its released code does; `learned` makes them by low-rank projections of the
    layer's input, at the start constant for each head; `calibrated` are learned ones that start
    from what the attention does on the user's text (arXiv 2606.16429), and so do gains that are not
    given. State is kept per key-value head.

    Layers that see only a window already stay as they are unless `layers` names them. Nothing here
    is trained, and what comes out needs to be: a model in which too many layers are linearized
    gives words without sense before that.
    """

    name = "linearize"
    contract = "approximate"

    mixer: str = option("retention", help="which token mixer: see reroll.mixers")
    mixer_options: dict[str, Value] = option({}, help="options of the mixer")
    gates: Literal["learned", "calibrated", "liger", "liger-code"] = option(
        "learned", help="where the mixer's gates come from"
    )
    feature_map: Feature = option("none", help="what queries and keys go through first")
    rotary: bool = option(True, help="whether they have their rotary embedding")
    window: int = option(64, help="how many of the last tokens softmax attention sees; 0 for none")
    sinks: int = option(4, help="how many of the first tokens it sees beside them")
    combine: Literal["disjoint", "joint", "sum"] = option(
        "disjoint", help="how the window and the mixer come together"
    )
    mix: float = option(0.5, help="the mixer's part in a sum, from 0 to 1")
    gain: float | None = option(
        None, help="factor on the mixer at the start; by default 0 beside a window and 1 without"
    )
    rank: int = option(16, help="rank of learned gates")
    samples: int = option(8, help="pieces of 512 tokens of the text to calibrate on")
    layers: Layers = option("all", help="numbers of the layers to change")
    keep: Keep = option(
        None,
        help='layers that stay: numbers, a period such as 7, or a part by measurement, "auto:0.25"',
    )

    def check(self) -> None:
        for name, least in (("window", 0), ("sinks", 0), ("rank", 1), ("samples", 1)):
            if getattr(self, name) < least:
                raise UsageError(f"{name} is {least} or more", f"pass linearize, option {name}")
        if not 0 <= self.mix <= 1:
            raise UsageError("mix is from 0 to 1", "pass linearize, option mix")
        if self.combine == "joint" and (not self.window or self.feature_map == "none"):
            raise UsageError(
                "one normalisation takes a window and a feature map",
                "pass linearize, option combine",
                "such as window=64, feature_map=hedgehog",
            )
        find(self.mixer)

    def run(self, program: Program, context: Context) -> Program:
        layers = attention_layers(program)
        count = 1 + max((n for layer in layers for n in layer.numbers), default=-1)
        chosen = set(choose(count, self.layers, self.keep, self.name))
        part = measured_part(self.keep, self.name)
        if part is not None:
            chosen -= set(self._kept(program, layers, chosen, part, context))
        sites = self._sites(program, layers, chosen)
        done = sorted(n for site in sites for n in site.chosen)
        text = None
        if self.gates == "calibrated":
            text = samples(program, context, self.samples)
            if text is None:
                context.remark("no text to calibrate on: gates start as with gates=learned")
        reach = Reach(self.window, self.sinks if self.window else 0)
        starts = measure_starts(program, layers, text, reach, context) if text else {}
        projections = Projections(self.rank, context.seed, starts)
        mixers = {site.node: self._insert(site, projections) for site in sites}
        gains: dict[int, Tensor] = {}
        if text and self.gain is None and self._has_gain():
            # the attentions are still the original's, and gains are zero: so are all inputs
            exact = self._with_gains(sites, gains).result()
            least = least_joint if self.combine == "joint" and self.window else least_squares
            measured = measure_gains(exact, mixers, layers, text, reach, context, least)
            gains, explained = measured
            context.remark(_calibrated(starts, explained, done))
        edit = self._with_gains(sites, gains)
        for site in sites:
            self._confine(site)
        context.remark(self._summary(done))
        return edit.result()

    def _sites(self, program: Program, layers: list[Layer], chosen: set[int]) -> list[Site]:
        """What there is to linearize; raises PassError, with the reason, if that is nothing."""
        edit = WeightEditor(program)
        sites: list[Site] = []
        misses: list[Miss] = []
        for layer in layers:
            windows = zip(layer.numbers, layer.values("window"), strict=True)
            near = {n for n, w in windows if w is not None and self.layers == "all"}
            own = tuple(n for n in layer.numbers if n in chosen - near)
            site = site_of(layer, own, edit)
            if isinstance(site, Miss):
                misses.append(site)
            elif own:
                sites.append(site)
        if not sites:
            why = nearest(misses) if misses else "all see windows already"
            raise PassError(
                f"no attention can be linearized: {why}",
                hint="causal attention can; name layers that see a window already with layers=[..]",
            )
        return sites

    def _kept(
        self, program: Program, layers: list[Layer], chosen: set[int], part: float, context: Context
    ) -> list[int]:
        """The layers whose linearization, untrained, would change the output most."""
        sites = self._sites(program, layers, chosen)
        quiet = replace(context, remarks=[], report_progress=None)
        gates = "learned" if self.gates == "calibrated" else self.gates

        def rewritten(numbers: Collection[int]) -> Program:
            trial = replace(self, layers=sorted(numbers), keep=None, gates=gates)
            return trial.run(program.edit(), quiet)

        eligible = sorted(n for site in sites for n in site.chosen)
        return keep_by_measure(program, eligible, part, rewritten, context)

    def _summary(self, done: list[int]) -> str:
        beside = f" beside a window of {self.window} and {self.sinks} sinks" if self.window else ""
        return f"layers {ranges(done)} are {self.mixer}{beside}, gates {self.gates}"

    def _insert(self, site: Site, projections: Projections) -> fx.Node:
        """Put a mixer beside an attention, and let their sum take its place; returns the mixer."""
        old, users = site.node, list(site.node.users)
        with site.graph.inserting_before(old):
            mixed = self._recurrence(site, projections)
            gain = None
            if self._has_gain():
                zero = zeros((site.heads,), site.dtype)
                gain = site.new_weight("gain", (site.heads,), lambda _: zero)
                site.gain = str(gain.target)
        if gain is None:
            result = self._sum(site, mixed)
        elif self.combine == "joint" and self.window:
            site.mass = _mass(site)
            with site.graph.inserting_before(site.mass.next):
                result = insert(site.graph, joined, [old, site.mass, mixed, gain])
        else:
            with site.graph.inserting_before(old):
                gained = insert(site.graph, _times_heads, [mixed, gain])
            result = site.after(old, ADD, (old, gained))
        for user in users:
            user.replace_input_with(old, result)
        return mixed

    def _has_gain(self) -> bool:
        return not (self.window and self.combine == "sum")

    def _with_gains(self, sites: list[Site], gains: Mapping[int, Tensor]) -> WeightEditor:
        """Write the gains of the layers into their weights: given, measured, or by default."""
        edit = sites[0].edit
        default = 0.0 if self.window else 1.0
        for site in sites:
            if site.gain is None:
                continue
            entries = []
            for number in site.chosen:
                start = default if self.gain is None else self.gain
                values = gains[number].tolist() if number in gains else [start] * site.heads
                parts = [full((1,), float(value), torch.float32) for value in values]
                entries.append(cast(concat(0, parts), site.dtype))
            edit.weights = edit.weights.with_weight(
                site.gain, replace(edit.weights[site.gain], entries=tuple(entries))
            )
        return edit

    def _confine(self, site: Site) -> None:
        """Let the attention see only its window, or take it out if none of it is left."""
        if not self.window and all(site.active):
            (total,) = site.node.users
            total.replace_all_uses_with(total.args[1])  # type: ignore[arg-type]
            return
        prefix = (self.sinks or None) if self.window else None
        site.layer.set("window", dict.fromkeys(site.chosen, self.window))
        site.layer.set("prefix", dict.fromkeys(site.chosen, prefix))
        if site.mass is not None:
            _look_alike(site.mass, site.node)

    def _recurrence(self, site: Site, projections: Projections) -> fx.Node:
        """The mixer's node, [batch, time, heads, d_v]."""
        q, k = site.q, site.k
        if not self.rotary:
            q, k = before_rotary(q), before_rotary(k)
        q, k = mapped(site, q, self.feature_map, "q"), mapped(site, k, self.feature_map, "k")
        mixer = self._mixer(site)
        d_v = site.d_v + (self.combine == "joint")
        gates = self._gates(site, mixer, (int(shape(k)[3]), d_v), projections)
        delay = self.window if self.window and self.combine != "sum" else 0
        v = site.v
        if self.combine == "joint":
            # a channel of ones, which the mixer sums with its weights
            v = insert(site.graph, lambda v: F.pad(v, (0, 1), value=1.0), [v])
        kwargs: dict[str, Any] = {
            "padding": argument(site.node, "padding"),
            "delay": delay,
            "skip": self.sinks if delay else 0,
            "active": per_trip(site.layer.loop, "recurrent", site.active),
        }
        node = site.graph.call_function(
            RECURRENCE,
            (q, k, v, gates, self.mixer, mixer.text()),
            {name: v for name, v in kwargs.items() if v not in (None, 0) and v is not True},
        )
        kind = site.node.meta["type"]
        node.meta["type"] = TensorType(kind.dtype, (*kind.shape[:-1], shape(v)[3]))
        return node

    def _mixer(self, site: Site) -> Mixer:
        options = dict(self.mixer_options)
        if self.feature_map == "none":
            options.setdefault("scale", float(argument(site.node, "scale")))
        else:
            options.setdefault("scale", 1.0)
            if "feature_map" in find(self.mixer).options():
                # one map is enough
                options.setdefault("feature_map", "none")
        return make(self.mixer, options)

    def _gates(
        self, site: Site, mixer: Mixer, sizes: tuple[int, int], projections: Projections
    ) -> list[fx.Node]:
        made = []
        for gate in mixer.gates(*sizes):
            if self.gates in ("learned", "calibrated"):
                made.append(projections.gate(site, gate))
            else:
                variant = "paper" if self.gates == "liger" else "code"
                made.append(liger_gate(site, mixer, gate, variant))
        return made

    def _sum(self, site: Site, mixed: fx.Node) -> fx.Node:
        loop, active = site.layer.loop, site.active
        window = [1 - self.mix if a else 1.0 for a in active]
        left = site.after(site.node, MUL, (site.node, per_trip(loop, "window_part", window)))
        mixer = [self.mix if a else 0.0 for a in active]
        right = site.after(mixed, MUL, (mixed, per_trip(loop, "mixer_part", mixer)))
        return site.after(left, ADD, (left, right))


def _times_heads(x: Tensor, gain: Tensor) -> Tensor:
    """A factor per head on [batch, time, heads, size]."""
    return x * gain.unsqueeze(-1)


def _mass(site: Site) -> fx.Node:
    """The node of what an attention divides by, behind it."""
    with site.graph.inserting_after(site.node):
        node = site.graph.call_function(MASS)
    _look_alike(node, site.node)
    kind = site.node.meta["type"]
    node.meta["type"] = TensorType(torch.float32, kind.shape[:-1])
    return node


def _look_alike(mass: fx.Node, attention: fx.Node) -> None:
    """Give the mass the arguments that the attention has."""
    q, k, _, scale = attention.args[:4]
    mass.args, mass.kwargs = (q, k, scale), dict(attention.kwargs)


def _calibrated(
    starts: Mapping[int, Start], explained: Mapping[int, float], layers: Sequence[int]
) -> str:
    lives = sorted(life for n in layers for life in starts[n].half_life)
    shares = [explained[n] for n in layers]
    return (
        f"half-lives from {lives[0]:.0f} to {lives[-1]:.0f} tokens, median {median(lives):.0f}; "
        f"mixers bring back {sum(shares) / len(shares):.0%} of what is left out, "
        f"from {min(shares):.0%} to {max(shares):.0%} by layer"
    )
