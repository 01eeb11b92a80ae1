"""What each kernel must read, write and compute, and how long an H100 takes for it at best.

    python -m benchmarks.roofline

Nothing is run. Bytes are those of tensors that a launch reads or writes, each once; FLOPs are those
of its matrix products. The bound is the larger of bytes / bandwidth and FLOPs / peak. Beside it is
what the launches of flash-linear-attention's structure move for the same result.
"""

from __future__ import annotations

from collections.abc import Iterator

from benchmarks.harness import Row, Table, parse_options

# NVIDIA H100 SXM data sheet: HBM3, dense bf16
BANDWIDTH, PEAK = 3.35e12, 989e12
BF16, FP32 = 2, 4

KERNELS = {"kernel": "{}", "shape": "{}", "launches": "{:d}", "MB": "{:.1f}", "GFLOP": "{:.2f}"}
KERNELS |= {"bound": "{}", "at best, us": "{:.1f}", "elsewhere": "{}"}
AROUND = {"block": "{}", "rows": "{:d}", "part": "{}", "by operations": "{}", "as kernels": "{}"}
AROUND |= {"linear layers, us": "{:.1f}"}

# launches of PyTorch's operations in bf16, and bytes of an element that they read and write; and
# those of one kernel: the ops' definitions, operation by operation
NORM = (10, 2 + 4 + 8 + 4 + 8 + 8 + 6), (1, 4)
ROPE = (7, 6 + 2 + 4 + 6 + 12 + 8 + 6), (1, 4)
GATE = (2, 4 + 6), (1, 6)
# width, width of the gated unit, heads, heads of keys and values, head size
BLOCKS = {"SmolLM2-135M": (576, 1536, 9, 3, 64), "4096 wide": (4096, 14336, 32, 8, 128)}


def work(
    name: str,
    shape: str,
    launches: int,
    moved: float,
    flops: float,
    theirs: tuple[int, float] | None = None,
) -> Row:
    """A row of one result, from launches, bytes and FLOPs."""
    memory, compute = moved / BANDWIDTH, flops / PEAK
    elsewhere = f"{theirs[0]} launches, {theirs[1] / 1e6:.0f} MB" if theirs else "—"
    bound = "memory" if memory > compute else "compute"
    found = (name, shape, launches, moved / 1e6, flops / 1e9, bound)
    return dict(zip(KERNELS, (*found, 1e6 * max(memory, compute), elsewhere), strict=True))


def recurrence(
    batch: int, time: int, heads: int, size: int, gate: str, chunk: int
) -> Iterator[Row]:
    """Forward in one launch, and backward in four and in one, of a head for each query head."""
    tokens = batch * time * heads
    each = tokens * size * BF16
    channels = gate == "channel"
    gates = tokens * FP32 * (size if channels else 1)
    square = batch * heads * size * size
    state, states = square * FP32, square * (time // chunk) * BF16
    shape = f"B{batch} T{time} H{heads} D{size}, gate {gate}"
    # scores, read-out of scores, of the state, and the write, for each token
    flops = tokens * (4 * chunk * size + 4 * size * size)
    # theirs, in chunks of 64: a sum of gates in fp32, states, scores (written and read), output
    their_states = square * (time // 64) * BF16
    moved = 2 * gates + (2 * each + gates + their_states) + (3 * each + gates + their_states)
    moved += each + (2 * tokens * 64 * FP32 + 2 * each + gates if channels else 0)
    theirs = (5 if channels else 3, moved)
    yield work("recurrence forward", shape, 1, 4 * each + gates + 2 * state, flops, theirs)
    # states, their gradients, then queries, keys and gates, then values
    moved = 14 * each + 5 * gates + 5 * states
    yield work("recurrence backward", shape, 4, moved, 3 * flops)
    if size == 64:
        # in one launch, in chunks of 32: keys, values and gates twice, states written and read once
        moved = 9 * each + 3 * gates + 2 * square * (time // 32) * BF16 + 3 * state
        flops = tokens * (10 * 32 * size + 10 * size * size)
        yield work("recurrence backward, fused", shape, 1, moved, flops)


def others() -> Iterator[Row]:
    """The other kernels, at the sizes of a small model (SmolLM2-135M)."""
    rows, rank, depths, vocabulary = 64, 16, 8, 49152
    width, hidden, heads, kv, size = BLOCKS["SmolLM2-135M"]
    both, weight, low = width + hidden, width * hidden, rank * (width + hidden)
    moved = 2 * rows * kv * size * size * FP32 + rows * (2 * heads + 2 * kv) * size * BF16
    flops = rows * (3 * kv + 2 * heads) * size * size
    yield work("step", f"{rows} rows, {kv} states of {size}x{size}", 1, moved, flops)
    moved = (weight + depths * low + rows * both) * BF16
    shape = f"{rows} rows, {width}->{hidden}, r{rank}, {depths} depths"
    yield work("depth-LoRA linear", shape, 1, moved, 2 * rows * (weight + low))
    weights = 2 * (weight + low) * BF16
    # operation by operation: the norm, two layers with their low-rank terms, and the gate
    parts = NORM[0][1] * width + 2 * (4 * width + 10 * hidden + 4 * rank) + GATE[0][1] * hidden
    shape = f"16 rows, {width}->2x{hidden}, norm, r{rank}, gate"
    moved, flops = weights + 16 * both * BF16, 2 * 16 * 2 * (weight + low)
    yield work("layers of few rows", shape, 1, moved, flops, (20, weights + 16 * parts))
    table, shape = vocabulary * width * BF16, f"{rows} rows, {vocabulary} tokens"
    theirs = (2, table + 2 * rows * vocabulary * BF16)
    flops = 2 * rows * width * vocabulary
    yield work("confidence", shape, 1, table + rows * width * BF16, flops, theirs)
    batch, time, window, sinks = 8, 2048, 64, 4
    shape = f"B{batch} T{time} H{heads}/{kv} D{size}, {window}+{sinks}"
    # queries, keys, values and output, and the branch with its weights
    moved = batch * time * ((2 * heads + 2 * kv) * size + heads * (size + 1)) * BF16
    flops = 4 * batch * time * heads * size * (window + sinks)
    yield work("window + sinks + branch", shape, 1, moved, flops)


def around_layers() -> Iterator[Row]:
    """Launches and least microseconds of what stands around a block's linear layers."""
    for block, (width, hidden, heads, kv, size) in BLOCKS.items():
        weights = width * (2 * heads + 2 * kv) * size + 3 * width * hidden
        # what is done to each token beside products: how often, on how many elements
        parts = {
            "RMS norm": (2, width, NORM),
            "rotary embedding": (2, (heads + kv) * size // 2, ROPE),
            "gated unit": (1, hidden, GATE),
        }
        for rows in (1, 16, 16384):
            products = max(weights * BF16 / BANDWIDTH, 2 * rows * weights / PEAK)
            for part, (times, elements, costs) in parts.items():
                slow, quick = (
                    (times * launches, rows * times * elements * each / BANDWIDTH * 1e6)
                    for launches, each in costs
                )
                # a layer of few rows does its norm and its gate itself
                if rows <= 16 and part != "rotary embedding":
                    quick = 0, 0.0
                ours = [f"{launches}, {us:.2f} us" for launches, us in (slow, quick)]
                yield dict(zip(AROUND, (block, rows, part, *ours, 1e6 * products), strict=True))


def main() -> None:
    """Print the tables."""
    options = parse_options(__doc__)
    kernels = [
        *recurrence(8, 2048, 9, 64, "head", 64),
        *recurrence(8, 2048, 9, 64, "channel", 32),
        *recurrence(4, 2048, 16, 128, "head", 64),
        *others(),
    ]
    for columns, rows, part in ((KERNELS, kernels, ""), (AROUND, around_layers(), "around")):
        table = Table(options, columns, part)
        for row in table.missing(rows):
            table.add(row)
        print()


if __name__ == "__main__":
    main()
