"""Estimate whether weights shared by trips stay in the processor's cache until they are reused.

Decoding one token reads every weight, so memory bandwidth bounds its time. Trips that share a block
save time only if the block is still in the cache at its next use.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import torch

from reroll.rewrite.ir.program import Loop, Program, weight_nodes

PRECISIONS = {"fp32": 4.0, "bf16": 2.0, "int8": 1.0}

_SYSTEM = Path("/sys/devices/system/cpu/cpu0/cache")
_UNITS = {"K": 2**10, "M": 2**20, "G": 2**30}


def last_level_cache() -> int | None:
    """Return the bytes of this machine's last-level cache; None if unknown."""
    sizes: dict[int, int] = {}
    for index in sorted(_SYSTEM.glob("index*")):
        try:
            level = int((index / "level").read_text())
            text = (index / "size").read_text().strip()
        except (OSError, ValueError):
            continue
        if text[:-1].isdigit() and text[-1] in _UNITS:
            sizes[level] = int(text[:-1]) * _UNITS[text[-1]]
    if sizes:
        return sizes[max(sizes)]
    try:
        return os.sysconf("SC_LEVEL3_CACHE_SIZE") or None
    except (ValueError, OSError):
        return None


def distance(index: Sequence[int]) -> int | None:
    """Count the distinct blocks read between two uses of one block, the minimum over all blocks.

    The block itself counts: the distance is 1 where the next trip uses it again. Return None if no
    block is used twice.
    """
    last: dict[int, int] = {}
    least: int | None = None
    for trip, block in enumerate(index):
        if block in last:
            between = len(set(index[last[block] : trip]))
            least = between if least is None else min(least, between)
        last[block] = trip
    return least


def reuse_remark(program: Program, loop: Loop, index: Sequence[int]) -> str | None:
    """Describe in one sentence whether tying trips by `index` makes decoding faster.

    Return None if the size of the cache is unknown, or if no trips share a block.
    """
    blocks, cache = distance(index), last_level_cache()
    if blocks is None or cache is None:
        return None
    names = weight_nodes(loop.body.graph)
    block = sum(program.weights[n].meta.elements for n in names if n in program.weights)
    sizes = {name: blocks * block * width for name, width in PRECISIONS.items()}
    fits = [name for name, size in sizes.items() if size <= cache]
    listed = ", ".join(f"{_megabytes(size)} in {name}" for name, size in sizes.items())
    verdict = (
        f"which fits the last-level cache of {_megabytes(cache)} in {' and '.join(fits)}"
        if fits
        else f"more than the last-level cache of {_megabytes(cache)}: decoding is no faster here"
    )
    read = "the block" if blocks == 1 else f"{blocks} blocks"
    remark = (
        f"{loop.name}: from one use of a block to the next {read} are read, {listed}, {verdict}"
    )
    if blocks == 1:
        remark = remark.replace("the block are read", "only the block is read")
    head = _head(program)
    if head:
        each = ", ".join(f"{_megabytes(head * w)} in {n}" for n, w in PRECISIONS.items())
        remark += f"; each token reads the head besides ({each})"
    return remark


def _head(program: Program) -> int:
    """Count the elements of the weight matrices that are applied after the last loop."""
    after = False
    names = set()
    for node in program.graph.nodes:
        after |= any(node is loop.node for loop in program.loops)
        if after and node.target is torch.ops.aten.linear.default:
            weight = node.args[1]
            if weight.op == "get_attr":
                names.add(str(weight.target))
    return sum(program.weights[name].meta.elements for name in names)


def _megabytes(size: float) -> str:
    return f"{size / 1e6:.3g} MB"
