"""Lower convolutions and pooling, over one or two dimensions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from reroll.errors import ExportError
from reroll.export.onnx.graph import TARGET, Value
from reroll.export.onnx.ops.arguments import shape_of
from reroll.rewrite.ir.lowerings import lowering, op_name
from reroll.rewrite.ir.matching import shape

if TYPE_CHECKING:
    from reroll.export.onnx.emit.translate import Translator

INT = torch.int64


@lowering(TARGET, "aten::conv1d", "aten::conv2d")
def conv(
    g: Translator,
    node: fx.Node,
    x: Any,
    weight: Any,
    bias: Any = None,
    stride: Sequence[int] = (),
    padding: Any = (),
    dilation: Sequence[int] = (),
    groups: int = 1,
) -> Value:
    """Lower a convolution."""
    dims, dtype = len(shape(node)) - 2, g.dtype(node)
    dilations = _each(dilation, dims, 1)
    kernel = shape_of(node, 1)[2:]
    pads = _same(kernel, dilations) if padding == "same" else [*_pads(padding, dims)] * 2
    return g.op(
        "Conv",
        g.tensor(x, dtype),
        g.tensor(weight, dtype),
        None if bias is None else g.tensor(bias, dtype),
        strides=_each(stride, dims, 1),
        pads=pads,
        dilations=dilations,
        group=groups,
    )


@lowering(TARGET, "aten::conv_transpose1d.default", "aten::conv_transpose2d.input")
def conv_transpose(
    g: Translator,
    node: fx.Node,
    x: Any,
    weight: Any,
    bias: Any = None,
    stride: Sequence[int] = (),
    padding: Any = (),
    output_padding: Any = (),
    groups: int = 1,
    dilation: Sequence[int] = (),
) -> Value:
    """Lower a transposed convolution."""
    dims, dtype = len(shape(node)) - 2, g.dtype(node)
    return g.op(
        "ConvTranspose",
        g.tensor(x, dtype),
        g.tensor(weight, dtype),
        None if bias is None else g.tensor(bias, dtype),
        strides=_each(stride, dims, 1),
        pads=[*_pads(padding, dims)] * 2,
        output_padding=_each(output_padding, dims, 0),
        dilations=_each(dilation, dims, 1),
        group=groups,
    )


def _each(values: Any, dims: int, default: int) -> list[int]:
    numbers: list[int] = [values] if isinstance(values, int) else list(values) or [default]
    return numbers * dims if len(numbers) == 1 else numbers


def _pads(padding: Any, dims: int) -> list[int]:
    return [0] * dims if padding == "valid" else _each(padding, dims, 0)


def _same(kernel: Sequence[int], dilations: Sequence[int]) -> list[int]:
    """Return the padding, before and then after, with which a convolution keeps its size."""
    whole = [d * (k - 1) for k, d in zip(kernel, dilations, strict=True)]
    before = [w // 2 for w in whole]
    return [*before, *(w - b for w, b in zip(whole, before, strict=True))]


@lowering(TARGET, "aten::max_pool1d.default", "aten::max_pool2d.default")
def max_pool(
    g: Translator,
    node: fx.Node,
    x: Any,
    kernel: Any,
    stride: Any = (),
    padding: Any = 0,
    dilation: Any = 1,
    ceil_mode: bool = False,
) -> Value:
    """Compute the largest element under a kernel."""
    dilations = _each(dilation, _dims(node), 1)
    options = {"dilations": dilations, "ceil_mode": int(ceil_mode)}
    return _pooled(g, "MaxPool", node, x, kernel, stride, padding, **options)


@lowering(TARGET, "aten::avg_pool1d.default", "aten::avg_pool2d.default")
def avg_pool(
    g: Translator,
    node: fx.Node,
    x: Any,
    kernel: Any,
    stride: Any = (),
    padding: Any = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> Value:
    """Compute the mean of the elements under a kernel."""
    if divisor_override is not None or ceil_mode:
        raise ExportError(
            "pooling with a divisor of its own, or with ceil_mode, has no lowering to ONNX",
            hint="pad the input by hand",
        )
    counted = int(count_include_pad)
    return _pooled(g, "AveragePool", node, x, kernel, stride, padding, count_include_pad=counted)


def _dims(node: fx.Node) -> int:
    return 1 if "1d" in op_name(node.target) else 2


def _pooled(
    g: Translator,
    kind: str,
    node: fx.Node,
    x: Any,
    kernel: Any,
    stride: Any,
    padding: Any,
    **options: Any,
) -> Value:
    """Lower a pooling, also of a tensor without a batch, which ONNX does not support."""
    dims = _dims(node)
    options["kernel_shape"] = sizes = _each(kernel, dims, 1)
    options["strides"] = _each(stride, dims, 1) if stride else sizes
    if padding is not None:
        options["pads"] = [*_each(padding, dims, 0)] * 2
    x = g.tensor(x, g.dtype(node))
    if len(shape(node)) == dims + 2:
        return g.op(kind, x, **options)
    made = g.op(kind, g.op("Unsqueeze", x, g.ints(0)), **options)
    return g.op("Squeeze", made, g.ints(0))


@lowering(TARGET, "aten::adaptive_avg_pool1d.default", "aten::adaptive_avg_pool2d.default")
def adaptive_avg_pool(g: Translator, node: fx.Node, x: Any, sizes: Sequence[int]) -> Value:
    """Compute the means of equal parts, with a given number along each dimension."""
    dims = _dims(node)
    before = shape_of(node)[-dims:]
    wanted = _each(sizes, dims, 1)
    if all(size == 1 for size in wanted):
        axes = g.ints(*range(-dims, 0))
        return g.op("ReduceMean", g.tensor(x, g.dtype(node)), axes, keepdims=1)
    if any(isinstance(b, str) or b % size for b, size in zip(before, wanted, strict=True)):
        raise ExportError(
            f"adaptive pooling of {list(before)} to {wanted}, which does not divide it, has no "
            "lowering to ONNX",
            hint="choose sizes that divide the input's",
        )
    kernel = [b // size for b, size in zip(before, wanted, strict=True)]
    return _pooled(g, "AveragePool", node, x, kernel, kernel, None)


@lowering(TARGET, "aten::im2col.default")
def im2col(
    g: Translator,
    node: fx.Node,
    x: Any,
    kernel: Any,
    dilation: Any = 1,
    padding: Any = 0,
    stride: Any = 1,
) -> Value:
    """Return all patches under a kernel as columns, by a convolution with one-hot kernels."""
    high, wide = _each(kernel, 2, 1)
    channels, dtype = shape_of(node)[1], g.dtype(node)
    picks = torch.eye(high * wide).reshape(high * wide, 1, high, wide).repeat(channels, 1, 1, 1)
    made = g.op(
        "Conv",
        g.tensor(x, dtype),
        g.number(picks, dtype),
        strides=_each(stride, 2, 1),
        pads=[*_each(padding, 2, 0)] * 2,
        dilations=_each(dilation, 2, 1),
        group=channels,
    )
    return g.op("Reshape", made, g.ints(0, channels * high * wide, -1))


_RESIZE = {
    "aten::upsample_nearest1d.vec": "nearest",
    "aten::upsample_nearest2d.vec": "nearest",
    "aten::upsample_linear1d.vec": "linear",
    "aten::upsample_bilinear2d.vec": "linear",
    "aten::upsample_bicubic2d.vec": "cubic",
}


@lowering(TARGET, *_RESIZE)
def upsample(
    g: Translator,
    node: fx.Node,
    x: Any,
    size: Any = None,
    corners: Any = False,
    factors: Any = None,
) -> Value:
    """Resize by interpolation."""
    mode = _RESIZE[op_name(node.target)]
    if mode == "nearest":
        place, factors = "asymmetric", corners
    else:
        place = "align_corners" if corners else "pytorch_half_pixel"
    if factors:
        raise ExportError(
            "interpolation by a factor has no lowering to ONNX", hint="give the size instead"
        )
    return g.op(
        "Resize",
        g.tensor(x, g.dtype(node)),
        None,
        None,
        g.shape(shape(node)),
        mode=mode,
        coordinate_transformation_mode=place,
        nearest_mode="floor" if mode == "nearest" else None,
        cubic_coeff_a=-0.75 if mode == "cubic" else None,
    )
