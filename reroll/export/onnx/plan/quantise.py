"""Weight-only quantisation: integers by block, multiplied by MatMulNBits.

Each row of a matrix [outputs, inputs] is cut into blocks. A block is stored as unsigned integers q
of 4 or 8 bits with a scale s and a zero point z. It represents s (q - z). Activations stay floating
in the graph; ONNX Runtime rounds them to 8 bits inside the product (`accuracy_level` 4).

A table of embeddings that is also the output matrix is stored in 8 bits, whatever the others have.
It is looked up in the same bytes by GatherBlockQuantized.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from reroll.export.onnx.plan.settings import Settings
from reroll.export.onnx.plan.weights import Form
from reroll.rewrite.ir.program import Program
from reroll.rewrite.ir.weights.expressions import Meta

# smaller matrices, such as low-rank residuals, are not quantised
_LEAST = 64


def bits_of(settings: Settings, program: Program, name: str) -> int | None:
    """Return the number of bits of a weight, or None if it stays floating."""
    weight = program.weights[name]
    shape = weight.meta.shape
    if settings.bits is None or len(shape) != 2 or not weight.trainable:
        return None
    if min(shape) < _LEAST or shape[1] % settings.block or not _is_multiplied(program, name):
        return None
    return 8 if is_looked_up(program, name) else settings.bits


def is_looked_up(program: Program, name: str) -> bool:
    """Whether a weight is a table of embeddings, which is then stored untransposed."""
    tables = (torch.ops.aten.embedding.default, torch.ops.aten.index.Tensor)
    return any(
        node.op == "get_attr" and str(node.target) == name and user.target in tables
        for _, graph in program.graphs()
        for node in graph.nodes
        for user in node.users
    )


def _is_multiplied(program: Program, name: str) -> bool:
    """Whether a weight is the matrix of a projection, and is used as a table at most otherwise."""
    linear, table = torch.ops.aten.linear.default, torch.ops.aten.embedding.default
    users = [
        (node, user)
        for _, graph in program.graphs()
        for node in graph.nodes
        if node.op == "get_attr" and str(node.target) == name
        for user in node.users
    ]
    fits = all(
        (user.target is linear and user.args[1] is node and node not in user.args[:1])
        or (user.target is table and user.args[0] is node)
        for node, user in users
    )
    return fits and any(user.target is linear for _, user in users)


def forms(meta: Meta, bits: int, block: int) -> tuple[Form, Form, Form]:
    """Return the forms of the integers, the scales and the zero points of a matrix."""
    rows, columns = meta.shape
    blocks = columns // block
    name = f"int{bits}x{block}"

    def part(index: int, tensor: Tensor) -> Tensor:
        q, scale, zero = quantised(tensor, bits, block)
        return (_packed(q, bits), scale, _packed(zero, bits))[index]

    return (
        Form(name, torch.uint8, (rows, blocks, block * bits // 8), lambda t: part(0, t)),
        Form(f"{name}.scales", torch.float32, (rows, blocks), lambda t: part(1, t)),
        Form(
            f"{name}.zeros", torch.uint8, (rows, math.ceil(blocks * bits / 8)), lambda t: part(2, t)
        ),
    )


def quantised(weight: Tensor, bits: int, block: int) -> tuple[Tensor, Tensor, Tensor]:
    """Quantise a matrix: integers [rows, blocks, block], scales and zero points [rows, blocks].

    Of several scales for a block, that with the least squared error is used. In 4 bits, a slightly
    smaller scale than the one that covers all elements is often better.
    """
    x = weight.float().reshape(weight.shape[0], -1, block)
    low, high = x.amin(-1).clamp(max=0), x.amax(-1).clamp(min=0)
    top = 2**bits - 1
    best: tuple[Tensor, ...] | None = None
    for shrink in (1.0,) if bits == 8 else (1.0, 0.95, 0.9, 0.85, 0.8):
        scale = ((high - low) * shrink / top).clamp(min=torch.finfo(torch.float32).tiny)
        zero = (-low * shrink / scale).round().clamp(0, top)
        q = (x / scale[..., None] + zero[..., None]).round().clamp(0, top)
        error = ((q - zero[..., None]) * scale[..., None] - x).square().sum(-1)
        if best is None:
            best = (error, q, scale, zero)
            continue
        is_less = error < best[0]
        best = (
            torch.where(is_less, error, best[0]),
            torch.where(is_less[..., None], q, best[1]),
            torch.where(is_less, scale, best[2]),
            torch.where(is_less, zero, best[3]),
        )
    assert best is not None
    return best[1].to(torch.uint8), best[2], best[3].to(torch.uint8)


def dequantised(weight: Tensor, bits: int, block: int) -> Tensor:
    """Return the matrix that the quantised one represents."""
    q, scale, zero = quantised(weight, bits, block)
    x = (q.float() - zero.float()[..., None]) * scale[..., None]
    return x.reshape(weight.shape).to(weight.dtype)


def _packed(q: Tensor, bits: int) -> Tensor:
    """Pack pairs of 4-bit integers into bytes, the first in the low half."""
    if bits == 8:
        return q
    if q.shape[-1] % 2:
        q = torch.nn.functional.pad(q, (0, 1))
    return q[..., ::2] | (q[..., 1::2] << 4)
