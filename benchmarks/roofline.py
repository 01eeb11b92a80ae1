"""What each kernel must read, write and compute, and how long an H100 takes for it at best.

    python benchmarks/roofline.py

Nothing is run. Bytes are those of tensors that a launch reads or writes, each once; FLOPs are those
of its matrix products. The bound is the larger of bytes / bandwidth and FLOPs / peak. Beside it is
what the launches of flash-linear-attention's structure move for the same result.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

# NVIDIA H100 SXM data sheet: HBM3, dense bf16
BANDWIDTH, PEAK = 3.35e12, 989e12
BF16, FP32 = 2, 4


@dataclass(frozen=True)
class Work:
    """Of one result: launches, bytes and FLOPs."""

    name: str
    shape: str
    launches: int
    bytes: float
    flops: float
    theirs: tuple[int, float] | None = None

    @property
    def seconds(self) -> float:
        """At best."""
        return max(self.bytes / BANDWIDTH, self.flops / PEAK)

    def row(self) -> str:
        """A line of the table."""
        bound = "memory" if self.bytes / BANDWIDTH > self.flops / PEAK else "compute"
        theirs = "—"
        if self.theirs:
            theirs = f"{self.theirs[0]} launches, {self.theirs[1] / 1e6:.0f} MB"
        return (
            f"| {self.name} | {self.shape} | {self.launches} | {self.bytes / 1e6:.1f} | "
            f"{self.flops / 1e9:.2f} | {bound} | {self.seconds * 1e6:.1f} | {theirs} |"
        )


def recurrence(batch: int, time: int, heads: int, size: int, gate: int, chunk: int) -> list[Work]:
    """Forward in one launch, and backward in four and in one, of a head for each query head."""
    tokens = batch * time * heads
    each = tokens * size * BF16
    gates = tokens * FP32 * (size if gate == 2 else 1)
    state = batch * heads * size * size * FP32
    states = batch * heads * (time // chunk) * size * size
    shape = f"B{batch} T{time} H{heads} D{size}, gate {'channel' if gate == 2 else 'head'}"
    # scores, read-out of scores, of the state, and the write, for each token
    forward = tokens * (4 * chunk * size + 4 * size * size)
    # theirs, in chunks of 64: a sum of gates in fp32, states, scores (written and read), output
    parts = 5 if gate == 2 else 3
    their_states = batch * heads * (time // 64) * size * size * BF16
    moved = 2 * gates + (2 * each + gates + their_states) + (3 * each + gates + their_states)
    moved += each + 2 * tokens * 64 * FP32 * (gate == 2) + (2 * each + gates) * (gate == 2)
    # states, their gradients, then queries, keys and gates, then values
    back = 14 * each + 5 * gates + 5 * states * BF16
    # in one launch, in chunks of 32: keys, values and gates twice, states written and read once
    few = batch * heads * (time // 32) * size * size * BF16
    fused = 9 * each + 3 * gates + 2 * few + 3 * state
    fused_flops = tokens * (10 * 32 * size + 10 * size * size)
    found = [
        Work("recurrence forward", shape, 1, 4 * each + gates + 2 * state, forward,
             (parts, moved)),
        Work("recurrence backward", shape, 4, back, 3 * forward),
    ]  # fmt: skip
    if size == 64:
        found.append(Work("recurrence backward, fused", shape, 1, fused, fused_flops))
    return found


def others() -> list[Work]:
    """The other kernels, at the sizes of a small model (SmolLM2-135M)."""
    rows, width, hidden, rank, depths, vocabulary = 64, 576, 1536, 16, 8, 49152
    kv, heads, size = 3, 9, 64
    state = rows * kv * size * size * FP32
    io = rows * (2 * heads + 2 * kv) * size * BF16
    lora = depths * rank * (width + hidden) * BF16
    weight = width * hidden * BF16
    batch, time, window, sinks = 8, 2048, 64, 4
    qkvo = batch * time * (2 * heads + 2 * kv) * size * BF16
    far = batch * time * heads * (size + 1) * BF16
    table = vocabulary * width * BF16
    return [
        Work("step", f"{rows} rows, {kv} states of {size}x{size}", 1, 2 * state + io,
             rows * (3 * kv + 2 * heads) * size * size),
        Work("depth-LoRA linear", f"{rows} rows, {width}->{hidden}, r{rank}, {depths} depths", 1,
             weight + lora + rows * (width + hidden) * BF16,
             2 * rows * (width * hidden + rank * (width + hidden))),
        Work("layers of few rows", f"16 rows, {width}->2x{hidden}, norm, r{rank}, gate", 1,
             2 * weight + 2 * rank * (width + hidden) * BF16 + 16 * (width + hidden) * BF16,
             2 * 16 * 2 * (width * hidden + rank * (width + hidden)),
             (20, 2 * weight + 2 * rank * (width + hidden) * BF16
              + 16 * (NORM[0][1] * width + 2 * (4 * width + 10 * hidden + 4 * rank)
                      + GATE[0][1] * hidden))),
        Work("confidence", f"{rows} rows, {vocabulary} tokens", 1, table + rows * width * BF16,
             2 * rows * width * vocabulary, (2, table + 2 * rows * vocabulary * BF16)),
        Work("window + sinks + branch", f"B{batch} T{time} H{heads}/{kv} D{size}, {window}+{sinks}",
             1, qkvo + far, 4 * batch * time * heads * size * (window + sinks)),
    ]  # fmt: skip


# launches of PyTorch's operations in bf16, and bytes of an element that they read and write; and
# those of one kernel: the ops' definitions, operation by operation
NORM = (10, 2 + 4 + 8 + 4 + 8 + 8 + 6), (1, 4)
ROPE = (7, 6 + 2 + 4 + 6 + 12 + 8 + 6), (1, 4)
GATE = (2, 4 + 6), (1, 6)


@dataclass(frozen=True)
class Block:
    """Widths of one block of a model."""

    name: str
    width: int
    hidden: int
    heads: int
    kv_heads: int
    size: int

    def parts(self) -> list[tuple[str, int, int, Any]]:
        """What is done to each token beside products: how often, on how many elements."""
        return [
            ("RMS norm", 2, self.width, NORM),
            ("rotary embedding", 2, (self.heads + self.kv_heads) * self.size // 2, ROPE),
            ("gated unit", 1, self.hidden, GATE),
        ]

    def weights(self) -> int:
        """Of the block's linear layers."""
        heads = 2 * self.heads + 2 * self.kv_heads
        return self.width * heads * self.size + 3 * self.width * self.hidden


BLOCKS = (
    Block("SmolLM2-135M", 576, 1536, 9, 3, 64),
    Block("4096 wide", 4096, 14336, 32, 8, 128),
)


def around_layers() -> list[str]:
    """Launches and least microseconds of what stands around a block's linear layers."""
    lines = [
        "| block | rows | part | by operations | as kernels | linear layers |",
        "| --- | ---: | --- | ---: | ---: | ---: |",
    ]
    for block in BLOCKS:
        for rows in (1, 16, 16384):
            moved = block.weights() * BF16 / BANDWIDTH
            products = max(moved, 2 * rows * block.weights() / PEAK)
            for name, times, width, ((launches, bytes_), (ours, our_bytes)) in block.parts():
                slow, quick = (rows * times * width * b / BANDWIDTH for b in (bytes_, our_bytes))
                # a layer of few rows does its norm and its gate itself
                ours = 0 if rows <= 16 and name != "rotary embedding" else ours
                quick = 0.0 if rows <= 16 and name != "rotary embedding" else quick
                lines.append(
                    f"| {block.name} | {rows} | {name} | {times * launches}, {slow * 1e6:.2f} us | "
                    f"{times * ours}, {quick * 1e6:.2f} us | {products * 1e6:.1f} us |"
                )
    return lines


def main() -> None:
    """Print the tables."""
    print("| kernel | shape | launches | MB | GFLOP | bound | at best, us | elsewhere |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for gate, chunk in ((1, 64), (2, 32)):
        for work in recurrence(8, 2048, 9, 64, gate, chunk):
            print(work.row())
    for work in recurrence(4, 2048, 16, 128, 1, 64):
        print(work.row())
    for work in others():
        print(work.row())
    print()
    for line in around_layers():
        print(line)


if __name__ == "__main__":
    main()
