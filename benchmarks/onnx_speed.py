"""Decode speed of exported models in ONNX Runtime beside transformers, in one run, in turns.

Each side decodes one token at a time behind a context whose states are random numbers: how fast a
step is does not depend on what the states hold. The original, a tied and a linearized model are
exported by reroll, with `@ort` in its name with `--runtime ort`; `--peer FILE` adds a graph that
another exporter made of the original. Where all caches are appended to by GroupQueryAttention, past
and present are one buffer. `--llama PYTHON --gguf FILE` adds llama.cpp, which runs in the
environment of PYTHON (`pip install xllamacpp`) on a file that `benchmarks.gguf_float` made; the
tokens that it chooses are held against those of transformers first.

With one thread, a step's processor time is what it would take with the machine to itself, but for
caches and memory that others use. So that is reported beside the time by the clock.

    python -m benchmarks.onnx_speed --work DIR [--contexts 128,1024,8192,32768] [--precision fp32]
"""

from __future__ import annotations

import argparse
import gc
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import reroll
from benchmarks.onnx_peers import GREEDY, Eager, Llama

PASSES = {
    "original": "",
    "tied": "tie(blocks={blocks})",
    "linearized": "linearize(mixer=gated_deltanet, window=64, sinks=4)",
    "tied linearized": "tie(blocks={blocks}), linearize(mixer=gated_deltanet, window=64, sinks=4)",
}
PASSES |= {f"{name}@ort": passes for name, passes in PASSES.items()}
GRAPHS = dict.fromkeys(("original", "original@ort", "linearized"), ("unrolled",))

# what takes this long is measured in few steps
STEPS = {128: 24, 1024: 16, 8192: 8, 32768: 4}
# tokens that fit into a cache behind the context
ROOM = 64


def export(options: argparse.Namespace, name: str, precision: str, blocks: str) -> Path:
    """The directory of one exported model, made in a process of its own if it is not there."""
    tied = f"-{blocks}" if "tied" in name else ""
    out: Path = options.work / f"{name.replace(' ', '-')}{tied}-{precision}"
    if not out.exists():
        kinds = ",".join(GRAPHS.get(name, ("unrolled", "loop")))
        words = [sys.executable, "-m", "benchmarks.onnx_speed", "--export-only", str(out)]
        words += ["--passes", PASSES[name].format(blocks=blocks), "--graphs", kinds]
        words += ["--model", options.model, "--precision", precision, "--work", str(options.work)]
        words += ["--runtime", "ort" if name.endswith("@ort") else "any"]
        subprocess.run(words, check=True)
    return out


def export_only(options: argparse.Namespace) -> None:
    """Export one model, and say how long it took and how much memory."""
    from reroll.export.onnx import Onnx
    from reroll.writing import new_directory

    start = time.perf_counter()
    program = reroll.capture(options.model, dtype="float32")
    if options.passes:
        program = reroll.run_passes(program, options.passes, measure=False)
    captured = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    target = Onnx(
        graphs=tuple(options.graphs.split(",")),
        precision=options.precision,
        runtime=options.runtime,
    )
    before = time.perf_counter()
    with new_directory(options.export_only) as directory:
        found = target.write(program, directory)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    files = {g["file"]: g["bytes"] for g in found["graphs"].values()}
    print(
        f"{options.export_only.name}: captured and rewritten in {before - start:.1f} s, written in "
        f"{time.perf_counter() - before:.1f} s; {time.process_time():.1f} s of processor; peak "
        f"{peak:.0f} MiB of the process, {captured:.0f} before writing; "
        f"weights {found['weights']['bytes']:,} bytes, {files}",
        flush=True,
    )


class Graph:
    """One side: an ONNX graph, its states kept where the runtime has them."""

    def __init__(self, path: Path, threads: int, config: Any, profile: str = "") -> None:
        self.kv_heads, self.head_dim = config.num_key_value_heads, config.head_dim
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 3
        options.enable_profiling = bool(profile)
        options.profile_file_prefix = profile
        self.session = onnxruntime.InferenceSession(
            str(path), options, providers=["CPUExecutionProvider"]
        )
        self.states = [i for i in self.session.get_inputs() if i.name.startswith("past_key")]
        self.names = [i.name for i in self.session.get_inputs() if i not in self.states]
        self.outputs = [o.name for o in self.session.get_outputs()]
        self.past: dict[str, Any] = {}
        nodes = onnx.load(path, load_external_data=False).graph.node
        caches = sum(i.name.endswith(".key") for i in self.states)
        # the caches are appended to where they lie
        self.in_place = 0 < caches == sum(n.op_type == "GroupQueryAttention" for n in nodes)

    def fill(self, context: int) -> None:
        """Random states behind so many tokens."""
        generator = np.random.default_rng(0)
        self.past, self.length = {}, context
        for item in self.states:
            # what is not a number is the batch, the context, or what the configuration says
            known = (1, self.kv_heads, context + ROOM * self.in_place, self.head_dim)
            shape = [
                d if isinstance(d, int) else size for d, size in zip(item.shape, known, strict=True)
            ]
            dtype = np.float16 if "16" in item.type else np.float32
            # a few thousand numbers, over and over: making all of them takes longer than the steps
            few = (0.1 * generator.standard_normal(8192, dtype=np.float32)).astype(dtype)
            data = np.resize(few, shape)
            self.past[item.name] = onnxruntime.OrtValue.ortvalue_from_numpy(data)

    def step(self) -> None:
        """One token."""
        self.length += 1
        given = {
            "input_ids": np.array([[7]]),
            "attention_mask": np.ones((1, self.length), np.int64),
            "position_ids": np.array([[self.length - 1]]),
        }
        feed = {n: onnxruntime.OrtValue.ortvalue_from_numpy(given[n]) for n in self.names}
        if self.in_place:
            self._bound(feed)
            return
        values = self.session.run_with_ort_values(self.outputs, {**feed, **self.past})
        found = dict(zip(self.outputs, values, strict=True))
        self.past = {n: found[n.replace("past_key_values", "present")] for n in self.past}

    def _bound(self, feed: dict[str, Any]) -> None:
        """One token, with every cache as past and as present."""
        binding = self.session.io_binding()
        for name, value in {**feed, **self.past}.items():
            binding.bind_ortvalue_input(name, value)
        for name in self.outputs:
            past = self.past.get(name.replace("present", "past_key_values"))
            if past is None:
                binding.bind_output(name)
            else:
                binding.bind_ortvalue_output(name, past)
        self.session.run_with_iobinding(binding)


def measure(
    sides: dict[str, Callable[[], Any]], llamas: list[Llama], context: int, rounds: int
) -> dict[str, tuple[float, float]]:
    """Tokens per second of each side, of processor time and of the clock: medians, in turns.

    Sides are made one after the other at long contexts, where two would not fit in memory.
    llama.cpp, whose steps are not taken one by one, goes before: a mean for each round.
    """
    steps = next(n for c, n in STEPS.items() if context <= c)
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in sides}
    times |= {llama.name: [] for llama in llamas}
    together = context <= 1024
    groups = [list(sides)] if together else [[name] for name in sides]
    for round_ in range(rounds):
        for llama in llamas:
            times[llama.name].append(llama.seconds(context, steps))
        for group in groups if round_ % 2 == 0 else groups[::-1]:
            made = {name: sides[name]() for name in group}
            for side in made.values():
                side.fill(context)
                side.step()
            for _ in range(steps):
                for name, side in made.items():
                    start = time.process_time(), time.perf_counter()
                    side.step()
                    end = time.process_time(), time.perf_counter()
                    times[name].append((end[0] - start[0], end[1] - start[1]))
            del made
            gc.collect()
    found = {}
    for name, steps_ in times.items():
        processor, clock = (statistics.median(t) for t in zip(*steps_, strict=True))
        found[name] = (1 / processor, 1 / clock)
    return found


def main() -> None:
    """Run the comparison and print one line per side and context."""
    parser = argparse.ArgumentParser(description="decode speed of ONNX exports beside transformers")
    parser.add_argument("--model", default="models/smollm2-135m-instruct")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--contexts", default="128,1024,8192,32768")
    parser.add_argument("--precision", default="fp32")
    parser.add_argument("--blocks", default="2", help="of tied models; several, with commas")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--graphs", default="*", help="such as `unrolled`, to leave loop.onnx out")
    parser.add_argument("--sides", default=",".join(PASSES), help="which models to export")
    parser.add_argument("--peer", type=Path, help="an ONNX file that another exporter made")
    parser.add_argument("--llama", type=Path, help="a python that has xllamacpp")
    parser.add_argument("--gguf", type=Path, help="what llama.cpp runs")
    parser.add_argument("--llama-caches", default="f32,f16")
    parser.add_argument("--no-eager", action="store_true")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--export-only", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--passes", default="", help=argparse.SUPPRESS)
    parser.add_argument("--runtime", default="any", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.export_only:
        export_only(options)
        return
    torch.set_num_threads(options.threads)
    options.work.mkdir(parents=True, exist_ok=True)
    config = AutoConfig.from_pretrained(options.model)
    sides: dict[str, Callable[[], Any]] = {}
    llamas = []
    if options.llama or not options.no_eager:
        model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32).eval()
    for cache in options.llama_caches.split(",") if options.llama else ():
        llamas.append(Llama(options.llama, options.gguf, cache, options.threads))
        same = llamas[-1].agrees(options.model, model)
        print(f"{llamas[-1].name}: {same} of {GREEDY} greedy tokens are those of transformers")
    if not options.no_eager:
        sides["transformers fp32"] = lambda: Eager(model)
    paths = [options.peer] if options.peer else []
    for name in options.sides.split(","):
        for precision in options.precision.split(","):
            for blocks in options.blocks.split(",") if "tied" in name else ("",):
                paths += sorted(
                    export(options, name, precision, blocks).glob(f"{options.graphs}.onnx")
                )
    for path in paths:
        label = "peer" if path == options.peer else f"{path.parent.name} {path.stem}"
        sides[label] = partial(Graph, path, options.threads, config)
    rows = {}
    for context in map(int, filter(None, options.contexts.split(","))):
        speeds = rows[context] = measure(sides, llamas, context, options.rounds)
        base = next(iter(speeds.values()))
        for name, (processor, clock) in speeds.items():
            print(
                f"context {context:6d}  {name:34s} tokens per second of processor "
                f"{processor:8.2f} ({processor / base[0]:5.2f} x), of the clock "
                f"{clock:8.2f} ({clock / base[1]:5.2f} x)"
            )
        sys.stdout.flush()
    for llama in llamas:
        llama.close()
    if options.json:
        options.json.write_text(json.dumps(rows, indent=2))


if __name__ == "__main__":
    main()
