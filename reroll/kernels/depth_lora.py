"""Triton kernel: a linear layer with a low-rank residual for each row's own depth, in one launch.

y = x W^T + (x A_d^T) B_d^T, where d is the depth of a row. This is the relaxed recursive layer of
arXiv 2410.20672, equation 3. Under continuous depth-wise batching (section 3.8 there), the rows of
a batch are in different trips of a loop. Rows are sorted by depth into tiles of one depth each. W
is read once for all of them, and the tile of x is shared by all three products.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from reroll.kernels.diagonal import number_type

# the most rows of a tile: the number of rows in a product of a tensor core
ROWS = 16


def depth_lora_reference(
    x: Tensor, weight: Tensor, down: Tensor, up: Tensor, depth: Tensor
) -> Tensor:
    """Compute the definition in fp32, and return [rows, N].

    The shapes are x [rows, K], weight [N, K], down [depths, R, K], up [depths, N, R], depth [rows].
    """
    x, weight, down, up = (t.float() for t in (x, weight, down, up))
    low = torch.einsum("mk,mrk->mr", x, down[depth])
    return x @ weight.T + torch.einsum("mr,mnr->mn", low, up[depth])


@triton.jit
def depth_lora_tile(
    x, weight, down, up, y, order, tiles, x_m, y_m, N, K,
    R: tl.constexpr, DT: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    BR: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Compute one tile; grid (blocks of N, tiles).

    `tiles` has for each tile its depth (below 0: unused), the first of its rows in `order`, and
    their number.
    """
    i_n, i_m = tl.program_id(0), tl.program_id(1)
    depth = tl.load(tiles + i_m * 3).to(tl.int64)
    if depth < 0:
        return
    first, count = tl.load(tiles + i_m * 3 + 1), tl.load(tiles + i_m * 3 + 2)
    om, on, orank = tl.arange(0, BM), i_n * BN + tl.arange(0, BN), tl.arange(0, BR)
    here, in_n, in_r = om < count, on < N, orank < R
    row = tl.load(order + first + om, mask=here, other=0).to(tl.int64)
    down += depth * R * K
    up += depth * N * R
    acc = tl.zeros([BM, BN], dtype=tl.float32)
    low = tl.zeros([BM, BR], dtype=tl.float32)
    for j in range(tl.cdiv(K, BK)):
        ok = j * BK + tl.arange(0, BK)
        in_k = ok < K
        b_x = tl.load(x + row[:, None] * x_m + ok[None, :], mask=here[:, None] & in_k[None, :],
                      other=0.0).to(DT)  # fmt: skip
        b_w = tl.load(weight + on[None, :] * K + ok[:, None], mask=in_n[None, :] & in_k[:, None],
                      other=0.0).to(DT)  # fmt: skip
        b_a = tl.load(down + orank[None, :] * K + ok[:, None], mask=in_r[None, :] & in_k[:, None],
                      other=0.0).to(DT)  # fmt: skip
        acc = tl.dot(b_x, b_w, acc=acc, input_precision=PRECISION)
        low = tl.dot(b_x, b_a, acc=low, input_precision=PRECISION)
    b_b = tl.load(up + on[None, :] * R + orank[:, None], mask=in_n[None, :] & in_r[:, None],
                  other=0.0).to(DT)  # fmt: skip
    acc = tl.dot(low.to(DT), b_b, acc=acc, input_precision=PRECISION)
    tl.store(
        y + row[:, None] * y_m + on[None, :], acc.to(y.dtype.element_ty),
        mask=here[:, None] & in_n[None, :],
    )  # fmt: skip


def tiles_by_depth(depth: Tensor, depths: int, size: int) -> tuple[Tensor, Tensor]:
    """Sort rows by their depth, and cut them into tiles of up to `size` rows of one depth each.

    Returns `order` [rows] and [tiles, 3] of depth, first row, number of rows. The number of tiles
    depends on the shapes alone, so that the host does not wait for the GPU. Depths below 0 are left
    out.
    """
    rows = depth.shape[0]
    order = depth.argsort(stable=True).int()
    every = torch.arange(depths, device=depth.device)
    counts = (depth[None, :] == every[:, None]).sum(1)
    first = (depth < 0).sum() + counts.cumsum(0) - counts
    parts = (counts + size - 1) // size
    ends = parts.cumsum(0)
    number = torch.arange(depths + triton.cdiv(rows, size), device=depth.device)
    at = torch.searchsorted(ends, number, right=True)
    valid, at = at < depths, at.clamp(max=depths - 1)
    inside = (number - (ends - parts)[at]) * size
    tiles = torch.stack(
        [torch.where(valid, at, -1), first[at] + inside, (counts[at] - inside).clamp(max=size)], 1
    )
    return order, tiles.int().contiguous()


def depth_lora(
    x: Tensor, weight: Tensor, down: Tensor, up: Tensor, order: Tensor, table: Tensor,
    tiles: dict[str, Any], precision: str = "ieee",
) -> Tensor:  # fmt: skip
    """Compute `depth_lora_reference`; rows at a depth below 0 are not written.

    `order` and `table` are `tiles_by_depth` of at most BM rows, and `tiles` has BM, BN, BK.
    """
    rows, (outputs, inputs), rank = x.shape[0], weight.shape, down.shape[1]
    y = x.new_empty(rows, outputs)
    depth_lora_tile[(triton.cdiv(outputs, tiles["BN"]), len(table))](
        x, weight, down, up, y, order, table, x.stride(0), y.stride(0), outputs, inputs,
        R=rank, DT=number_type(x), BR=max(16, triton.next_power_of_2(rank)), PRECISION=precision,
        **tiles,
    )  # fmt: skip
    return y
