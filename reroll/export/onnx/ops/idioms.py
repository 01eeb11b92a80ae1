"""Lower the parts of layers: projections, norms, rotary embedding, gates, caches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from reroll.errors import ExportError
from reroll.export.onnx.graph import TARGET, Value
from reroll.export.onnx.ops import windows
from reroll.export.onnx.ops.arguments import Parameter
from reroll.export.onnx.ops.heads import CONTRIB
from reroll.rewrite.ir.lowerings import lowering

if TYPE_CHECKING:
    from reroll.export.onnx.emit.translate import Translator

# inputs are rounded to 8 bits by block; 0 keeps them in fp32
ACCURACY = 4

# ---- projections


@lowering(TARGET, "aten::linear.default")
def linear(g: Translator, node: fx.Node, x: Any, weight: Any, bias: Any = None) -> Value:
    """Multiply x by the transposed weight [outputs, inputs], and add a bias."""
    dtype, rank = g.dtype(node), len(node.meta["type"].shape)
    x = g.tensor(x, dtype)
    if not isinstance(weight, Parameter) or weight.ref.is_transposed:
        made = g.op("MatMul", x, g.op("Transpose", g.tensor(weight, dtype), perm=[1, 0]))
    elif weight.read.how == "quantised":
        made = g.cast(_quantised_matmul(g, x, weight), dtype)
    elif weight.read.how == "plain":
        made = _gemm(g, node, x, weight)
    else:
        made = g.op("MatMul", x, g.tensor(weight, dtype, rank), hint=_hint(weight))
    return made if bias is None else g.op("Add", made, g.tensor(bias, dtype, rank))


def _gemm(g: Translator, node: fx.Node, x: Value, weight: Parameter) -> Value:
    """Multiply by a matrix that is stored untransposed, as Gemm allows for rank 2 only."""
    outputs, inputs = weight.shape
    source: Any = node.args[0]
    before, after = source.meta["type"].shape, node.meta["type"].shape
    flat = x if len(before) == 2 else g.op("Reshape", x, g.ints(-1, inputs))
    made = g.op("Gemm", flat, g.tensor(weight, x.dtype), transB=1, hint=_hint(weight))
    return made if len(before) == 2 else g.op("Reshape", made, g.shape([*after[:-1], outputs]))


def _hint(weight: Parameter) -> str:
    return weight.name.removesuffix(".weight").rpartition(".")[2]


@lowering(TARGET, "aten::matmul.default", "aten::bmm.default", "aten::mm.default")
def matmul(g: Translator, node: fx.Node, a: Any, b: Any) -> Value:
    """Multiply matrices."""
    return g.op("MatMul", g.tensor(a, g.dtype(node)), g.tensor(b, g.dtype(node)))


@lowering(TARGET, "aten::einsum.default")
def einsum(g: Translator, node: fx.Node, equation: str, operands: Sequence[Any], **_: Any) -> Value:
    """Sum products over the indices that an equation names."""
    values = [g.tensor(v, g.dtype(node)) for v in operands]
    return g.op("Einsum", *values, equation=equation.replace(" ", ""))


@lowering(TARGET, "aten::addmm.default", "aten::baddbmm.default")
def addmm(g: Translator, node: fx.Node, c: Any, a: Any, b: Any, **factors: Any) -> Value:
    """Multiply matrices, and add a third one."""
    dtype = g.dtype(node)
    made = g.op("MatMul", g.tensor(a, dtype), g.tensor(b, dtype))
    left, right = g.tensor(c, dtype), made
    if factors.get("alpha", 1) != 1:
        right = g.op("Mul", right, g.number(factors["alpha"], dtype))
    if factors.get("beta", 1) != 1:
        left = g.op("Mul", left, g.number(factors["beta"], dtype))
    return g.op("Add", left, right)


@lowering(TARGET, "aten::embedding.default")
def embedding(g: Translator, node: fx.Node, table: Any, ids: Any, *_: Any) -> Value:
    """Look up rows of a table."""
    ids = g.tensor(ids)
    if isinstance(table, Parameter) and table.read.how == "quantised":
        return g.cast(_quantised_rows(g, table, ids), g.dtype(node))
    return g.cast(g.op("Gather", g.tensor(table), ids, axis=0), g.dtype(node))


def _quantised_matmul(g: Translator, x: Value, weight: Parameter) -> Value:
    """Multiply by a quantised matrix."""
    outputs, inputs = weight.shape
    packed = weight.read.initializers[0]
    return g.op(
        "MatMulNBits",
        g.cast(x, torch.float32),
        *weight.tensors(),
        domain=CONTRIB,
        K=inputs,
        N=outputs,
        bits=packed.form.shape[-1] * 8 // g.settings.block,
        block_size=g.settings.block,
        accuracy_level=ACCURACY,
    )


def _quantised_rows(g: Translator, weight: Parameter, ids: Value) -> Value:
    """Look up rows of a quantised table."""
    packed, scales, zeros = weight.tensors()
    return g.op(
        "GatherBlockQuantized",
        packed,
        ids,
        scales,
        zeros,
        domain=CONTRIB,
        dtype=torch.float32,
        bits=8,
        block_size=g.settings.block,
        gather_axis=0,
        quantize_axis=1,
    )


# ---- norms


@lowering(TARGET, "reroll::rms_norm.default")
def rms_norm(
    g: Translator, node: fx.Node, x: Any, weight: Any, eps: float, offset: float = 0.0
) -> Value:
    """Lower to RMSNormalization, in fp32 inside; the offset is added to the stored weight."""
    x = g.tensor(x)
    rank, width = len(node.meta["type"].shape), node.meta["type"].shape[-1]
    if weight is None:
        scale = g.number([1.0] * width, x.dtype)
    else:
        scale = g.tensor(weight, x.dtype, rank)
        if offset and not isinstance(weight, Parameter):
            scale = g.op("Add", scale, g.number(offset, x.dtype))
    if not (isinstance(weight, Parameter) and weight.by_row):
        return g.op("RMSNormalization", x, scale, axis=-1, epsilon=eps)
    ones = g.number([1.0] * width, x.dtype)
    return g.op("Mul", g.op("RMSNormalization", x, ones, axis=-1, epsilon=eps), scale)


@lowering(TARGET, "aten::layer_norm.default")
def layer_norm(
    g: Translator,
    node: fx.Node,
    x: Any,
    shape: Sequence[int],
    weight: Any = None,
    bias: Any = None,
    eps: float = 1e-5,
    *_: Any,
) -> Value:
    """Lower to LayerNormalization over the last dimensions, in fp32 inside."""
    x, axis = g.tensor(x), -len(shape)
    rank = len(node.meta["type"].shape)
    given = [v for v in (weight, bias) if v is not None]
    if any(isinstance(v, Parameter) and v.by_row for v in given):
        made = layer_norm(g, node, x, shape, None, None, eps)
        if weight is not None:
            made = g.op("Mul", made, g.tensor(weight, x.dtype, rank))
        return made if bias is None else g.op("Add", made, g.tensor(bias, x.dtype, rank))
    scale = (
        g.tensor(weight, x.dtype) if weight is not None else g.number(torch.ones(*shape), x.dtype)
    )
    shift = g.tensor(bias, x.dtype) if bias is not None else None
    return g.op("LayerNormalization", x, scale, shift, axis=axis, epsilon=eps)


@lowering(TARGET, "aten::_weight_norm.default")
def weight_norm(g: Translator, node: fx.Node, v: Any, size: Any, dim: int = 0) -> Value:
    """Scale a weight so that its slices along one dimension have given lengths."""
    rank, dtype = len(node.meta["type"].shape), g.dtype(node)
    v, size = g.tensor(v, dtype), g.tensor(size, dtype)
    others = [i for i in range(rank) if i != dim % rank]
    length = g.op("ReduceL2", v, g.ints(*others), keepdims=1)
    return g.op("Mul", v, g.op("Div", size, length))


@lowering(TARGET, "aten::group_norm.default")
def group_norm(
    g: Translator,
    node: fx.Node,
    x: Any,
    groups: int,
    weight: Any = None,
    bias: Any = None,
    eps: float = 1e-5,
    *_: Any,
) -> Value:
    """Normalise each group of channels by its own mean and variance, in fp32.

    The input is [batch, channels, ...].
    """
    dims, dtype = node.meta["type"].shape, g.dtype(node)
    x = g.op("Reshape", g.tensor(x, torch.float32), g.ints(0, groups, -1))
    # after the reshape, the last dimension holds all positions of a group
    centred = g.op("Sub", x, g.op("ReduceMean", x, g.ints(2), keepdims=1))
    variance = g.op("ReduceMean", g.op("Mul", centred, centred), g.ints(2), keepdims=1)
    scale = g.op("Sqrt", g.op("Add", variance, g.number(eps, torch.float32)))
    made = g.cast(g.op("Reshape", g.op("Div", centred, scale), g.shape(dims)), dtype)
    for kind, value in (("Mul", weight), ("Add", bias)):
        if value is not None:
            by_channel = g.op("Reshape", g.tensor(value, dtype), g.ints(-1, *[1] * (len(dims) - 2)))
            made = g.op(kind, made, by_channel)
    return made


# ---- rotary embedding and gates


@lowering(TARGET, "reroll::rope.default")
def rope(
    g: Translator, node: fx.Node, x: Any, cos: Any, sin: Any, interleaved: bool = False
) -> Value:
    """Lower to RotaryEmbedding if both tables are one half twice, as that operator requires.

    Other rotary embeddings are written out.
    """
    x, cos, sin = g.tensor(x), g.tensor(cos), g.tensor(sin)
    types: list[Any] = [arg.meta["type"].shape for arg in node.args[:2]]  # type: ignore[union-attr]
    width, size = types[0][-1], types[1][-1]
    fits = len(types[0]) == 4 and len(types[1]) == 4 and types[1][1] == 1
    if not interleaved and cos.repeated and sin.repeated and fits:
        # the first half of each table: [batch, 1, time, size] as [batch, time, size / 2]
        halves = []
        for table in (cos, sin):
            half = g.op("Slice", table, g.ints(0), g.ints(size // 2), g.ints(-1), g.ints(1))
            halves.append(g.cast(g.op("Squeeze", half, g.ints(1)), x.dtype))
        if types[1][0] != types[0][0]:
            # one row of positions for the whole batch, which the operator does not broadcast
            rows = g.shape([types[0][0], 1, 1])
            halves = [g.op("Expand", half, rows) for half in halves]
        part = size if size < width else 0
        how = {"rotary_embedding_dim": part, "interleaved": 0}
        made = g.op("RotaryEmbedding", x, *halves, **how)
        if x.heads is None or x.heads.axis != 1:
            return made
        flat = g.op("RotaryEmbedding", x.heads.flat, *halves, num_heads=types[0][1], **how)
        return replace(made, heads=replace(x.heads, flat=flat))
    cos, sin = g.cast(cos, x.dtype), g.cast(sin, x.dtype)
    turned, rest = x, None
    if size < width:
        turned, rest = g.graph.ops(
            "Split", x, g.ints(size, width - size), hints=("turned", "rest"), axis=-1
        )
    other = _interleaved(g, node, turned, size) if interleaved else _quarter(g, turned, size)
    made = g.op("Add", g.op("Mul", turned, cos), g.op("Mul", other, sin))
    return made if rest is None else g.op("Concat", made, rest, axis=-1)


def _quarter(g: Translator, x: Value, size: int) -> Value:
    """Return (-second half, first half)."""
    first, second = g.graph.ops(
        "Split", x, g.ints(size // 2, size // 2), hints=("first", "second"), axis=-1
    )
    return g.op("Concat", g.op("Neg", second), first, axis=-1)


def _interleaved(g: Translator, node: fx.Node, x: Value, size: int) -> Value:
    """Return each pair (a, b) as (-b, a)."""
    source: Any = node.args[0]
    shape = source.meta["type"].shape
    parts = [g.op("Slice", x, g.ints(i), g.ints(2**62), g.ints(-1), g.ints(2)) for i in (1, 0)]
    axis = g.ints(len(shape))
    pairs = [g.op("Unsqueeze", v, axis) for v in (g.op("Neg", parts[0]), parts[1])]
    return g.op("Reshape", g.op("Concat", *pairs, axis=-1), g.shape([*shape[:-1], size]))


@lowering(TARGET, "aten::glu.default")
def halves(g: Translator, node: fx.Node, x: Any, dim: int = -1) -> Value:
    """Multiply one half of a dimension by the sigmoid of the other."""
    parts = g.graph.ops("Split", g.tensor(x), hints=("up", "gate"), axis=dim, num_outputs=2)
    return g.op("Mul", parts[0], g.op("Sigmoid", parts[1]))


@lowering(TARGET, "reroll::glu.default")
def glu(g: Translator, node: fx.Node, gate: Any, up: Any, activation: str) -> Value:
    """Compute activation(gate) * up."""
    gate, up = g.tensor(gate), g.tensor(up)
    return g.op("Mul", activate(g, gate, activation), up)


def activate(g: Translator, x: Value, activation: str) -> Value:
    """Apply an activation function of `glu`."""
    if activation == "silu":
        return g.op("Mul", x, g.op("Sigmoid", x))
    if activation in ("gelu", "gelu_tanh"):
        return g.op("Gelu", x, approximate="tanh" if activation == "gelu_tanh" else "none")
    if activation in ("relu", "sigmoid"):
        return g.op(activation.capitalize(), x)
    raise ExportError(f"the activation {activation!r} has no lowering to ONNX")


@lowering(TARGET, "reroll::cache.default")
def cache(g: Translator, node: fx.Node, k: Any, v: Any, length: Any = None) -> Any:
    """Append new keys and values to a cache, and return all of them."""
    k, v = g.tensor(k), g.tensor(v)
    if all(g.states.ring(number) is not None for number in g.states.of(g, node)):
        return windows.append(g, node, k, v)
    return g.states.append(g, node, k, v)
