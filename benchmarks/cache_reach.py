"""What a cached block of weights is worth: products with one vector, by how much they read in turn.

    python -m benchmarks.cache_reach [--precisions fp32,int8] [--threads 1] [--rounds 12]

Sixty pairs of matrices of SmolLM2's sizes (576 to 1,536 and back) multiply one token in ONNX
Runtime. The pairs are the same few over and over, or all different: what a tied model at its best
can gain on this machine, without the rest of a model. With one thread, times are the processor's.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper

PAIRS = 60
SIZES = ((576, 1536), (1536, 576))
BLOCK = 32
DISTINCT = {"fp32": (1, 2, 3, 4, 6, 8, PAIRS), "int8": (1, 2, 4, 6, 8, 10, 16, PAIRS)}


def products(precision: str, distinct: int) -> tuple[onnx.ModelProto, int]:
    """A graph of `PAIRS` pairs of products through so many distinct ones, and their bytes."""
    random = np.random.default_rng(0)
    weights: list[TensorProto] = []
    nodes = []

    def weight(name: str, value: np.ndarray) -> str:
        weights.append(numpy_helper.from_array(value, name))
        return name

    given: list[list[str]] = []
    for pair in range(distinct):
        for side, (k, n) in enumerate(SIZES):
            name = f"w{pair}.{side}"
            if precision == "fp32":
                w = random.standard_normal((k, n), dtype=np.float32) * k**-0.5
                given.append([weight(name, w)])
                continue
            blocks = k // BLOCK
            q = random.integers(0, 256, (n, blocks, BLOCK), dtype=np.uint8)
            scales = np.full(n * blocks, 0.01 * k**-0.5, np.float32)
            zeros = np.full(n * blocks, 128, np.uint8)
            parts = (("", q), (".scales", scales), (".zeros", zeros))
            given.append([weight(name + part, value) for part, value in parts])
    value = "x"
    for number in range(2 * PAIRS):
        k, n = SIZES[number % 2]
        inputs = [value, *given[number % (2 * distinct)]]
        value = f"x{number}"
        if precision == "fp32":
            nodes.append(helper.make_node("MatMul", inputs, [value]))
        else:
            how = {"K": k, "N": n, "bits": 8, "block_size": BLOCK, "accuracy_level": 4}
            nodes.append(
                helper.make_node("MatMulNBits", inputs, [value], domain="com.microsoft", **how)
            )
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 576])
    y = helper.make_tensor_value_info(value, TensorProto.FLOAT, [1, 576])
    graph = helper.make_graph(nodes, "products", [x], [y], weights)
    opsets = [helper.make_opsetid("", 23), helper.make_opsetid("com.microsoft", 1)]
    size = sum(len(w.raw_data) for w in weights)
    return helper.make_model(graph, opset_imports=opsets, ir_version=11), size


def main() -> None:
    """Print one line for each number of distinct pairs."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--precisions", default="fp32,int8")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=12)
    options = parser.parse_args()
    clock = time.process_time if options.threads == 1 else time.perf_counter
    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = options.threads
    x = {"x": np.random.default_rng(1).standard_normal((1, 576), dtype=np.float32)}
    print("| precision | MB read in turn | ms for all | GB/s | of all distinct |")
    print("| --- | ---: | ---: | ---: | ---: |")
    for precision in options.precisions.split(","):
        sides = {}
        for distinct in DISTINCT[precision]:
            model, size = products(precision, distinct)
            with tempfile.TemporaryDirectory() as folder:
                path = Path(folder) / "products.onnx"
                onnx.save(model, path, save_as_external_data=True)
                sides[distinct] = onnxruntime.InferenceSession(str(path), settings), size
        seconds: dict[int, list[float]] = {distinct: [] for distinct in sides}
        for _ in range(options.rounds):
            for distinct, (session, _) in sides.items():
                # the first run brings back what the other sides put out of the cache
                session.run(None, x)
                start = clock()
                session.run(None, x)
                seconds[distinct].append(clock() - start)
        apart = statistics.median(seconds[PAIRS])
        for distinct, (_, size) in sides.items():
            took = statistics.median(seconds[distinct])
            read = size * PAIRS / distinct
            print(
                f"| {precision} | {size / 1e6:.1f} | {1e3 * took:.2f} | {read / took / 1e9:.1f} "
                f"| {apart / took:.2f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
