"""Insert exits: let a token leave the depth loop when its score is above a threshold."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import fx

from reroll.bounds import COUNT, SIZE
from reroll.errors import PassError, UsageError
from reroll.passes.exits.adapter import add_adapter
from reroll.passes.exits.heads import add_heads, copy_path, path_to_logits
from reroll.passes.exits.scores import Scores, stacked_weight
from reroll.rewrite.capture.rolling.split import find_loop, inline
from reroll.rewrite.ir.builder import Builder
from reroll.rewrite.ir.drafting import EXIT_HIDDEN
from reroll.rewrite.ir.exits import exits_of
from reroll.rewrite.ir.matching import argument, shape
from reroll.rewrite.ir.ops import (
    ATTENTION,
    ATTENTION_MASS,
    CACHE,
    EXIT,
    HOLD,
    MARK_KEYS,
    RECURRENCE,
)
from reroll.rewrite.ir.program import Loop, Program
from reroll.rewrite.ir.records import Body, TensorType
from reroll.rewrite.ir.types import set_type
from reroll.rewrite.ir.weights import Expr, Weight
from reroll.rewrite.pipeline.base import Context, Pass, option

aten = torch.ops.aten

Criterion = Literal[
    "margin", "entropy", "patience", "saturation", "latent", "linear", "mlp", "gated"
]
SkippedState = Literal["propagate", "defer", "skip"]
# ops that take a padding mask
PADDED = (ATTENTION, RECURRENCE)


class InsertExits(Pass):
    """Let every token leave the loop after one of the layers `at`, once it is sure enough.

    After each of these trips a score is compared with a threshold. A token whose score is higher
    leaves, and keeps its hidden state to the end. Scores are larger where the prediction is more
    certain:

    - `margin`: the probability of the best next token minus that of the second (CALM, arXiv
      2207.07061), by the model's own last norm and head;
    - `entropy`: 1 - H / log V of the same distribution;
    - `patience`: how many exits in a row, before this one, predict the same token;
    - `saturation`: the cosine of the hidden state before and after the layer;
    - `latent`: minus |change| / |hidden state| over the layer (Huginn, arXiv 2502.05171);
    - `linear`, `mlp`: the probability that a classifier per exit gives, from the hidden state at
      unit RMS; it starts at one half, and `reroll.fit_exits` trains it;
    - `gated`: a classifier with a gated recurrence of `width` units over the states of the token
      and its predecessors. The idea is that of DYNAMAX (arXiv 2504.20922), the unit that of arXiv
      2410.01201.

    At the threshold `inf`, the default, no token leaves and the model is the original; `reroll
    calibrate` chooses thresholds on text. The new output `depth` is the number of trips of each
    token; other outputs stay.

    `state` says what the caches of the layers that a token skips hold:

    - `propagate`: keys and values of the hidden state at the exit (CALM).
    - `defer`: exact keys and values, because these layers run for the token all the same. Time is
      saved only where a scheduler runs them later in a batch.
    - `skip`: nothing. Later tokens do not attend to the token there, and a recurrent state stays as
      it was.

    `head` says what computes the logits at an exit, for the criterion too. It is the model's own
    norm and head (`shared`), a norm for each exit (`norm`), or norm and head for each (`own`). They
    start as the model's own; recovery's stage `exits` trains them.

    `adapter=attention` makes an exit for drafts instead (Kangaroo, arXiv 2404.18911): an attention
    between two norms, without a feed-forward, reads the hidden states behind the one layer `at`,
    and writes the output `exit_hidden`, which the model's own head can read. No token leaves, and
    all else stays. The adapter begins as a copy of the first attention behind the exit; recovery's
    stage `exit_adapter` trains it, and `cut_at_exit` makes the draft.
    """

    name = "insert_exits"
    contract = "approximate"

    at: list[int] = option(within=COUNT, help="after how many trips tokens may leave")
    criterion: Criterion = option("margin", help="the score that is compared with the threshold")
    threshold: float | list[float] = option(
        math.inf, help="the score above which a token leaves: one, or one for each exit"
    )
    state: SkippedState = option("propagate", help="what the caches of skipped layers hold")
    head: Literal["shared", "norm", "own"] = option(
        "shared", help="what computes the logits at an exit: shared or own norm and head"
    )
    width: int = option(32, within=SIZE, help="hidden units of the classifiers `mlp` and `gated`")
    loop: str | None = option(None, help="the loop's name; the longest one by default")
    adapter: Literal["none", "attention"] = option(
        "none", help="what stands before the head at an exit that is for drafts alone"
    )

    def check(self) -> None:
        if sorted(set(self.at)) != self.at:
            raise UsageError(
                "`at` is an ascending list of numbers of trips",
                where="pass insert_exits, option at",
            )
        if isinstance(self.threshold, list) and len(self.threshold) != len(self.at):
            raise UsageError(
                f"{len(self.threshold)} thresholds are given for {len(self.at)} exits",
                where="pass insert_exits, option threshold",
            )
        if self.adapter != "none":
            self._check_adapter()

    def _check_adapter(self) -> None:
        if len(self.at) != 1:
            raise UsageError(
                f"an adapter is for one exit, and {len(self.at)} are given",
                where="pass insert_exits, option at",
            )
        taken = {"at", "loop", "adapter"}
        others = [name for name in self.changed_options() if name not in taken]
        if others:
            raise UsageError(
                "no token leaves at an exit with an adapter, so this says nothing",
                where=f"pass insert_exits, option {others[0]}",
                hint="leave it out, or the adapter",
            )

    def run(self, program: Program, context: Context) -> Program:
        loop = find_loop(program, self.loop)
        if exits_of(loop) is not None or any(exits_of(each) for each in program.loops):
            raise PassError(f"{loop.name} has exits already, or another loop has")
        if self.at[-1] >= loop.trips:
            raise PassError(
                f"{loop.name} makes {loop.trips} trips, and nobody leaves after {self.at[-1]}",
                hint=f"the last exit is after {loop.trips - 1} trips or fewer",
            )
        if len(loop.carry) != 1 or loop.carry[0].meta["type"].shape[:-1] != ("b", "s"):
            raise PassError(f"{loop.name} does not carry one value for each token")
        if self.adapter != "none":
            return self._with_adapter(program, loop, context)
        builder = _Builder(self, program, loop)
        program = builder.build()
        context.remark(
            f"{loop.name}: exits after {', '.join(map(str, self.at))} of {loop.trips} trips by "
            f"{self.criterion}, state {self.state}"
        )
        if all(math.isinf(t) for t in self.thresholds()):
            context.remark("thresholds are infinite: the model is as it was until it is calibrated")
        if builder.of_heads:
            context.remark(f"norms and heads of exits: {builder.of_heads:,} parameters")
        if builder.weights:
            added = sum(weight.elements() for weight in builder.weights.values())
            context.remark(f"classifiers of {added:,} parameters")
        return program

    def _with_adapter(self, program: Program, loop: Loop, context: Context) -> Program:
        if EXIT_HIDDEN in program.outputs:
            raise PassError("the model has an exit with an adapter already")
        program, parameters = add_adapter(program, loop, self.at[0])
        context.remark(
            f"{loop.name}: an exit for drafts after {self.at[0]} of {loop.trips} trips, with an "
            f"adapter of {parameters:,} parameters"
        )
        return program

    def thresholds(self) -> list[float]:
        """Return the threshold of each exit."""
        if isinstance(self.threshold, list):
            return self.threshold
        return [self.threshold] * len(self.at)


class _Builder:
    """Builder of a loop with exits that replaces one without."""

    def __init__(self, options: InsertExits, program: Program, loop: Loop) -> None:
        self.options, self.program, self.loop = options, program, loop
        self.hidden: TensorType = loop.carry[0].meta["type"]
        self.body = Builder(fx.Graph())
        self.weights: dict[str, Weight] = {}
        self.of_heads = 0
        # further carried values: which tokens have left, their trips, and what criteria need
        self.carried = {"done": torch.bool, "depth": torch.int64}
        if options.criterion == "patience":
            self.carried |= {"last": torch.int64, "count": torch.int64}

    def build(self) -> Program:
        options, loop = self.options, self.loop
        # read before `_rewire` changes what the loop carries
        places = loop.places
        result, depth = self._rewire()
        program = self.program
        if options.head != "shared":
            whole = options.head == "own"
            program, self.of_heads = add_heads(program, loop, result, depth, options.at, whole)
            self.program = program
        graph = self._body(places, result, depth)
        return replace(
            program,
            bodies={**program.bodies, loop.name: Body(graph, loop.period)},
            weights=program.weights.with_weights(self.weights),
            outputs=(*program.outputs, "depth"),
        )

    # ---- the main graph

    def _rewire(self) -> tuple[fx.Node, fx.Node]:
        """Let the loop carry more, add the output `depth`; return the nodes of result and depth."""
        loop, graph, options = self.loop, self.program.graph, self.options
        start, build = loop.carry[0], Builder(graph)
        with build.before(loop.node):
            channel = build.call(aten.select.int, start, -1, 0)
            fresh = [
                build.call(aten.zeros_like.default, channel, dtype=dtype)
                for dtype in self.carried.values()
            ]
        thresholds = [math.inf] * loop.trips
        for stop, value in zip(options.at, options.thresholds(), strict=True):
            thresholds[stop - 1] = value
        kept = (start, start) if options.state == "defer" else (start,)
        carry, inputs = (*kept, *fresh), (*loop.inputs, tuple(thresholds))
        old = sorted(loop.node.users, key=list(graph.nodes).index)
        loop.change(carry=carry, inputs=inputs)
        with build.after(loop.node):
            depth = build.call(operator.getitem, loop.node, len(kept) + 1)
        with build.after(loop.node):
            result = build.call(operator.getitem, loop.node, len(kept) - 1)
        for node in old:
            node.replace_all_uses_with(result)
            graph.erase_node(node)
        output = graph.output_node()
        output.args = ((*output.args[0], depth),)  # type: ignore[misc]
        return result, depth

    # ---- the body

    def _body(self, placeholders: list[fx.Node], result: fx.Node, depth: fx.Node) -> fx.Graph:
        build, loop, options = self.body, self.loop, self.options
        graph, call = build.graph, build.call
        defer = options.state == "defer"
        h = graph.node_copy(placeholders[0])
        kept = build.placeholder("kept", self.hidden) if defer else h
        tokens = self.hidden.shape[:-1]
        carried = {
            name: build.placeholder(name, TensorType(d, tokens)) for name, d in self.carried.items()
        }
        values = {placeholders[0]: h, **{p: graph.node_copy(p) for p in placeholders[1:]}}
        threshold = build.placeholder("threshold")
        done = carried["done"]
        (out,) = inline(graph, loop.body.graph, values)
        if options.state == "skip":
            leave_out(loop, graph, done)
        held = call(HOLD, done, kept, out)
        new_depth = call(aten.add.Tensor, carried["depth"], call(aten.logical_not.default, done))

        def logits(hidden: fx.Node) -> fx.Node:
            path = path_to_logits(self.program, loop, [result, depth])
            return copy_path(graph, path, {result: hidden, depth: new_depth})

        padded = [n for n in graph.nodes if n.target in PADDED]
        paddings = {argument(n, "padding") for n in padded}
        (padding,) = paddings if len(paddings) == 1 else (None,)
        idle = done if options.state == "skip" else None
        scores = Scores(
            build, options.criterion, options.width, self._stacked, logits, padding, idle
        )
        score = scores.make(h, held, carried, threshold)
        left = call(EXIT, done, score, threshold)
        graph.output((*((out,) if defer else ()), held, left, new_depth, *scores.extra))
        return graph

    def _stacked(self, name: str, make: Callable[[int], Expr]) -> fx.Node:
        """Add a weight to the body, with one entry for each exit."""
        weight = stacked_weight(make, self.options.at, self.loop.trips)
        full = f"{self.loop.name}.*.exit.{name}"
        self.weights[full] = weight
        return self.body.weight(full, weight)


# ---- leaving skipped tokens out


PAD = torch.ops.aten.constant_pad_nd.default

HINT = "use state=propagate or state=defer"


def leave_out(loop: Loop, graph: fx.Graph, done: fx.Node) -> None:
    """Hide the keys and state updates of tokens that are `done` [batch, time]; edits in place.

    Raises PassError where a body has neither cache nor recurrence, where anything but attention
    reads keys, or where attention scores are capped.
    """
    caches = [n for n in graph.nodes if n.target is CACHE]
    mixers = [n for n in graph.nodes if n.target is RECURRENCE]
    if not caches and not mixers:
        raise PassError(f"{loop.name} keeps nothing of a token that could be left out", hint=HINT)
    for node in mixers:
        node.kwargs = {**node.kwargs, "idle": done}
    for cache in caches:
        _mark(graph, cache, done)


def _mark(graph: fx.Graph, cache: fx.Node, done: fx.Node) -> None:
    k: Any = cache.args[0]
    build = Builder(graph)
    with build.before(cache):
        marked = build.call(MARK_KEYS, k, done)
    cache.update_arg(0, marked)
    keys = [n for n in cache.users if n.target is operator.getitem and n.args[1] == 0]
    for key in keys:
        old, size = key.meta["type"], shape(marked)[-1]
        set_type(key, TensorType(old.dtype, (*old.shape[:-1], size)))
        for reader in list(key.users):
            if reader.target not in (ATTENTION, ATTENTION_MASS) or argument(reader, "k") is not key:
                raise PassError(f"{reader.name} reads keys, and is no attention", hint=HINT)
            if argument(reader, "softcap") is not None:
                raise PassError(
                    "keys cannot be hidden where attention scores are capped", hint=HINT
                )
            q: Any = argument(reader, "q")
            with build.before(reader):
                reader.update_arg(0, build.call(PAD, q, [0, 1], 1.0))
