"""From a cold start to compiled: one body for all trips, beside `torch.compile` of the original.

Each side runs in a process of its own with an empty compiler cache. The rolled model compiles its
trips, which share one code object; the original is compiled as a whole. What the compiler does
once whatever it compiles (it looks for the C++ toolchain and prepares headers) is measured apart,
with a function of two operations, and is in neither figure.

    python -m benchmarks.compile_time [--model DIR] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any


def compile_once(side: str, model: str, threads: int) -> None:
    """Time the first compiled forward of one side, and print it as JSON."""
    import torch

    torch.set_num_threads(threads)
    ids = torch.randint(0, 1000, (1, 64))
    start = time.perf_counter()
    torch.compile(lambda x: x.sin().sum())(torch.ones(64, 64))
    toolchain = time.perf_counter() - start
    if side == "reroll":
        import reroll

        module = reroll.capture(model, dtype="float32").to_module().eval()
        start = time.perf_counter()
        module.compile_trips()
        run = module
    else:
        from transformers import AutoModelForCausalLM

        module = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
        start = time.perf_counter()
        run = torch.compile(module)
    with torch.no_grad():
        run(input_ids=ids, use_cache=False)
    seconds = time.perf_counter() - start
    print(json.dumps({"seconds": seconds, "toolchain_seconds": toolchain}))


def main() -> None:
    """Run both sides and print their seconds and the ratio."""
    parser = argparse.ArgumentParser(description="time to a compiled model")
    parser.add_argument("--model", default="models/smollm2-135m-instruct")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--side", choices=("reroll", "transformers"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side:
        compile_once(options.side, options.model, options.threads)
        return
    found: dict[str, Any] = {"threads": options.threads}
    for side in ("reroll", "transformers"):
        with tempfile.TemporaryDirectory() as cache:
            command = [sys.executable, "-m", "benchmarks.compile_time", "--side", side]
            command += ["--model", options.model, "--threads", str(options.threads)]
            environment = dict(os.environ, TORCHINDUCTOR_CACHE_DIR=cache)
            done = subprocess.run(command, env=environment, capture_output=True, text=True)
        if done.returncode:
            sys.exit(done.stderr[-2000:])
        found[side] = json.loads(done.stdout.splitlines()[-1])
        seconds, toolchain = found[side]["seconds"], found[side]["toolchain_seconds"]
        print(f"{side:12s} {seconds:7.1f} s, after {toolchain:.1f} s once", flush=True)
    found["ratio"] = found["transformers"]["seconds"] / found["reroll"]["seconds"]
    print(f"ratio        {found['ratio']:7.1f}")
    if options.json:
        options.json.write_text(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
