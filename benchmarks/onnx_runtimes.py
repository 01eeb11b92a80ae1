"""Two versions of ONNX Runtime on the same exported graphs: do they agree, and how fast is each?

The other version lives in an environment of its own, which needs `onnxruntime` and `numpy` only:

    python -m venv OLD && OLD/bin/pip install onnxruntime==1.25.0 numpy
    python -m benchmarks.onnx_runtimes --other OLD/bin/python --work DIR

Each runs a prompt of 24 tokens and 8 more, in a batch of two that is padded on the left. Version
1.25 has no LinearAttention and runs the function that the file carries.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

import numpy as np

import reroll
from reroll.export.onnx import Kind, Onnx
from reroll.writing import new_directory

TIED = "tie(blocks=10), relax(rank=16)"
PASSES = {
    "original": "",
    "tied": TIED,
    "exits": f"{TIED}, insert_exits(at=[10, 20], criterion=margin, threshold=0.2)",
    "hybrid": "linearize(mixer=gated_deltanet, window=64, sinks=4, keep=6, gain=0.5)",
    "gla": "linearize(mixer=gla, window=0, sinks=0)",
    "linear": "linearize(mixer=linear, window=0, sinks=0)",
    "deltaproduct": "linearize(mixer=deltaproduct, window=0, sinks=0)",
    "gsa": "linearize(mixer=gsa, window=0, sinks=0)",
    "mlstm": "linearize(mixer=mlstm, window=16, sinks=4, gain=0.5)",
}

# what runs in both environments: it may import nothing else
DRIVER = """
import sys, time
import numpy as np, onnxruntime as ort

path, out, threads, words = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
options = ort.SessionOptions()
options.intra_op_num_threads = threads
options.log_severity_level = 3
session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
tokens = np.random.default_rng(0).integers(0, words, (2, 32))
seen = np.ones((2, 32), np.int64)
seen[1, :7] = 0
positions = (seen.cumsum(1) - 1).clip(0)
sizes = {"batch_size": 2, "past_sequence_length": 0}
past = {
    i.name: np.zeros([sizes.get(d, d) for d in i.shape], np.float32)
    for i in session.get_inputs() if i.name.startswith("past_key_values")
}
names = [o.name for o in session.get_outputs()]
logits, start = [], 0
for end in (24, *range(25, 33)):
    feed = {"input_ids": tokens[:, start:end], "attention_mask": seen[:, :end],
            "position_ids": positions[:, start:end], **past}
    before = time.perf_counter()
    found = dict(zip(names, session.run(None, feed)))
    seconds = time.perf_counter() - before
    logits.append(found["logits"])
    past = {n: found[n.replace("past_key_values", "present")] for n in past}
    start = end
np.savez(out, logits=np.concatenate(logits, 1)[seen > 0], version=ort.__version__, seconds=seconds)
"""


def compared(path: Path, pythons: list[str], threads: int) -> tuple[float, list[str], list[float]]:
    """Relative RMS between two environments, their versions, and seconds of the last step."""
    found = []
    for number, python in enumerate(pythons):
        out = path.with_name(f"logits{number}.npz")
        words = [python, "-c", DRIVER, str(path), str(out), str(threads), "49152"]
        subprocess.run(words, check=True)
        found.append(np.load(out))
    a, b = (f["logits"].astype(np.float64) for f in found)
    error = float(np.sqrt(((a - b) ** 2).mean() / (b**2).mean()))
    return error, [str(f["version"]) for f in found], [float(f["seconds"]) for f in found]


def main() -> None:
    """Export what is not there yet, and print one line per graph."""
    parser = argparse.ArgumentParser(description="two versions of ONNX Runtime on the same graphs")
    parser.add_argument("--model", default="models/smollm2-135m-instruct")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--other", required=True, help="Python of the other environment")
    parser.add_argument("--only", default=",".join(PASSES))
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    for name in options.only.split(","):
        out = options.work / name.replace(" ", "-")
        # a Loop that gathers all weights of the original is slow, and is the same graph otherwise
        graphs: tuple[Kind, ...] = ("loop", "unrolled") if "tie" in PASSES[name] else ("unrolled",)
        if not out.exists():
            program = reroll.capture(options.model, dtype="float32")
            program = reroll.run_passes(program, PASSES[name], measure=False)
            with new_directory(out) as directory:
                Onnx(graphs=graphs).write(program, directory)
        for graph in graphs:
            pythons = [sys.executable, options.other]
            error, versions, seconds = compared(out / f"{graph}.onnx", pythons, options.threads)
            print(
                f"{name:24s} {graph:9s} {versions[0]} and {versions[1]}: relative RMS {error:.1e}; "
                f"a step {1e3 * seconds[0]:.0f} and {1e3 * seconds[1]:.0f} ms",
                flush=True,
            )


if __name__ == "__main__":
    main()
