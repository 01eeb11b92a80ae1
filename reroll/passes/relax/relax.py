"""Relax: give every trip of a tied loop a low-rank part of the weights that tying removed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import torch
from torch import fx

from reroll.bounds import COUNT, COUNT_OR_NONE, Range
from reroll.errors import PassError
from reroll.passes.relax.low_rank import Factors, Pair, make_factors, residuals_left, spend
from reroll.rewrite.ir.builder import Builder
from reroll.rewrite.ir.program import Loop, Program, weight_nodes
from reroll.rewrite.ir.weights import Weight
from reroll.rewrite.pipeline.base import Context, Pass, option
from reroll.rewrite.pipeline.options import nearest_name

aten = torch.ops.aten

Rank = int | Literal["full"]

# "auto" uses the randomized decomposition above this smaller side, if side / rank is this large
LARGE_SIDE = 512
LARGE_RATIO = 4


class Relax(Pass):
    """Add a low-rank residual per trip to the tied matrices of each loop.

    Relaxed Recursive Transformers (arXiv 2410.20672), section 2.3. A linear layer with the shared
    matrix W' becomes y = W' x + B_t (A_t x). B_t A_t is the best approximation of rank `rank` of
    the difference W_t - W' of trip t. Every tied matrix that only linear layers use is relaxed.

    `ranks` sets ranks by the kind of the weight, which is the end of its module's name: `q_proj` or
    `self_attn.q_proj`. Rank 0 leaves a kind tied. "full", or a rank that is not below a matrix's
    own, gives each trip its original matrix back: factors would take more parameters for the same.
    So full rank everywhere restores the original model.

    Vectors that were tied (biases, layer scales, norms) become one per trip again, as they were,
    because no factors are smaller. A remark names the weights that stay tied.

    With a `budget`, ranks differ by layer and by kind: parameters go where they reduce |R|^2 /
    |W|^2 most, by the singular values of all residuals. 0.1 spends a tenth of the parameters that
    the matrices had before they were tied. Kinds in `ranks` keep their rank and are not counted.
    Every rank that occurs in a kind is a pair of factors in the graph, and trips of a lower rank
    multiply by zeros. So a budget saves parameters, not time.

    Trips that share their block with no other have no residual; they share one pair of zero
    factors. With `init=zero`, the products start as zero and A_t is the same as with `svd`, so that
    training can start.
    """

    name = "relax"
    contract = "approximate"
    requires = ("tie",)

    rank: Rank = option(64, within=COUNT_OR_NONE, help='rank of the residuals, or "full"')
    ranks: dict[str, Rank] = option({}, within=COUNT_OR_NONE, help="ranks by kind of weight")
    init: Literal["svd", "zero"] = option("svd", help="what the residuals start as")
    svd: Literal["auto", "exact", "randomized"] = option(
        "auto", help="how to decompose; auto takes randomized for large matrices and small ranks"
    )
    budget: float | None = option(
        None,
        within=Range(above=0, most=1),
        help="instead of one rank: parameters, as a part of what the matrices had untied",
    )
    step: int = option(
        32, within=COUNT, help="with a budget, ranks are 0, or this times a power of two"
    )
    vectors: bool = option(True, help="give each trip its own biases and other vectors back")

    def run(self, program: Program, context: Context) -> Program:
        if not program.reference:
            return _nothing(program, context)
        self._check_kinds(program)
        budgeted = self._budgeted(program, context)
        weights, reference = program.weights, program.reference
        restored: list[str] = []
        left: list[str] = []
        factors: list[Factors] = []
        for loop in program.loops:
            for name, nodes in weight_nodes(loop.body.graph).items():
                if name not in reference:
                    continue
                original, rank = reference[name], self._rank(name)
                vector = len(original.meta.shape) < 2
                whole = name not in budgeted and _is_full(rank, original.meta.shape)
                if self.vectors if vector else whole:
                    weights = weights.with_weight(name, original)
                    reference = reference.without(name)
                    restored.append(name)
                elif (
                    rank == 0
                    or vector
                    or not _only_linear(nodes)
                    or not any(budgeted.get(name, [1]))
                ):
                    left.append(name)
                else:
                    assert isinstance(rank, int)
                    ranks = budgeted.get(name, [rank] * loop.trips)
                    factored = self._factors(name, weights[name], original, ranks)
                    reference = reference.without(name)
                    linears = [user for node in nodes for user in node.users]
                    for pair in factored.pairs:
                        weights = weights.with_weights(
                            {pair.down_name: pair.down, pair.up_name: pair.up}
                        )
                        _insert(loop, linears, pair)
                    factors.append(factored)
        result = replace(program, weights=weights, reference=reference)
        for remark in residuals_left(result, factors, context):
            context.remark(remark)
        for state, names in (("as they were", restored), ("left tied", left)):
            if names:
                context.remark(f"{state}: {', '.join(sorted(set(map(kind_of, names))))}")
        return result

    def _check_kinds(self, program: Program) -> None:
        for kind in self.ranks:
            if not any(_matches(kind, name) for name in program.reference):
                kinds = sorted({kind_of(name) for name in program.reference})
                raise PassError(
                    f"no tied weight is of kind {kind!r}", hint=nearest_name(kind, kinds)
                )

    def _rank(self, name: str) -> Rank:
        """Return the rank for a weight: that of the longest kind that its name ends with."""
        kinds = [kind for kind in self.ranks if _matches(kind, name)]
        return self.ranks[max(kinds, key=len)] if kinds else self.rank

    def _factors(
        self, name: str, shared: Weight, original: Weight, ranks: Sequence[int]
    ) -> Factors:
        small, method = min(shared.meta.shape), self.svd
        if method == "auto":
            large = small > LARGE_SIDE and max(ranks) * LARGE_RATIO <= small
            method = "randomized" if large else "exact"
        zero = self.init == "zero"
        return make_factors(name, kind_of(name), shared, original, ranks, zero=zero, method=method)

    def _budgeted(self, program: Program, context: Context) -> dict[str, list[int]]:
        """Return the rank of each trip of each weight that the budget covers, by name."""
        if self.budget is None:
            return {}
        candidates = {
            name: program.weights[name]
            for loop in program.loops
            for name, nodes in weight_nodes(loop.body.graph).items()
            if name in program.reference
            and len(program.reference[name].meta.shape) == 2
            and not any(_matches(kind, name) for kind in self.ranks)
            and _only_linear(nodes)
        }
        whole = sum(program.reference[name].elements() for name in candidates)
        allowed = int(self.budget * whole)
        return spend(program, candidates, allowed, self.step, context)


def kind_of(name: str) -> str:
    """Return the kind of a weight: the last part of its module's name, plus `bias` for a bias."""
    parts = name.removesuffix(".weight").split(".")
    return ".".join(parts[-2:]) if parts[-1] == "bias" else parts[-1]


def _matches(kind: str, name: str) -> bool:
    return f".{name.removesuffix('.weight')}".endswith(f".{kind}")


def _is_full(rank: Rank, shape: tuple[int, ...]) -> bool:
    return rank == "full" or (len(shape) == 2 and rank >= min(shape))


def _only_linear(nodes: list[fx.Node]) -> bool:
    return all(
        user.target is aten.linear.default
        and user.args[1] is node
        and node not in (user.args[0], *user.args[2:])
        for node in nodes
        for user in node.users
    )


def _insert(loop: Loop, linears: list[fx.Node], pair: Pair) -> None:
    """Add up(down(x)) to the output of every linear layer with the weight."""
    build = Builder(loop.body.graph)
    with build.before(next(n for n in loop.body.graph.nodes if n in linears)):
        down = build.weight(pair.down_name, pair.down)
        up = build.weight(pair.up_name, pair.up)

    def with_residual(linear: fx.Node) -> fx.Node:
        low = build.call(aten.linear.default, linear.args[0], down)
        return build.call(aten.add.Tensor, linear, build.call(aten.linear.default, low, up))

    for linear in linears:
        build.wrap(linear, with_residual)


def _nothing(program: Program, context: Context) -> Program:
    if any(w.index is not None and len(w.entries) < len(w.index) for w in program.weights.values()):
        raise PassError(
            "what the tied weights were before they were tied is not known",
            hint="run tie and relax one after the other on the original model",
        )
    context.remark("nothing is tied, so there is nothing to relax")
    return program
