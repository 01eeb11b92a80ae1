"""Tiles that kernels may have, by the kind of call.

They are in order of preference: first those in which fewer programs repeat work, then smaller ones.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from reroll.kernels import depth_lora, linear_rows

Tile = dict[str, Any]


@dataclass(frozen=True)
class Variant:
    """A kind of call: the type of products, the gate, the head size, the limit of a chunk."""

    numbers: str
    gate: int
    size: int
    limit: int
    groups: int = 1
    packed: bool = False

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of queries, keys and values."""
        return {"bf16": torch.bfloat16, "fp16": torch.float16}.get(self.numbers, torch.float32)

    @property
    def precision(self) -> str:
        """Precision of products in fp32."""
        return self.numbers if self.dtype == torch.float32 else "ieee"


def _tile(bt: int, bk: int, bv: int, warps: int, stages: int = 1) -> Tile:
    return {"BT": bt, "BK": bk, "BV": bv, "num_warps": warps, "num_stages": stages}


def nothing_to_choose(kernel: str, bt: int, variant: Variant) -> Iterator[Tile]:
    """Yield the only tile, of a kernel that takes its block sizes from its shapes."""
    yield {}


def few_rows(kernel: str, bt: int, variant: Variant) -> Iterator[Tile]:
    """Yield tiles of few rows: narrow ones, so that a decoding step occupies many processors."""
    for columns, inputs, stages in ((16, 128, 3), (16, 64, 2), (32, 64, 2), (16, 32, 1)):
        yield {
            "BM": linear_rows.ROWS, "BN": columns, "BK": inputs, "num_warps": 4,
            "num_stages": stages,
        }  # fmt: skip


def squares(kernel: str, bt: int, variant: Variant) -> Iterator[Tile]:
    """Yield tiles of rows, columns and inputs: many rows in a prompt, few in a decoding step."""
    prompt = kernel == "window_attention_tile"
    for rows in (64, 32, 16) if prompt else (depth_lora.ROWS,):
        for columns in (64, 32, 16):
            tile = {"BM": rows, "BN": columns, "num_warps": 4, "num_stages": 2}
            yield tile if prompt else tile | {"BK": 64}


def chunked(kernel: str, bt: int, variant: Variant) -> Iterator[Tile]:
    """Yield tiles of the kernels of a chunked recurrence."""
    whole = max(16, variant.size)
    wide = [b for b in (64, 32, 16) if b <= whole]
    if kernel == "fused_back":
        for warps in (8, 4):
            yield _tile(bt, whole, whole, warps)
        return
    if kernel in ("scan", "delta_scan"):
        for bv in wide:
            for warps in (4, 8):
                yield _tile(bt, whole, bv, warps)
        return
    for block in wide:
        for other in wide:
            for warps in (4, 8):
                yield _tile(bt, block, other, warps)


def channels(kernel: str, bt: int, variant: Variant) -> Iterator[Tile]:
    """Yield tiles of channels: a warp reads them together, and a step has few of them."""
    if kernel == "short_convolution_step":
        for channels, warps in ((128, 4), (64, 2), (32, 1)):
            yield {"BC": channels, "num_warps": warps}
        return
    for rows, channels, warps in ((16, 64, 4), (8, 64, 4), (8, 32, 4)):
        yield {"BM": rows, "BC": channels, "num_warps": warps}


def columns(kernel: str, bt: int, variant: Variant) -> Iterator[Tile]:
    """Yield tiles of few columns, so that there are many programs."""
    for bv, warps in ((32, 1), (32, 2), (16, 1), (16, 2), (16, 4), (16, 8)):
        # few enough numbers of the state for each thread; with gradients there are five such tiles
        if variant.size * bv <= (16 if kernel == "selective_back" else 32) * 32 * warps:
            yield {"BV": bv, "num_warps": warps}


def stepped(kernel: str, bt: int, variant: Variant) -> Iterator[Tile]:
    """Yield tiles of the kernel for one token: few columns, so that each warp has enough work."""
    for bv, warps in ((16, 1), (16, 2), (8, 1), (8, 2), (8, 4)):
        yield {"BV": bv, "num_warps": warps}
