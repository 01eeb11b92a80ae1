"""Linearize: replace attention by a gated linear recurrence, often with a softmax window."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from statistics import median

import torch
from torch import Tensor, fx

from reroll.bounds import COUNT, COUNT_OR_NONE, FINITE, SHARE, SIZE
from reroll.errors import PassError, UsageError
from reroll.mixers.registry import find
from reroll.passes.linearize.attention_calls import Reach, samples
from reroll.passes.linearize.clusters import Clusters, measure_clusters
from reroll.passes.linearize.combining import confine
from reroll.passes.linearize.design import Combine, Design, Feature, Gates
from reroll.passes.linearize.gains import least_joint, least_squares, measure_gains
from reroll.passes.linearize.gates import Projections, Start
from reroll.passes.linearize.half_lives import measure_starts
from reroll.passes.linearize.linearized_attention import LinearizedAttention, linearized_attention
from reroll.rewrite.analysis.layers import AttentionLayer
from reroll.rewrite.checkpoint import ChainSource, MemorySource
from reroll.rewrite.ir.hidden import NO_WEIGHTS, WEIGHTS, drop_marks, marked_names
from reroll.rewrite.ir.patterns import Miss, nearest
from reroll.rewrite.ir.program import Program
from reroll.rewrite.ir.weight_edit import WeightEditor
from reroll.rewrite.ir.weights import cast, concat, full
from reroll.rewrite.pipeline.base import Context, option
from reroll.rewrite.pipeline.layerwise import LayerPass
from reroll.rewrite.pipeline.selection import ranges

Value = int | float | bool | str | None


@dataclass(frozen=True)
class Calibration:
    """Measurements on calibration text, by layer number.

    `starts` has the initial values of gates, or `clusters` the key clusters of slots. `gains`
    [heads] has the factors on the mixer's output. `explained` is the share of the attention's
    output beyond the window that the mixer reproduces with them.
    """

    starts: dict[int, Start] = field(default_factory=dict)
    clusters: dict[int, Clusters] = field(default_factory=dict)
    gains: dict[int, Tensor] = field(default_factory=dict)
    explained: dict[int, float] = field(default_factory=dict)


class Linearize(LayerPass):
    """Let a token mixer with a state of constant size do the work of attention.

    The mixer reads the queries, keys and values of the attention, after norms, biases and the
    rotary embedding. With `rotary=false` it reads them before the rotary embedding. That is the
    default with a feature map, of the pass or of the mixer, because a feature map does not commute
    with a rotation. With `window`, softmax attention stays in the same layers for the last tokens
    and the first `sinks`. `combine` says how both outputs are combined:

    - `disjoint`: the mixer reads only tokens outside the window, so its writes are delayed. Its
      output is added with a gain per head, a new weight that starts as `gain`. At gain 0 the model
      starts as the pass `window` would leave it.
    - `joint`: as `disjoint`, under one normalisation: LoLCATs (arXiv 2410.10254), equation 6. The
      mixer's output is weighted by the sum of its own weights times the gain, and reduces the
      window's share. Features must not be negative.
    - `sum`: both read all tokens in their reach; outputs are weighted with 1 - mix and mix: Liger
      (arXiv 2503.01496), equation 8.

    Without a window the mixer is alone, and its gain starts as 1.

    `gates` says where the mixer's gates come from:

    - `liger`: the key projection, with no new weights, as in the paper; `liger-code`: as in its
      released code.
    - `learned`: low-rank projections of the layer's input that start constant for each head.
    - `calibrated`: learned ones that start from the attention's statistics on the user's text
      (arXiv 2606.16429). Gains that are not given start from them too.
    - `clustered`: slots of `mixer=gsa` for clusters of that text's keys. With `combine=joint` that
      is attention to the window and to the last key of every cluster
      (`reroll.passes.linearize.clusters`).

    State is kept per key-value head. Layers that have a window already stay as they are unless
    `layers` names them. Nothing is trained here, and the result needs training: if too many layers
    are linearized, the model generates nonsense before it.
    """

    name = "linearize"
    contract = "approximate"

    mixer: str = option("retention", help="which token mixer: see reroll.mixers")
    mixer_options: dict[str, Value] = option({}, help="options of the mixer")
    gates: Gates = option("learned", help="where the mixer's gates come from")
    feature_map: Feature = option("none", help="feature map of queries and keys")
    rotary: bool | None = option(
        None, help="apply the mixer after the rotary embedding; by default, without a feature map"
    )
    window: int = option(
        64,
        within=COUNT_OR_NONE,
        help="how many of the last tokens softmax attention sees; 0 for none",
    )
    sinks: int = option(
        4, within=COUNT_OR_NONE, help="how many of the first tokens it sees beside them"
    )
    combine: Combine = option("disjoint", help="how the outputs of window and mixer are combined")
    mix: float = option(0.5, within=SHARE, help="the mixer's part in a sum, from 0 to 1")
    gain: float | None = option(
        None,
        within=FINITE,
        help="factor on the mixer at the start; by default 0 beside a window and 1 without",
    )
    rank: int = option(16, within=SIZE, help="rank of learned gates")
    samples: int = option(8, within=COUNT, help="pieces of 512 tokens of the text to calibrate on")

    def check(self) -> None:
        super().check()
        find(self.mixer).make(self.mixer_options)
        mixer = find(self.mixer)
        if self.gates == "clustered" and not mixer.has_slots:
            raise UsageError(
                f"{self.mixer} has no slots for clusters of keys",
                "pass linearize, option gates",
                "use mixer=gsa with gates=clustered",
            )
        if self.combine == "joint" and self.feature_map == "none" and not mixer.divides:
            raise UsageError(
                "one normalisation takes features that are not negative",
                "pass linearize, option combine",
                "such as feature_map=hedgehog, or mixer=linear, which has its own",
            )

    def run(self, program: Program, context: Context) -> Program:
        layers, chosen = self.chosen(program)
        eligible = sorted(n for s in self._attentions(program, layers, chosen) for n in s.chosen)
        calibration = self._calibrated(program, chosen, context)

        def rewritten(numbers: Collection[int]) -> Program:
            return self._rewritten(program.edit(), set(numbers), calibration, context)

        left = self.measured(program, eligible, rewritten, context)
        done = sorted(left)
        if calibration.explained:
            context.remark(_calibration_remark(calibration, done))
        context.remark(self._summary(done))
        result = self._rewritten(program, left, calibration, context)
        if done and any(marked_names(result, WEIGHTS)):
            # those of what the window sees are not all that the layer reads
            drop_marks(result, WEIGHTS)
            context.remark(
                f"layers {ranges(done)} read tokens through a recurrence, which has {NO_WEIGHTS}, "
                "so the model returns none (output_attentions)"
            )
        return result

    def _calibrated(self, program: Program, chosen: set[int], context: Context) -> Calibration:
        """Measure the initial gates and gains of each layer on the original's own attention."""
        if self.gates not in ("calibrated", "clustered"):
            return Calibration()
        text = self._text(program, context)
        if text is None:
            context.remark("no text to calibrate on: gates start as with gates=learned")
            return Calibration()
        program, design = program.edit(), self._design()
        layers, _ = self.chosen(program)
        starts, clusters = {}, {}
        if self.gates == "clustered":
            attentions = self._attentions(program, layers, chosen)
            clusters = measure_clusters(program, attentions, text, context, design.slots)
        else:
            starts = measure_starts(program, layers, text, design.reach, context)
        # attentions are the original's and gains are zero, so all inputs are the original's too
        if self.gain is not None or not design.has_gain:
            return Calibration(starts, clusters)
        projections = Projections(self.rank, context.seed, starts, clusters)
        exact, mixers = self._beside(program, design, projections, chosen)
        layers, _ = self.chosen(exact)
        joint = partial(least_joint, logs=design.logs)
        least = joint if self.combine == "joint" else least_squares
        measured = measure_gains(exact, mixers, layers, text, design.reach, context, least)
        return Calibration(starts, clusters, *measured)

    def _text(self, program: Program, context: Context) -> list[Mapping[str, Tensor]] | None:
        """Return the calibration text, or None; raises PassError if the gates need one."""
        text = samples(program, context, self.samples)
        if text is None and self.gates == "clustered":
            raise PassError(
                "there is no text whose keys could be clustered",
                where="pass linearize, option gates",
                hint="give a text file with --text; a model without tokens has none",
            )
        return text

    def _beside(
        self, program: Program, design: Design, projections: Projections, chosen: set[int]
    ) -> tuple[Program, dict[fx.Node, fx.Node]]:
        """Insert mixers with gain 0, in place; return the program and each attention's mixer."""
        layers, _ = self.chosen(program)
        attentions = self._attentions(program, layers, chosen)
        mixers = {attention.node: design.insert(attention, projections) for attention in attentions}
        return _with_tensors(self._with_gains(attentions, {}).result(), projections), mixers

    def _rewritten(
        self, program: Program, numbers: set[int], calibration: Calibration, context: Context
    ) -> Program:
        """Insert mixers in these layers and restrict their attention; edits the graphs in place."""
        layers, _ = self.chosen(program)
        attentions, design = self._attentions(program, layers, numbers), self._design()
        projections = Projections(self.rank, context.seed, calibration.starts, calibration.clusters)
        for attention in attentions:
            design.insert(attention, projections)
        edit = self._with_gains(attentions, calibration.gains)
        for attention in attentions:
            confine(attention, self.window, self.sinks)
        return _with_tensors(edit.result(), projections)

    def _design(self) -> Design:
        rotary = self.rotary
        if rotary is None:
            key_map = find(self.mixer).make(self.mixer_options).key_map
            rotary = self.feature_map == key_map == "none"
        return Design(
            self.mixer, self.mixer_options, self.gates, self.feature_map, rotary,
            self.combine, self.mix, Reach(self.window, self.sinks if self.window else 0),
        )  # fmt: skip

    def _attentions(
        self, program: Program, layers: list[AttentionLayer], chosen: set[int]
    ) -> list[LinearizedAttention]:
        """Return the attentions to linearize; raises PassError, with the reason, if none can be."""
        edit = WeightEditor(program)
        attentions: list[LinearizedAttention] = []
        misses: list[Miss] = []
        for layer in layers:
            windows = zip(layer.numbers, layer.values("window"), strict=True)
            near = {n for n, w in windows if w is not None and self.layers == "all"}
            numbers = tuple(n for n in layer.numbers if n in chosen - near)
            attention = linearized_attention(layer, numbers, edit)
            if isinstance(attention, Miss):
                misses.append(attention)
            elif numbers:
                attentions.append(attention)
        if not attentions:
            why = nearest(misses) if misses else "all see windows already"
            raise PassError(
                f"no attention can be linearized: {why}",
                hint="causal attention can; name layers that see a window already with layers=[..]",
            )
        return attentions

    def _summary(self, done: list[int]) -> str:
        beside = f" beside a window of {self.window} and {self.sinks} sinks" if self.window else ""
        return f"layers {ranges(done)} are {self.mixer}{beside}, gates {self.gates}"

    def _with_gains(
        self, attentions: list[LinearizedAttention], gains: Mapping[int, Tensor]
    ) -> WeightEditor:
        """Write the gains of the layers into weights: the option's, measured, or by default."""
        edit = attentions[0].edit
        default = 0.0 if self.window else 1.0
        for attention in attentions:
            if attention.gain is None:
                continue
            entries = []
            for number in attention.chosen:
                start = default if self.gain is None else self.gain
                values = gains[number].tolist() if number in gains else [start] * attention.heads
                parts = [full((1,), float(value), torch.float32) for value in values]
                entries.append(cast(concat(0, parts), attention.dtype))
            edit.weights = edit.weights.with_weight(
                attention.gain, replace(edit.weights[attention.gain], entries=tuple(entries))
            )
        return edit


def _with_tensors(program: Program, projections: Projections) -> Program:
    """Add the measured clusters to the tensors of the program's checkpoint."""
    if not projections.clusters:
        return program
    tensors = MemorySource(projections.tensors())
    return replace(program, source=ChainSource([tensors, program.source]))


def _calibration_remark(calibration: Calibration, layers: Sequence[int]) -> str:
    shares = [calibration.explained[n] for n in layers]
    said = (
        f"mixers bring back {sum(shares) / len(shares):.0%} of what is left out, "
        f"from {min(shares):.0%} to {max(shares):.0%} by layer"
    )
    if not calibration.starts:
        return said
    lives = sorted(life for n in layers for life in calibration.starts[n].half_life)
    lived = f"half-lives from {lives[0]:.0f} to {lives[-1]:.0f} tokens"
    return f"{lived}, median {median(lives):.0f}; {said}"
