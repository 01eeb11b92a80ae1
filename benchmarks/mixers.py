"""Mixers and windows beside softmax attention on a CPU: prefill, and forward with backward.

The peer is `scaled_dot_product_attention`, causal, in fp32, for one sequence of 9 heads of 64, as a
layer of SmolLM2. A mixer runs eager and compiled (`reroll.mixers.compiled`, compiled before the
clock starts), a window in blocks and with the mask of all pairs written out. The sides take turns,
the best of all turns counts, by the clock of the thread, or of the wall with more than one.

    python -m benchmarks.mixers [--sides gla,retention,window] [--dtypes bfloat16,float32]
        [--lengths 2048,8192] [--json FILE]
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.harness import Table, best, in_turns, parse_options
from reroll.mixers import compiled, make
from reroll.runtime.functions.attention import attend
from reroll.runtime.functions.bands import Band

HEADS, KV_HEADS, SIZE = 9, 3, 64
WINDOW, SINKS = 64, 4
Run = Callable[[], Any]


def timed(forward: Callable[[], Tensor], leaves: list[Tensor], backward: bool) -> Run:
    """A run of a forward, or of that and all gradients."""
    for leaf in leaves:
        leaf.requires_grad_(backward)

    def run() -> None:
        with torch.set_grad_enabled(backward):
            out = forward()
        if backward:
            torch.autograd.grad(out.float().sum(), leaves, allow_unused=True)

    return run


def drawn(length: int, dtype: torch.dtype, kv_heads: int = HEADS) -> list[Tensor]:
    """Random q, k and v [1, heads, length, size]."""
    heads = (HEADS, kv_heads, kv_heads)
    return [torch.randn(1, count, length, SIZE).to(dtype) for count in heads]


def softmax(length: int, backward: bool) -> Run:
    """The peer."""
    q, k, v = drawn(length, torch.float32)

    def forward() -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)

    return timed(forward, [q, k, v], backward)


def mixing(name: str, length: int, dtype: torch.dtype, backward: bool) -> dict[str, Run]:
    """A mixer from inputs to output and state."""
    mixer = make(name)
    gates = [
        gate.activation(torch.randn(1, HEADS, length, *gate.shape))
        for gate in mixer.gates(SIZE, SIZE)
    ]
    leaves = [*drawn(length, dtype), *gates]
    q, k, v, *rest = leaves
    return {
        "eager": timed(lambda: mixer.chunk(q, k, v, rest)[0], leaves, backward),
        "compiled": timed(lambda: compiled.chunk(mixer, q, k, v, rest)[0], leaves, backward),
    }


def windowed(length: int, dtype: torch.dtype, backward: bool) -> dict[str, Run]:
    """Attention over a window and sinks."""
    band = Band(length, WINDOW, SINKS)
    written = band.written_out(torch.device("cpu"))
    leaves = drawn(length, dtype, KV_HEADS)
    q, k, v = leaves
    scale = SIZE**-0.5
    return {
        "causal": timed(lambda: attend(q, k, v, scale, True, None), leaves, backward),
        "mask of all pairs": timed(lambda: attend(q, k, v, scale, True, written), leaves, backward),
        "blocks": timed(lambda: attend(q, k, v, scale, True, band), leaves, backward),
    }


def main() -> None:
    """One row for each side, length, dtype, direction and form."""
    options = parse_options(
        __doc__,
        sides=("retention", "gla", "window"),
        dtypes=("bfloat16", "float32"),
        lengths=(2048, 8192),
        turns=12,
    )
    torch.manual_seed(0)
    columns = {"": "{}", "form": "{}", "tokens": "{:,}", "dtype": "{}", "backward": "{}"}
    columns |= {"ms": "{:.1f}", "attention, ms": "{:.1f}", "attention over it": "{:.1f}"}
    table = Table(options, columns)
    clock = time.thread_time if options.threads == 1 else time.perf_counter
    cases = (
        {"": side, "tokens": length, "dtype": dtype, "backward": direction}
        for side in options.sides
        for length in options.lengths
        for dtype in options.dtypes
        for direction in ("no", "yes")
    )
    for case in table.missing(cases):
        backward, length = case["backward"] == "yes", case["tokens"]
        dtype = getattr(torch, case["dtype"])
        sides = {"peer": softmax(length, backward)}
        sides |= (
            windowed(length, dtype, backward)
            if case[""] == "window"
            else mixing(case[""], length, dtype, backward)
        )
        turns = max(2, options.turns * 2048 // length)
        took = {name: 1e3 * s for name, s in best(in_turns(sides, turns, clock=clock)).items()}
        attention = took.pop("peer")
        for form, ms in took.items():
            ratio = attention / ms
            shown = {"form": form, "ms": ms, "attention, ms": attention, "attention over it": ratio}
            table.add(case | shown)


if __name__ == "__main__":
    main()
