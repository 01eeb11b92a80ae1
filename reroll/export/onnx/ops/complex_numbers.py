"""Lower complex numbers, which ONNX lacks: rotary embeddings that multiply by them.

A complex tensor is a pair of real ones. Ops that only move elements apply to both alike.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from reroll.errors import ExportError
from reroll.export.onnx.graph import TARGET, Value
from reroll.rewrite.ir.lowerings import lowering, op_name

if TYPE_CHECKING:
    from reroll.export.onnx.emit.translate import Translator


@dataclass(frozen=True)
class Complex:
    """A complex tensor as its real and imaginary parts."""

    real: Value
    imaginary: Value


def by_parts(function: Callable[..., Any]) -> Callable[..., Any]:
    """Extend a lowering that moves elements to complex tensors."""

    @wraps(function)
    def applied(g: Translator, node: fx.Node, x: Any, *args: Any, **kwargs: Any) -> Any:
        if not isinstance(x, Complex):
            return function(g, node, x, *args, **kwargs)
        real, imaginary = (
            function(g, node, part, *args, **kwargs) for part in (x.real, x.imaginary)
        )
        if isinstance(real, tuple):
            return tuple(map(Complex, real, imaginary))
        return Complex(real, imaginary)

    return applied


@lowering(TARGET, "aten::view_as_complex.default")
def view_as_complex(g: Translator, node: fx.Node, x: Any) -> Complex:
    """Combine pairs in the last dimension into complex numbers."""
    x = g.tensor(x)
    return Complex(*(g.op("Gather", x, g.number(i, torch.int64), axis=-1) for i in (0, 1)))


@lowering(TARGET, "aten::view_as_real.default")
def view_as_real(g: Translator, node: fx.Node, x: Complex) -> Value:
    """Return complex numbers as pairs in a last dimension."""
    parts = (g.op("Unsqueeze", part, g.ints(-1)) for part in (x.real, x.imaginary))
    return g.op("Concat", *parts, axis=-1)


@lowering(TARGET, "aten::complex.default")
def from_parts(g: Translator, node: fx.Node, real: Any, imaginary: Any) -> Complex:
    """Make complex numbers from their parts."""
    return Complex(g.tensor(real), g.tensor(imaginary))


@lowering(TARGET, "aten::polar.default")
def polar(g: Translator, node: fx.Node, size: Any, angle: Any) -> Complex:
    """Make complex numbers from absolute value and angle."""
    size, angle = g.tensor(size), g.tensor(angle)
    return Complex(*(g.op("Mul", size, g.op(kind, angle)) for kind in ("Cos", "Sin")))


@lowering(TARGET, "aten::real.default", "aten::imag.default")
def one_part(g: Translator, node: fx.Node, x: Complex) -> Value:
    """Return the real or the imaginary part."""
    return x.real if "real" in op_name(node.target) else x.imaginary


@lowering(TARGET, "aten::conj.default", "aten::_conj.default", "aten::conj_physical.default")
def conjugate(g: Translator, node: fx.Node, x: Complex) -> Complex:
    """Negate the imaginary part."""
    return Complex(x.real, g.op("Neg", x.imaginary))


@lowering(TARGET, "aten::fft_fft.default", "aten::fft_fftn.default")
def fourier(
    g: Translator, node: fx.Node, x: Any, size: Any = None, dim: Any = None, norm: Any = None
) -> Complex:
    """Compute the Fourier transform along one dimension or several."""
    rank = len(node.meta["type"].shape)
    if size is not None or norm not in (None, "backward"):
        raise ExportError(
            f"{op_name(node.target)} with a size or a norm has no lowering to ONNX",
            hint="pad and scale by hand",
        )
    if dim is None:
        dim = -1 if "fftn" not in op_name(node.target) else range(rank)
    if isinstance(x, Complex):
        made = view_as_real(g, node, x)
    else:
        made = g.op("Unsqueeze", g.tensor(x), g.ints(-1))
    for axis in [dim] if isinstance(dim, int) else dim:
        made = g.op("DFT", made, None, g.number(axis % rank, torch.int64))
    return view_as_complex(g, node, made)


def complex_binary(g: Translator, node: fx.Node, kind: str, a: Any, b: Any) -> Complex:
    """Lower arithmetic in which at least one operand is complex."""
    if kind == "Mul":
        return _product(g, a, b)
    if kind == "Div" and not isinstance(b, Complex):
        b = g.tensor(b, a.real.dtype)
        return Complex(g.op("Div", a.real, b), g.op("Div", a.imaginary, b))
    if kind in ("Add", "Sub") and isinstance(a, Complex) and isinstance(b, Complex):
        return Complex(g.op(kind, a.real, b.real), g.op(kind, a.imaginary, b.imaginary))
    raise ExportError(
        f"{op_name(node.target)} of complex numbers has no lowering to ONNX",
        hint="rewrite it in real numbers before the export",
    )


def _product(g: Translator, a: Any, b: Any) -> Complex:
    if not isinstance(a, Complex):
        a, b = b, a
    if not isinstance(b, Complex):
        b = g.tensor(b, a.real.dtype)
        return Complex(g.op("Mul", a.real, b), g.op("Mul", a.imaginary, b))
    across, along = g.op("Mul", a.real, b.imaginary), g.op("Mul", a.real, b.real)
    return Complex(
        g.op("Sub", along, g.op("Mul", a.imaginary, b.imaginary)),
        g.op("Add", across, g.op("Mul", a.imaginary, b.real)),
    )
