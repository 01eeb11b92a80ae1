"""Families of kernels, and the shapes for which they are shipped.

A family is a launch function and the kernels that it launches, under one choice of BT.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from reroll.kernels import (
    confidence,
    delta,
    depth_lora,
    diagonal,
    diagonal_backward,
    diagonal_fused,
    linear_rows,
    pointwise,
    selective,
    selective_backward,
    short_convolution,
    step,
    window,
)
from reroll.kernels.audit import candidates
from reroll.kernels.audit.candidates import Tile, Variant
from reroll.kernels.configurations import Tiles


@dataclass(frozen=True)
class Family:
    """Kernels that are launched together.

    `plans` are the alternative sets of kernels, the preferred one first; `call` launches them.
    Tiles must work with each number in `groups`, the query heads for a key-value head.
    """

    name: str
    plans: Callable[[Variant], list[tuple[str, ...]]]
    candidates: Callable[[str, int, Variant], Iterator[Tile]]
    variants: tuple[Variant, ...]
    call: Callable[[Variant, Tiles], Any]
    groups: tuple[int, ...] = (1,)


def _shapes(variant: Variant) -> dict[str, Tensor]:
    size, heads, time, batch = variant.size, 4, 1024, 1 if variant.packed else 2

    def empty(*shape: int, dtype: torch.dtype = variant.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    q = empty(batch, time, heads * variant.groups, size).transpose(1, 2)
    k, v = (empty(batch, time, heads, size).transpose(1, 2) for _ in range(2))
    shape = (batch, heads, time) if variant.gate == 1 else (batch, heads, time, size)
    tensors = {"q": q, "k": k, "v": v, "start": empty(2, heads, size, size, dtype=torch.float32)}
    if variant.gate:
        tensors["g"] = empty(*shape, dtype=torch.float32)
    if variant.packed:
        tensors["starts"] = empty(3, dtype=torch.int32)
    return tensors


def _forward(variant: Variant, tiles: Tiles) -> Any:
    x = _shapes(variant)
    return diagonal.forward(
        x["q"], x["k"], x["v"], x.get("g"), x["start"], x.get("starts"), 0.5, tiles,
        variant.precision,
    )  # fmt: skip


def _backward(variant: Variant, tiles: Tiles) -> Any:
    x = _shapes(variant)
    run = diagonal_fused.fused_backward if "fused_back" in tiles else diagonal_backward.backward
    return run(
        x["q"], x["k"], x["v"], x.get("g"), x["start"], x.get("starts"),
        torch.empty_like(x["q"]), x["start"], 0.5, tiles, variant.precision,
    )  # fmt: skip


def _window(variant: Variant, tiles: Tiles) -> Any:
    x = _shapes(variant)
    far = torch.empty(2, 1024, 4 * variant.groups, variant.size + 1, device="meta")
    first = torch.empty(2, dtype=torch.int64, device="meta")
    return window.window_attention(
        x["q"], x["k"], x["v"], 0.125, 64, 4, far if variant.gate else None, first,
        tiles=tiles["window_attention_tile"], precision=variant.precision,
    )  # fmt: skip


def _depth_lora(variant: Variant, tiles: Tiles) -> Any:
    rows, inputs, outputs, rank = 32, 576, 1536, variant.size
    shapes = (rows, inputs), (outputs, inputs), (8, rank, inputs), (8, outputs, rank)
    x, weight, down, up = (torch.empty(s, dtype=variant.dtype, device="meta") for s in shapes)
    order, table = (torch.empty(n, dtype=torch.int32, device="meta") for n in (rows, (10, 3)))
    return depth_lora.depth_lora(
        x, weight, down, up, order, table, tiles["depth_lora_tile"], variant.precision
    )


def _confidence(variant: Variant, tiles: Tiles) -> Any:
    shapes = (32, variant.size), (49152, variant.size)
    hidden, weight = (torch.empty(s, dtype=variant.dtype, device="meta") for s in shapes)
    return confidence.confidence(
        hidden, weight, tiles["confidence_part"], precision=variant.precision
    )


def _linear_rows(variant: Variant, tiles: Tiles) -> Any:
    """Launch with norm, bias and residual; `size` is the rank of the low-rank residual."""
    rows, inputs, outputs, rank = 16, 576, 1536, variant.size

    def empty(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=variant.dtype, device="meta")

    low = (empty(rank, inputs), empty(outputs, rank)) if rank else (None, None)
    layer = linear_rows.Linear(empty(outputs, inputs), empty(outputs), *low)
    gated = bool(variant.gate)
    return linear_rows.linear_rows(
        empty(rows, inputs), linear_rows.Norm(empty(inputs), 1e-6), (layer,) * (1 + gated),
        "gelu_tanh" if gated else "", tiles=tiles["linear_rows_tile"], precision=variant.precision,
    )  # fmt: skip


def _pointwise(variant: Variant, tiles: Tiles) -> None:
    """Launch all kernels on rows of length `size`."""
    sizes = variant.size, 128
    row, head = (torch.empty(4, 64, n, dtype=variant.dtype, device="meta") for n in sizes)
    pointwise.norm(row, row[0, 0], 1e-6)
    angles = torch.empty(1, 1, 64, 64, device="meta")
    pointwise.turned(head[None], angles, angles)
    pointwise.gated(row, row, "gelu_tanh")


def _delta(variant: Variant, tiles: Tiles) -> Any:
    x = _shapes(variant)
    beta = torch.empty(x["k"].shape[:3], device="meta")
    return delta.delta_forward(
        x["q"], x["k"], x["v"], x.get("g"), beta, x["start"], x.get("starts"), 0.5, tiles,
        variant.precision,
    )  # fmt: skip


def _step(variant: Variant, tiles: Tiles) -> Any:
    x = {name: t[:, :, 0] if name != "start" else t for name, t in _shapes(variant).items()}
    # with the delta rule, the variant with the most work
    beta, slots = (torch.empty(*shape, device="meta") for shape in (x["k"].shape[:2], (2,)))
    return step.step(
        x["q"], x["k"], x["v"], x.get("g"), beta, x["start"], slots.int(), scale=0.5,
        activation=step.LOG_SIGMOID, floor=-2.5, unit=True, tiles=tiles["recurrent_step"],
    )  # fmt: skip


def _selective(variant: Variant, tiles: Tiles) -> Any:
    """Launch with `size` rows of the state, as many columns as Mamba has, and one rate for all."""
    x = _shapes(variant)
    width = torch.empty(2, 1024, 4, 1536, dtype=variant.dtype, device="meta").transpose(1, 2)
    dt = torch.empty_like(width, dtype=torch.float32)
    rate, start = (
        torch.empty(*shape, variant.size, 1536, device="meta") for shape in ((1, 4, 1), (2, 4))
    )
    given = x["q"], x["k"], width, dt, rate, start, x.get("starts")
    out, end = selective.forward(*given, tiles["selective_scan"])
    return selective_backward.backward(*given, out.transpose(1, 2), end, tiles)


def _short_convolution(variant: Variant, tiles: Tiles) -> Any:
    """Launch with a bias and a state; `size` is the tokens of the filter."""
    channels, kept = 4096, variant.size - 1
    shapes = (2, 1024, channels), (channels, variant.size), (channels,), (2, channels, kept)
    x, weight, bias, state = (torch.empty(s, dtype=variant.dtype, device="meta") for s in shapes)
    slots = torch.empty(2, dtype=torch.int64, device="meta")
    given = x.transpose(1, 2), weight, bias
    # each takes the tile of the other where the other is chosen
    part = {"BM": 1} | tiles["short_convolution_part"]
    one = {name: n for name, n in tiles["short_convolution_step"].items() if name != "BM"}
    short_convolution.step(x[:, 0], weight, bias, state, slots, tiles=one)
    return short_convolution.forward(*given, state, part)


def _variants() -> Iterator[Variant]:
    """Yield the shapes of chunked kernels; heads of 32 use the tiles of 64."""
    for size in (64, 128, 256):
        for numbers in ("bf16", "tf32"):
            yield Variant(numbers, 1, size, 64)
            yield Variant(numbers, 2, size, 32)
        # without tensor cores, only small chunks and heads fit into registers
        if size <= 128:
            yield Variant("ieee", 1, size, 16)
            yield Variant("ieee", 2, size, 16)


def _fused_variants() -> Iterator[Variant]:
    for variant in _variants():
        # larger states, of which there are two, and chunks of 64 need too many registers
        if variant.size == 64:
            yield replace(variant, limit=min(variant.limit, 32))


def _delta_variants() -> Iterator[Variant]:
    for variant in _variants():
        # the inverse of a longer chunk needs too many registers
        if variant.size <= 128:
            yield replace(variant, limit=min(variant.limit, 32))


def _step_variants() -> Iterator[Variant]:
    for size in (64, 128, 256):
        for gate in (1, 2):
            yield Variant("bf16", gate, size, 16)


# numbers of query heads for a state: one, and several, for which kernels loop
GROUPS = (1, 3)
# largest ranks of low-rank residuals; 0 is none
RANKS = (0, 16, 64)
NUMBERS = ("bf16", "tf32", "ieee")

FAMILIES = {
    family.name: family
    for family in (
        Family(
            "diagonal",
            # with a large state, outputs are computed in a separate launch by many programs
            lambda v: [("scan",), ("states", "read")][:: 1 if v.size <= 128 else -1],
            candidates.chunked,
            tuple(_variants()),
            _forward,
            GROUPS,
        ),
        Family(
            "diagonal_backward",
            lambda _: [("states", "scan_back", "gradients_qkg", "gradients_v")],
            candidates.chunked,
            tuple(_variants()),
            _backward,
            GROUPS,
        ),
        Family(
            "diagonal_fused",
            lambda _: [("fused_back",)],
            candidates.chunked,
            tuple(_fused_variants()),
            _backward,
            GROUPS,
        ),
        Family(
            "delta",
            lambda _: [("delta_scan",)],
            candidates.chunked,
            tuple(_delta_variants()),
            _delta,
            GROUPS,
        ),
        Family(
            "window",
            lambda _: [("window_attention_tile",)],
            candidates.squares,
            tuple(Variant(n, 1, s, 16) for n in NUMBERS for s in (64, 128)),
            _window,
        ),
        Family(
            "depth_lora",
            lambda _: [("depth_lora_tile",)],
            candidates.squares,
            tuple(Variant(n, 0, rank, 16) for n in NUMBERS for rank in (16, 64)),
            _depth_lora,
        ),
        Family(
            "linear_rows",
            lambda _: [("linear_rows_tile",)],
            candidates.few_rows,
            tuple(Variant(n, g, r, 16) for n in ("bf16", "ieee") for g in (0, 1) for r in RANKS),
            _linear_rows,
        ),
        Family(
            "pointwise",
            lambda _: [("norm_row", "rope_part", "glu_part")],
            candidates.nothing_to_choose,
            tuple(Variant(n, 0, 4096, 16) for n in ("bf16", "ieee")),
            _pointwise,
        ),
        Family(
            "confidence",
            lambda _: [("confidence_part",)],
            candidates.squares,
            tuple(Variant(n, 0, 1024, 16) for n in NUMBERS),
            _confidence,
        ),
        Family(
            "step",
            lambda _: [("recurrent_step",)],
            candidates.stepped,
            tuple(_step_variants()),
            _step,
            GROUPS,
        ),
        Family(
            "selective",
            lambda _: [("selective_scan", "selective_back")],
            candidates.columns,
            tuple(Variant("ieee", 3, size, 16) for size in (16, 32, 64, 128)),
            _selective,
            GROUPS,
        ),
        Family(
            "short_convolution",
            lambda _: [("short_convolution_part", "short_convolution_step")],
            candidates.channels,
            tuple(Variant(n, 0, size, 16) for n in ("bf16", "ieee") for size in (4, 16)),
            _short_convolution,
        ),
    )
}
# a kernel's name in its file, where it differs from that in the manifest
KERNEL_NAMES = {"states": "scan"}
