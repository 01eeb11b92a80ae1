"""Block sizes of the kernels for each GPU, from the manifest that `audit.sweep` writes.

An entry is `family/target/dtype/gate/size/chunk`, as `key` writes it for a call. `size` is the
larger of the two head sizes, rounded up to a power of two. Kernels of one family share their BT.
"""

from __future__ import annotations

import json
from functools import cache
from importlib import resources
from typing import Any

import torch
import triton
from torch import Tensor

from reroll.kernels import interpreter

TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")
CHUNKS = (64, 32, 16)

Tiles = dict[str, dict[str, Any]]

_NAMES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}


def number_name(dtype: torch.dtype, precision: str) -> str:
    """Return the type of a kernel's products: bf16, fp16, tf32 or ieee."""
    return precision if dtype == torch.float32 else _NAMES[dtype]


def key(family: str, target: str, numbers: str, gate: int, size: int, chunk: int) -> str:
    """Return the name of an entry of the manifest."""
    return f"{family}/{target}/{numbers}/gate{gate}/{size}/{chunk}"


def head_size(k: int, v: int) -> int:
    """Return the larger head size, rounded up to a power of two from 64."""
    size: int = triton.next_power_of_2(max(k, v))
    return max(64, size)


def find_tiles(
    family: str, k: Tensor, v: Tensor, gate: int, precision: str, limit: int
) -> Tiles | None:
    """Return the tiles for these keys and values, or None.

    Chunks have `limit` tokens or fewer.
    """
    size = max(k.shape[-1], v.shape[-1])
    return tiles_for(family, target(k.device), k.dtype, precision, gate, size, limit)


def tiles_for(
    family: str, target: str, dtype: torch.dtype, precision: str, gate: int, size: int, limit: int
) -> Tiles | None:
    """Return the tiles on a target for heads of `size`; None if there are none without spills."""
    if gate < 2:
        # a decay per head does not limit the chunk, and no decay is a log decay of 0
        gate, limit = 1, max(CHUNKS)
    numbers = number_name(dtype, precision)
    if numbers == "fp16" or family == "step":
        # fp16 uses the tiles of bf16, which need as many registers. A step always computes in fp32
        numbers = "bf16"
    for chunk in CHUNKS:
        entry = manifest().get(key(family, target, numbers, gate, head_size(size, size), chunk))
        if chunk <= limit and entry is not None:
            tiles: Tiles = entry["tiles"]
            return tiles
    return None


def selective_tiles(target: str, size: int) -> Any:
    """Return the tiles of the selective scan for states of `size` rows, or None."""
    found: int = max(16, triton.next_power_of_2(size))
    # it computes in fp32, whatever it loads
    entry = manifest().get(key("selective", target, "ieee", 3, found, 16))
    return None if entry is None else entry["tiles"]


def convolution_tiles(target: str, dtype: torch.dtype, filter_size: int) -> Any:
    """Return the tiles of short convolutions with a filter of so many tokens, or None."""
    size = 4 if filter_size <= 4 else 16 if filter_size <= 16 else filter_size
    # it computes in fp32, and loads fp16 as bf16
    numbers = {torch.float32: "ieee", torch.float16: "bf16"}.get(dtype, _NAMES.get(dtype, ""))
    entry = manifest().get(key("short_convolution", target, numbers, 0, size, 16))
    return None if entry is None else entry["tiles"]


def vocabulary_tiles(target: str, dtype: torch.dtype, precision: str) -> Any:
    """Return the tile of `confidence`, or None."""
    return _tile("confidence", "confidence_part", target, dtype, precision, 1024)


def depth_tiles(target: str, dtype: torch.dtype, precision: str, rank: int) -> Any:
    """Return the tile of `depth_lora` with a low-rank residual of up to `rank`, or None."""
    size = 16 if rank <= 16 else 64 if rank <= 64 else rank
    return _tile("depth_lora", "depth_lora_tile", target, dtype, precision, size)


def _tile(
    family: str, kernel: str, target: str, dtype: torch.dtype, precision: str, size: int
) -> Any:
    # fp16 uses the tiles of bf16, and fp64 has none
    listed = torch.bfloat16 if dtype == torch.float16 else dtype
    if listed not in (torch.float32, torch.bfloat16):
        return None
    entry = manifest().get(key(family, target, number_name(listed, precision), 0, size, 16))
    return None if entry is None else entry["tiles"][kernel]


def linear_tiles(target: str, dtype: torch.dtype, gated: bool, rank: int) -> Any:
    """Return the tile of `linear_rows` with a low-rank residual of up to `rank`, or None."""
    size = 0 if rank == 0 else 16 if rank <= 16 else 64
    numbers = number_name(dtype, "ieee")
    entry = manifest().get(key("linear_rows", target, numbers, int(gated), size, 16))
    return None if entry is None else entry["tiles"]["linear_rows_tile"]


@cache
def manifest() -> dict[str, Any]:
    """Return the entries of the manifest by key."""
    text = resources.files("reroll.kernels").joinpath("manifest.json").read_text("utf-8")
    entries: dict[str, Any] = json.loads(text)["entries"]
    return entries


@cache
def target(device: torch.device) -> str:
    """Return the GPU whose tiles to use: the nearest older one, or sm_90 in the interpreter."""
    if device.type != "cuda" or interpreter.active():
        return "sm_90"
    if torch.version.hip:
        return "gfx942"
    major, _ = torch.cuda.get_device_capability(device)
    return "sm_80" if major < 9 else "sm_90" if major < 10 else "sm_100"
