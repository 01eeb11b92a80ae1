"""Idioms that are raised: patterns over ATen, and the op that replaces each of them.

Every rule is a pattern and a rewrite. The rewrite may refuse with a Miss. Its result is compared
numerically with the region that it replaces before it is accepted (see `raising.driver`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from reroll.rewrite.ir.builder import Builder
from reroll.rewrite.ir.matching import (
    ANY,
    Number,
    Op,
    Var,
    all_arguments,
    cast,
    dtype,
    either,
    is_weight,
    shape,
)
from reroll.rewrite.ir.ops import GLU, RMS_NORM, ROPE
from reroll.rewrite.ir.patterns import Match, Miss

aten = torch.ops.aten
MUL, ADD, SUB = "aten.mul.Tensor", "aten.add.Tensor", "aten.sub.Tensor"
END = 2**63 - 1


@dataclass(frozen=True)
class RewriteRule:
    """Rule for one idiom: a pattern and its replacement.

    `pattern` is a pattern of `ir.matching`, or a function of a node. `rewrite(graph, root, match)`
    inserts the replacement before `root`, or returns a Miss.
    """

    name: str
    pattern: Any
    rewrite: Callable[[fx.Graph, fx.Node, Match], fx.Node | Miss]


# root-mean-square norm

_x = cast(Var("x"))
_square = either(
    Op("aten.pow.Tensor_Scalar", _x, 2), Op("aten.square.default", _x), Op(MUL, _x, _x)
)
_variance = either(Op("aten.mean.dim", _square, [-1], True))
_stable = Op(ADD, _variance, Number("eps"), commutes=True)
_inverse = either(
    Op("aten.rsqrt.default", _stable),
    Op("aten.pow.Tensor_Scalar", _stable, -0.5),
    Op("aten.reciprocal.default", Op("aten.sqrt.default", _stable)),
)
_normed = either(
    Op(MUL, _x, _inverse, commutes=True),
    Op("aten.div.Tensor", _x, Op("aten.sqrt.default", _stable)),
)
_weight = cast(Var("weight", is_weight))
_shifted = either(
    Op(ADD, _weight, Number("offset"), commutes=True),
    Op("aten.add.Scalar", _weight, Number("offset")),
)


def _rms_norm(graph: fx.Graph, root: fx.Node, match: Match) -> fx.Node | Miss:
    x, weight = match["x"], match.bound.get("weight")
    if dtype(root) != dtype(x):
        return Miss("the norm changes the dtype", (root.name,))
    if weight is not None and shape(weight) != shape(x)[-1:]:
        return Miss("the weight is not over the last dimension", (weight.name,))
    eps, offset = float(match["eps"]), float(match.bound.get("offset", 0.0))
    return Builder(graph).call(RMS_NORM, x, weight, eps, offset)


def _aten_rms_norm(graph: fx.Graph, root: fx.Node, match: Match) -> fx.Node | Miss:
    x, sizes, weight, eps = all_arguments(root)
    if len(sizes) != 1 or dtype(root) != dtype(x):
        return Miss("the norm is over more than the last dimension", (root.name,))
    if eps is None:
        eps = torch.finfo(dtype(x) or torch.float32).eps
    return Builder(graph).call(RMS_NORM, x, weight, float(eps), 0.0)


# layer norm written out

_centred = Op(SUB, _x, Op("aten.mean.dim", _x, [-1], True))
_ln_variance = either(
    Op("aten.mean.dim", Op("aten.pow.Tensor_Scalar", _centred, 2), [-1], True),
    Op("aten.var.correction", _x, [-1], 0, True),
)
_ln_stable = Op(ADD, _ln_variance, Number("eps"), commutes=True)
_ln_normed = either(
    Op(MUL, _centred, Op("aten.rsqrt.default", _ln_stable), commutes=True),
    Op("aten.div.Tensor", _centred, Op("aten.sqrt.default", _ln_stable)),
)
_bias = cast(Var("bias", is_weight))


def _layer_norm(graph: fx.Graph, root: fx.Node, match: Match) -> fx.Node | Miss:
    x, weight, bias = match["x"], match.bound.get("weight"), match.bound.get("bias")
    if dtype(root) != dtype(x):
        return Miss("the norm changes the dtype", (root.name,))
    if any(w is not None and shape(w) != shape(x)[-1:] for w in (weight, bias)):
        return Miss("the weight is not over the last dimension", (root.name,))
    size = [shape(x)[-1]]
    return Builder(graph).call(aten.layer_norm.default, x, size, weight, bias, float(match["eps"]))


# rotary position embedding


def _half(start: Any, end: Any) -> Op:
    return Op("aten.slice.Tensor", Var("x"), Number("dim"), start, end)


def _strided(start: int) -> Op:
    return Op("aten.slice.Tensor", Var("x"), Number("dim"), start, Number("end"), 2)


def _stacked(values: list[Any]) -> Any:
    stack = Op("aten.stack.default", values, Number("axis"))
    return either(
        Op("aten.flatten.using_ints", stack, Number("from")),
        Op("aten.flatten.using_ints", stack, Number("from"), Number("to")),
        Op("aten.reshape.default", stack, ANY),
    )


_quarter_turn = either(
    Op(
        "aten.cat.default",
        [Op("aten.neg.default", _half(Number("half"), Number("end"))), _half(0, Number("half"))],
        Number("axis"),
    ),
    _stacked([Op("aten.neg.default", _strided(1)), _strided(0)]),
)
_rope_pattern = Op(
    ADD,
    Op(MUL, Var("x"), Var("cos"), commutes=True),
    Op(MUL, _quarter_turn, Var("sin"), commutes=True),
    commutes=True,
)


def _rope(graph: fx.Graph, root: fx.Node, match: Match) -> fx.Node | Miss:
    x, cos, sin = match["x"], match["cos"], match["sin"]
    if shape(cos)[-1:] != shape(x)[-1:] or shape(sin)[-1:] != shape(x)[-1:]:
        return Miss("cos and sin do not cover the rotated channels", (cos.name, sin.name))
    if dtype(cos) != dtype(x) or dtype(sin) != dtype(x):
        return Miss("the rotation changes the dtype", (root.name,))
    interleaved = "half" not in match.bound
    if not interleaved and 2 * match["half"] != shape(x)[-1]:
        return Miss("the channels are not split into halves", (root.name,))
    return Builder(graph).call(ROPE, x, cos, sin, interleaved)


def _partial_rope(graph: fx.Graph, root: fx.Node, match: Match) -> fx.Node | Miss:
    x, size = match["x"], match["size"]
    if match["from"] != size or match["axis"] not in (-1, len(shape(x)) - 1):
        return Miss("the unchanged channels are not those after the rotated ones", (root.name,))
    if match["dim"] not in (-1, len(shape(x)) - 1) or shape(match["cos"])[-1] != size:
        return Miss("the rotated channels are not the leading ones", (root.name,))
    op = ROPE
    return Builder(graph).call(op, x, match["cos"], match["sin"], match["interleaved"])


_partial_rope_pattern = Op(
    "aten.cat.default",
    [
        Op(
            "reroll.rope.default",
            Op("aten.slice.Tensor", Var("x"), Number("dim"), 0, Number("size")),
            Var("cos"),
            Var("sin"),
            Number("interleaved"),
        ),
        Op("aten.slice.Tensor", Var("x"), Number("dim"), Number("from"), Number("end")),
    ],
    Number("axis"),
)


# gated linear unit

_gate = Var("gate")
_ACTIVATIONS = {
    "silu": Op("aten.silu.default", _gate),
    "gelu": Op("aten.gelu.default", _gate, "none"),
    "gelu_tanh": Op("aten.gelu.default", _gate, "tanh"),
    "relu": Op("aten.relu.default", _gate),
}
_PROJECTIONS = ("aten.linear", "aten.slice", "aten.mm", "aten.bmm", "getitem", "aten.select")


def _projected(node: fx.Node) -> bool:
    return any(part in str(node.target) for part in _PROJECTIONS)


def _glu(activation: str) -> Callable[[fx.Graph, fx.Node, Match], fx.Node | Miss]:
    def rewrite(graph: fx.Graph, root: fx.Node, match: Match) -> fx.Node | Miss:
        gate, up = match["gate"], match["up"]
        if shape(gate) != shape(up) or dtype(gate) != dtype(up):
            return Miss("gate and up differ in shape", (gate.name, up.name))
        return Builder(graph).call(GLU, gate, up, activation)

    return rewrite


# the tanh form of GELU, written out

_g = Var("x")
_cube = either(Op("aten.pow.Tensor_Scalar", _g, 3), Op(MUL, Op(MUL, _g, _g), _g, commutes=True))
_inner = either(
    Op(MUL, Op(ADD, _g, Op(MUL, _cube, Number("c"), commutes=True), commutes=True), Number("k")),
    Op(
        MUL,
        Op(MUL, _g, Number("k")),
        Op(ADD, Op(MUL, Op(MUL, _g, Number("c")), _g, commutes=True), 1),
        commutes=True,
    ),
)
_gelu_tanh = Op(MUL, Op(MUL, _g, 0.5), Op(ADD, Op("aten.tanh.default", _inner), 1), commutes=True)


def _gelu(graph: fx.Graph, root: fx.Node, match: Match) -> fx.Node | Miss:
    node = Builder(graph).call(aten.gelu.default, match["x"])
    node.kwargs = {"approximate": "tanh"}
    return node


# linear


def _split_linear(graph: fx.Graph, root: fx.Node, match: Match) -> fx.Node | Miss:
    """Replace `linear` on flattened tokens, with a reshape after it, by `linear` on the tokens."""
    x = match["x"]
    if (
        shape(root)[:-1] != shape(x)[:-1]
        or match["start"] != 0
        or match["stop"] != len(shape(x)) - 2
    ):
        return Miss("the reshape does not undo the flattening", (root.name,))
    return Builder(graph).call(aten.linear.default, x, match["weight"], match.bound.get("bias"))


_flat_tokens = Op("aten.flatten.using_ints", Var("x"), Number("start"), Number("stop"))
_flat_linear = either(
    Op("aten.linear.default", _flat_tokens, Var("weight", is_weight)),
    Op("aten.linear.default", _flat_tokens, Var("weight", is_weight), Var("bias", is_weight)),
)


RULES = (
    RewriteRule(
        "rms_norm",
        cast(Op(MUL, cast(_normed), either(_shifted, _weight), commutes=True)),
        _rms_norm,
    ),
    RewriteRule("rms_norm", cast(_normed), _rms_norm),
    RewriteRule("rms_norm", Op("aten.rms_norm.default", ANY, ANY, ANY, ANY), _aten_rms_norm),
    RewriteRule(
        "layer_norm",
        cast(Op(ADD, Op(MUL, cast(_ln_normed), _weight, commutes=True), _bias, commutes=True)),
        _layer_norm,
    ),
    RewriteRule("layer_norm", cast(Op(MUL, cast(_ln_normed), _weight, commutes=True)), _layer_norm),
    RewriteRule("layer_norm", cast(_ln_normed), _layer_norm),
    RewriteRule("rope", _rope_pattern, _rope),
    RewriteRule("rope", _partial_rope_pattern, _partial_rope),
    RewriteRule("linear", Op("aten.reshape.default", _flat_linear, ANY), _split_linear),
    RewriteRule("gelu", _gelu_tanh, _gelu),
    *(
        RewriteRule("glu", Op(MUL, pattern, Var("up", _projected), commutes=True), _glu(activation))
        for activation, pattern in _ACTIVATIONS.items()
    ),
)
