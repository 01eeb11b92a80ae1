"""Attention over a window and sinks in blocks, beside the mask of all pairs and causal attention.

One sequence from its start, 9 query heads and 3 key-value heads of 64, as a layer of SmolLM2. The
sides take turns, the best of all turns counts, by the clock of the thread.

    python -m benchmarks.window_attention [--lengths 1024,2048,8192] [--window 64] [--sinks 4]
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.mixers import best
from reroll.runtime.functions.attention import attend
from reroll.runtime.functions.bands import Band


def side(
    mask: Tensor | Band | None, length: int, dtype: torch.dtype, backward: bool
) -> Callable[[], None]:
    """One run of attention under a mask; without one it is causal."""
    sizes = [(1, heads, length, 64) for heads in (9, 3, 3)]
    q, k, v = (torch.randn(*size, dtype=dtype, requires_grad=backward) for size in sizes)

    def run() -> None:
        with torch.set_grad_enabled(backward):
            out = attend(q, k, v, 0.125, True, mask)
        if backward:
            torch.autograd.grad(out.float().sum(), (q, k, v))

    return run


def main() -> None:
    """Print milliseconds and ratios."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lengths", default="1024,2048,8192")
    parser.add_argument("--window", type=int, default=64)
    parser.add_argument("--sinks", type=int, default=4)
    parser.add_argument("--turns", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(1)
    print("| | causal | all pairs masked | blocks | causal / blocks |")
    print("| --- | ---: | ---: | ---: | ---: |")
    for length in map(int, options.lengths.split(",")):
        band = Band(length, options.window, options.sinks)
        masks = (None, band.written_out(torch.device("cpu")), band)
        for dtype in (torch.float32, torch.bfloat16):
            for backward in (False, True):
                runs = [side(mask, length, dtype, backward) for mask in masks]
                causal, dense, blocks = best(runs, options.turns, time.thread_time)
                what = f"{length:,} tokens, {str(dtype).removeprefix('torch.')}"
                print(
                    f"| {what}{', with backward' * backward} | {causal:.1f} | {dense:.1f} | "
                    f"{blocks:.1f} | {causal / blocks:.1f} |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
