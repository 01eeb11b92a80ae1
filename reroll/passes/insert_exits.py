"""Insert exits: a token leaves the depth loop when it is sure enough of its answer."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import fx

from reroll.errors import PassError, UsageError
from reroll.rewrite.passes.base import Context, Pass, option
from reroll.rewrite.program import Body, Loop, Program, TensorType
from reroll.rewrite.rolling.exits import EXIT, HOLD, STREAK, exits_of
from reroll.rewrite.rolling.split import find_loop, inline
from reroll.rewrite.weights import Weight, normal, zeros

aten = torch.ops.aten

Criterion = Literal["margin", "entropy", "patience", "saturation", "latent", "linear", "mlp"]
NEEDS_LOGITS = ("margin", "entropy", "patience")


class InsertExits(Pass):
    """Let every token leave the loop after one of the layers `at`, once it is sure enough.

    After each of these trips a score is compared with a threshold; a token whose score is higher is
    done, and keeps its hidden state to the end. Scores, all larger where the token is surer:

    - `margin`: the probability of the best next token minus that of the second (CALM, arXiv
      2207.07061), by the model's own last norm and head;
    - `entropy`: 1 - H / log V of the same distribution;
    - `patience`: how many exits in a row predict the same token before this one;
    - `saturation`: the cosine of the hidden state before and after the layer;
    - `latent`: minus |change| / |hidden state| over the layer (Huginn, arXiv 2502.05171);
    - `linear`, `mlp`: a classifier per exit on the hidden state at unit RMS, a probability; it
      starts at one half, and `reroll.fit_exits` or training makes it say something.

    At the threshold `inf`, which is the default, nobody leaves and the model is the original;
    `reroll calibrate` chooses thresholds on text. Other outputs stay; `depth` says how many trips
    each token made.

    `state` says what becomes of the caches of the layers that a token skips: with `propagate` they
    hold the keys and values of the state that it left with (CALM), with `defer` those that it would
    have had, because the layers are run for it all the same: exact caches, and no time saved
    except where a scheduler runs them later in a batch.
    """

    name = "insert_exits"
    contract = "approximate"

    at: list[int] = option(help="after how many trips tokens may leave")
    criterion: Criterion = option("margin", help="what says that a token is sure")
    threshold: float | list[float] = option(
        math.inf, help="the score above which a token leaves: one, or one for each exit"
    )
    state: Literal["propagate", "defer"] = option(
        "propagate", help="what the caches of skipped layers hold"
    )
    width: int = option(32, help="hidden units of the classifier `mlp`")
    loop: str | None = option(None, help="the loop's name; the longest one by default")

    def check(self) -> None:
        if not self.at or sorted(set(self.at)) != self.at or self.at[0] < 1:
            raise UsageError(
                "`at` is an ascending list of numbers of trips, from 1",
                where="pass insert_exits, option at",
            )
        if isinstance(self.threshold, list) and len(self.threshold) != len(self.at):
            raise UsageError(
                f"{len(self.threshold)} thresholds are given for {len(self.at)} exits",
                where="pass insert_exits, option threshold",
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
        builder = _Builder(self, program, loop)
        program = builder.build()
        context.remark(
            f"{loop.name}: exits after {', '.join(map(str, self.at))} of {loop.trips} trips by "
            f"{self.criterion}, state {self.state}"
        )
        if all(math.isinf(t) for t in self.thresholds()):
            context.remark("thresholds are infinite: the model is as it was until it is calibrated")
        if builder.added:
            context.remark(f"classifiers of {builder.added:,} parameters")
        return program

    def thresholds(self) -> list[float]:
        """The threshold of each exit."""
        if isinstance(self.threshold, list):
            return self.threshold
        return [self.threshold] * len(self.at)


@dataclass
class _Builder:
    """A body with exits in the place of one without."""

    options: InsertExits
    program: Program
    loop: Loop
    added: int = 0

    def __post_init__(self) -> None:
        self.hidden: TensorType = self.loop.carry[0].meta["type"]
        self.graph = fx.Graph()
        self.weights: dict[str, Weight] = {}

    def build(self) -> Program:
        graph, loop, options = self.graph, self.loop, self.options
        places = loop.places
        h = graph.node_copy(places[0])
        defer, patient = options.state == "defer", options.criterion == "patience"
        # carried beside the hidden state: who is done, the trips made, and what criteria need
        kinds = {"done": torch.bool, "depth": torch.int64}
        kinds |= {"last": torch.int64, "count": torch.int64} if patient else {}
        kept = self.place("kept", self.hidden) if defer else None
        carried = {name: self.place(name, self.per_token(d)) for name, d in kinds.items()}
        values = {places[0]: h, **{p: graph.node_copy(p) for p in places[1:]}}
        threshold = graph.placeholder("threshold")
        done = carried["done"]
        (out,) = inline(graph, loop.body.graph, values)
        before = h if kept is None else kept
        held = self.call(HOLD, (done, before, out), self.hidden)
        going = self.call(aten.logical_not.default, (done,), self.per_token(torch.bool))
        depth = self.call(aten.add.Tensor, (carried["depth"], going), self.per_token(torch.int64))
        score, extra = self.score(h, held, carried, threshold)
        left = self.call(EXIT, (done, score, threshold), self.per_token(torch.bool))
        graph.output((*((out,) if defer else ()), held, left, depth, *extra))
        return self.replaced(list(kinds))

    # ---- scores

    def score(
        self, h: fx.Node, held: fx.Node, carried: dict[str, fx.Node], threshold: fx.Node
    ) -> tuple[fx.Node, tuple[fx.Node, ...]]:
        """The score of each token, and the further carried values."""
        number = self.per_token(torch.float32)
        wide = self.wide(held)
        criterion = self.options.criterion
        if criterion in ("saturation", "latent"):
            old = self.wide(h)
            if criterion == "saturation":
                return self.call(aten.cosine_similarity.default, (old, wide, -1), number), ()
            change = self.call(aten.sub.Tensor, (wide, old), wide.meta["type"])
            sizes = [self.norm(x, number) for x in (change, wide)]
            ratio = self.call(aten.div.Tensor, tuple(sizes), number)
            return self.call(aten.neg.default, (ratio,), number), ()
        if criterion in ("linear", "mlp"):
            return self.classifier(wide), ()
        logits = self.wide(self.logits(held))
        if criterion == "patience":
            index = self.per_token(torch.int64)
            token = self.call(aten.argmax.default, (logits, -1), index)
            pair = self.call(STREAK, (token, carried["last"], carried["count"], threshold), None)
            last, count = (self.call(operator.getitem, (pair, i), index) for i in (0, 1))
            return self.call(aten.to.dtype, (count, torch.float32), number), (last, count)
        p = self.call(aten.softmax.int, (logits, -1), logits.meta["type"])
        if criterion == "margin":
            top = self.call(aten.topk.default, (p, 2), None)
            best = self.call(operator.getitem, (top, 0), TensorType(torch.float32, ("b", "s", 2)))
            first, second = (self.call(aten.select.int, (best, -1, i), number) for i in (0, 1))
            return self.call(aten.sub.Tensor, (first, second), number), ()
        log = self.call(aten.log_softmax.int, (logits, -1), logits.meta["type"])
        product = self.call(aten.mul.Tensor, (p, log), logits.meta["type"])
        negative = self.call(aten.sum.dim_IntList, (product, [-1]), number)
        size = math.log(logits.meta["type"].shape[-1])
        part = self.call(aten.div.Tensor, (negative, size), number)
        return self.call(aten.add.Tensor, (part, 1.0), number), ()

    def classifier(self, wide: fx.Node) -> fx.Node:
        """The probability that a token may leave, from its hidden state at unit RMS."""
        width = self.hidden.shape[-1]
        assert isinstance(width, int)
        channels = width
        unit = self.call(
            torch.ops.reroll.rms_norm.default, (wide, None, 1e-6, 0.0), wide.meta["type"]
        )
        number = TensorType(torch.float32, ("b", "s", 1))
        if self.options.criterion == "mlp":
            inner = self.options.width
            kind = TensorType(torch.float32, ("b", "s", inner))
            deviation = width**-0.5
            up = self.stacked(
                "exit.up.weight",
                lambda n: normal((inner, channels), deviation, n, torch.float32),
            )
            raised = self.call(aten.linear.default, (unit, up), kind)
            unit, width = self.call(aten.relu.default, (raised,), kind), inner
        weight = self.stacked("exit.score.weight", lambda n: zeros((1, width), torch.float32))
        bias = self.stacked("exit.score.bias", lambda n: zeros((1,), torch.float32))
        logit = self.call(aten.linear.default, (unit, weight, bias), number)
        chance = self.call(aten.sigmoid.default, (logit,), number)
        return self.call(aten.squeeze.dim, (chance, -1), self.per_token(torch.float32))

    def stacked(self, name: str, make: Callable[[int], Any]) -> fx.Node:
        """A new weight with one entry for each exit; trips without one name that of the next."""
        at = self.options.at
        entries = tuple(make(number) for number in range(len(at)))
        index = tuple(
            min(sum(trip >= stop for stop in at), len(at) - 1) for trip in range(self.loop.trips)
        )
        weight = Weight(entries, index)
        full = f"{self.loop.name}.*.{name}"
        self.weights[full] = weight
        self.added += weight.elements()
        node = self.graph.get_attr(full)
        node.meta["type"] = TensorType(weight.meta.dtype, weight.meta.shape)
        return node

    def logits(self, held: fx.Node) -> fx.Node:
        """What the rest of the main graph makes of the hidden state."""
        if "logits" not in self.program.outputs:
            raise PassError(
                f"the model has no logits, which {self.options.criterion} needs",
                hint="criteria without: saturation, latent, linear, mlp",
            )
        returned: Any = self.program.graph.output_node().args[0]
        target = returned[self.program.outputs.index("logits")]
        results = [n for n in self.loop.node.users if n.args[1] == 0]
        values = dict.fromkeys(results, held)

        def copied(node: fx.Node) -> fx.Node:
            if node not in values:
                if node.op == "placeholder" or node is self.loop.node or node.op == "output":
                    raise PassError(f"the logits depend on {node.name}, beside the loop's result")
                if any(node is loop.node for loop in self.program.loops):
                    raise PassError(
                        f"another loop stands between {self.loop.name} and the logits",
                        hint="criteria that need no logits: saturation, latent, linear, mlp",
                    )
                for source in node.all_input_nodes:
                    copied(source)
                values[node] = self.graph.node_copy(node, lambda n: values[n])
            return values[node]

        return copied(target)

    # ---- nodes

    def place(self, name: str, kind: TensorType) -> fx.Node:
        node = self.graph.placeholder(name)
        node.meta["type"] = kind
        return node

    def call(self, target: Any, args: tuple[Any, ...], kind: TensorType | None) -> fx.Node:
        node = self.graph.call_function(target, args)
        if kind is not None:
            node.meta["type"] = kind
        return node

    def wide(self, node: fx.Node) -> fx.Node:
        kind = node.meta["type"]
        if kind.dtype == torch.float32:
            return node
        return self.call(
            aten.to.dtype, (node, torch.float32), TensorType(torch.float32, kind.shape)
        )

    def norm(self, node: fx.Node, kind: TensorType) -> fx.Node:
        return self.call(aten.norm.ScalarOpt_dim, (node, 2, [-1]), kind)

    def per_token(self, dtype: torch.dtype) -> TensorType:
        return TensorType(dtype, self.hidden.shape[:-1])

    def replaced(self, names: list[str]) -> Program:
        """The Program whose loop carries what the new body carries, and returns the depth."""
        loop, graph, options = self.loop, self.program.graph, self.options
        start = loop.carry[0]
        kinds = {"done": torch.bool}
        with graph.inserting_before(loop.node):
            channel = graph.call_function(aten.select.int, (start, -1, 0))
            channel.meta["type"] = TensorType(self.hidden.dtype, self.hidden.shape[:-1])
            fresh = []
            for name in names:
                dtype = kinds.get(name, torch.int64)
                node = graph.call_function(aten.zeros_like.default, (channel,), {"dtype": dtype})
                node.meta["type"] = self.per_token(dtype)
                fresh.append(node)
        thresholds = [math.inf] * loop.trips
        for stop, value in zip(options.at, options.thresholds(), strict=True):
            thresholds[stop - 1] = value
        defer = options.state == "defer"
        carry = (start, start, *fresh) if defer else (start, *fresh)
        inputs = (*loop.inputs, tuple(thresholds))
        loop.node.args = (loop.name, carry, inputs, loop.trips)
        if defer:
            for user in list(loop.node.users):
                user.args = (loop.node, 1)
        depth = carry.index(fresh[names.index("depth")])
        after = max(loop.node.users, key=list(graph.nodes).index)
        with graph.inserting_after(after):
            result = graph.call_function(operator.getitem, (loop.node, depth))
        result.meta["type"] = self.per_token(torch.int64)
        output = graph.output_node()
        output.args = ((*output.args[0], result),)  # type: ignore[misc]
        bodies = {**self.program.bodies, loop.name: Body(self.graph, loop.period)}
        return replace(
            self.program,
            bodies=bodies,
            weights=self.program.weights.with_weights(self.weights),
            outputs=(*self.program.outputs, "depth"),
        )
