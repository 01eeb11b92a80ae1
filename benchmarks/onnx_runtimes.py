"""Two versions of ONNX Runtime on the same exported graphs: do they agree, and how fast is each?

The other version lives in an environment of its own, which needs `onnxruntime` and `numpy` only:

    python -m venv OLD && OLD/bin/pip install onnxruntime==1.25.0 numpy
    python -m benchmarks.onnx_runtimes --other OLD/bin/python --work DIR

Each runs a prompt of 24 tokens and 8 more, in a batch of two that is padded on the left. Version
1.25 has no LinearAttention and runs the function that the file carries.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from transformers import AutoConfig

from benchmarks.harness import MODEL, Table, parse_options, run_process
from benchmarks.onnx_speed import export
from reroll.rewrite.analysis.tolerances import relative_rms

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
COLUMNS = {"model": "{}", "graph": "{}", "versions": "{}", "relative RMS": "{:.1e}"}
COLUMNS |= {"ms of a step": "{:.0f}", "of the other": "{:.0f}"}

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


def main() -> None:
    """Print a row for each graph."""
    options = parse_options(
        __doc__, model=MODEL, work=Path("build/onnx"), other="OLD/bin/python", only=tuple(PASSES)
    )
    table = Table(options, COLUMNS)
    words = AutoConfig.from_pretrained(options.model).vocab_size
    kinds = {
        name: ("unrolled", "loop") if "tie" in PASSES[name] else ("unrolled",) for name in PASSES
    }
    cases = ({"model": name, "graph": kind} for name in options.only for kind in kinds[name])
    for case in table.missing(cases):
        name, kind = case.values()
        out = export(options.model, PASSES[name], options.work / name, graphs=kinds[name])
        found = []
        with tempfile.TemporaryDirectory() as folder:
            for python in (sys.executable, options.other):
                file, graph = f"{folder}/logits.npz", out / f"{kind}.onnx"
                run_process([python, "-c", DRIVER, graph, file, options.threads, words])
                with np.load(file) as saved:
                    found.append(dict(saved))
        ours, theirs = (1e3 * float(side["seconds"]) for side in found)
        versions = " and ".join(str(side["version"]) for side in found)
        error = relative_rms(*(torch.from_numpy(side["logits"]) for side in found))
        row = {"versions": versions, "relative RMS": error}
        table.add(case | row | {"ms of a step": ours, "of the other": theirs})


if __name__ == "__main__":
    main()
