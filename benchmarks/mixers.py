"""Mixers beside softmax attention on a CPU: prefill, and forward with backward.

The peer is `scaled_dot_product_attention`, causal, in fp32; a mixer runs in bf16 or fp32, eager and
compiled (`reroll.mixers.compiled`, compiled before the clock starts). The sides take turns, and the
best of all turns counts. The clock is that of the thread, so that time lost to other processes is
not counted; with more than one thread it is the wall.

    python -m benchmarks.mixers [--mixers gla,retention] [--threads 1] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from reroll.mixers import compiled, make

HEADS, SIZE = 9, 64
# tokens, with backward
CASES = ((2048, False), (8192, False), (2048, True))


def softmax_attention(length: int, backward: bool) -> Callable[[], None]:
    """One run of the peer."""
    q, k, v = (torch.randn(1, HEADS, length, SIZE, requires_grad=backward) for _ in range(3))

    def run() -> None:
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        if backward:
            torch.autograd.grad(out.sum(), (q, k, v))

    return run


def mixing(
    name: str, dtype: torch.dtype, compile: bool, length: int, backward: bool
) -> Callable[[], None]:
    """One run of a mixer, from inputs to output and state, or to all gradients."""
    mixer = make(name)
    inputs = [torch.randn(1, HEADS, length, SIZE).to(dtype) for _ in range(3)]
    gates = [
        gate.activation(torch.randn(1, HEADS, length, *gate.shape))
        for gate in mixer.gates(SIZE, SIZE)
    ]
    leaves = [t.requires_grad_(backward) for t in (*inputs, *gates)]

    def forward() -> Tensor:
        q, k, v, *now = leaves
        if compile:
            return compiled.chunk(mixer, q, k, v, now)[0]
        return mixer.chunk(q, k, v, now)[0]

    def run() -> None:
        if backward:
            torch.autograd.grad(forward().float().sum(), leaves, allow_unused=True)
        else:
            with torch.no_grad():
                forward()

    return run


def best(
    sides: Sequence[Callable[[], None]], turns: int, clock: Callable[[], float]
) -> list[float]:
    """The shortest time of each side in milliseconds, the sides taking turns."""
    for side in sides:
        side()
    times = [float("inf")] * len(sides)
    for _ in range(turns):
        for i, side in enumerate(sides):
            start = clock()
            side()
            times[i] = min(times[i], 1000 * (clock() - start))
    return times


def measure(args: argparse.Namespace, name: str, length: int, backward: bool) -> dict[str, Any]:
    """The peer and a mixer's variants at one length."""
    clock = time.thread_time if args.threads == 1 else time.perf_counter
    variants = {
        f"{str(dtype).removeprefix('torch.')}{' compiled' if compile else ''}": (dtype, compile)
        for dtype in (torch.bfloat16, torch.float32)
        for compile in ((False, True) if args.compile else (False,))
    }
    sides = [softmax_attention(length, backward)]
    sides += [mixing(name, dtype, each, length, backward) for dtype, each in variants.values()]
    turns = max(2, args.turns * 2048 // length)
    peer, *times = best(sides, turns, clock)
    row: dict[str, Any] = {"mixer": name, "tokens": length, "backward": backward, "peer": peer}
    for variant, took in zip(variants, times, strict=True):
        row[variant] = took
    shown = "  ".join(f"{v} {row[v]:.1f} ms ({peer / row[v]:.1f} x)" for v in variants)
    what = "forward and backward" if backward else "forward"
    print(f"{name:15s} {length:5d} {what}: attention {peer:.1f} ms  {shown}", flush=True)
    return row


def main() -> None:
    """Print one row for each mixer and length."""
    parser = argparse.ArgumentParser(description="mixers beside softmax attention")
    parser.add_argument("--mixers", default="retention,gla")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--turns", type=int, default=12, help="turns at 2048 tokens")
    parser.add_argument("--no-compile", dest="compile", action="store_false")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    rows = [measure(args, m, *case) for m in args.mixers.split(",") for case in CASES]
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
