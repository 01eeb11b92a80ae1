"""Decode speed of exported models in ONNX Runtime beside transformers, in one run, in turns.

    python -m benchmarks.onnx_speed --work DIR [--contexts 128,1024,8192,32768] [--precision fp32]

Each side decodes one token at a time behind a context whose states are random numbers: how fast a
step is does not depend on what the states hold. The original, a tied and a linearized model are
exported by reroll, with `@ort` in its name with `--runtime ort`; `--peer FILE` adds a graph that
another exporter made of the original. Where all caches are appended to by GroupQueryAttention, past
and present are one buffer. `--llama PYTHON --gguf FILE` adds llama.cpp, which runs in the
environment of PYTHON (`pip install xllamacpp`) on a file that `benchmarks.gguf_float` made; the
tokens that it chooses are held against those of transformers.

With one thread, a step's processor time is what it would take with the machine to itself, but for
caches and memory that others use. So that is reported beside the time by the clock.

`--profile` says where a token's time goes instead, by the profiler of ONNX Runtime, and what
opening the graph takes of memory: the weights as the runtime packs them. The profiler reads the
clock: on a machine that others use, look at the shares.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from functools import cache, partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from transformers import AutoConfig, AutoTokenizer, DynamicCache

from benchmarks.harness import MODEL, Row, Table, in_turns, original, parse_options, run_process

LINEARIZED = "linearize(mixer=gated_deltanet, window=64, sinks=4)"
PASSES = {
    "original": "",
    "tied": "tie(blocks={blocks})",
    "linearized": LINEARIZED,
    "tied linearized": f"tie(blocks={{blocks}}), {LINEARIZED}",
}
PASSES |= {f"{name}@ort": passes for name, passes in PASSES.items()}
EXPORTS = {"exported": "{}", "seconds": "{:.1f}", "of the processor": "{:.1f}"}
EXPORTS |= {"peak MB": "{:.0f}", "bytes of weights": "{:,}", "bytes of graphs": "{}"}
# a process of its own: what it takes of memory is of one export
EXPORT = """
import json, pathlib, sys, reroll, reroll.writing, reroll.export.onnx
model, passes, out, options = json.loads(sys.argv[1])
program = reroll.run_passes(reroll.capture(model, dtype="float32"), passes, measure=False)
with reroll.writing.new_directory(pathlib.Path(out)) as directory:
    reroll.export.onnx.Onnx(**options).write(program, directory)
"""

# what takes this long is measured in few steps
STEPS = {128: 24, 1024: 16, 8192: 8, 32768: 4}
# the longest context at which all sides fit into memory together
TOGETHER = 1024
# tokens that fit into a cache behind the context
ROOM = 64
PROMPT = "The history of the bicycle begins in"

# what the operators of a graph are for; in a Loop's time is that of its nodes
PROFILE = {"graph": "{}"} | dict.fromkeys(
    ("all", "products of blocks", "head", "attention", "other operators", "memory, MB"), "{:.2f}"
)
KINDS = dict.fromkeys(("MatMul", "MatMulNBits", "Gemm"), "products of blocks")
KINDS |= dict.fromkeys(("Attention", "GroupQueryAttention", "LinearAttention"), "attention")
KINDS |= {"Loop": "loops"}

# takes one token
Step = Callable[[], Any]


def export(model: str, passes: str, out: Path, table: Table | None = None, **settings: Any) -> Path:
    """The directory of one exported model, made if it is not there."""
    if not out.exists():
        given = json.dumps([model, passes, str(out), settings])
        found = run_process([sys.executable, "-c", EXPORT, given])
        if table:
            row = {"exported": out.name, "bytes of weights": (out / "weights.bin").stat().st_size}
            sizes = {graph.name: graph.stat().st_size for graph in out.glob("*.onnx")}
            row |= {"seconds": found["seconds"], "of the processor": found["processor seconds"]}
            table.add(row | {"peak MB": found["peak MB"], "bytes of graphs": sizes})
    return out


def graphs(options: argparse.Namespace) -> Iterator[Path]:
    """The graphs to run, exported first."""
    table = Table(options, EXPORTS, "exports")
    for name in options.sides:
        tied = "tied" in name
        for precision in options.precision:
            for blocks in options.blocks if tied else ("",):
                label = f"{name.replace(' ', '-')}{f'-{blocks}' if tied else ''}-{precision}"
                out = export(
                    options.model,
                    PASSES[name].format(blocks=blocks),
                    options.work / label,
                    table,
                    precision=precision,
                    runtime="ort" if name.endswith("@ort") else "any",
                    # a Loop that gathers all weights of the original is slow
                    graphs=("unrolled", "loop") if tied else ("unrolled",),
                )
                yield from sorted(out.glob(f"{options.graphs}.onnx"))


def opened(path: Path, threads: int, profile: str = "") -> Any:
    """A graph in ONNX Runtime."""
    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = threads
    settings.log_severity_level = 3
    settings.enable_profiling = bool(profile)
    settings.profile_file_prefix = profile
    return onnxruntime.InferenceSession(str(path), settings, providers=["CPUExecutionProvider"])


def graph_step(path: Path, session: Any, config: Any, context: int) -> Step:
    """A step of a graph whose states, random numbers, stay where the runtime has them."""
    inputs = [i.name for i in session.get_inputs()]
    states = [i for i in session.get_inputs() if i.name.startswith("past_key")]
    outputs = [o.name for o in session.get_outputs()]
    nodes = onnx.load(path, load_external_data=False).graph.node
    caches = sum(i.name.endswith(".key") for i in states)
    # the caches are appended to where they lie
    in_place = 0 < caches == sum(n.op_type == "GroupQueryAttention" for n in nodes)
    # what is not a number is the batch, the context, or what the configuration says
    known = (1, config.num_key_value_heads, context + ROOM * in_place, config.head_dim)
    # a few thousand numbers, over and over: making all of them takes longer than the steps
    few = 0.1 * np.random.default_rng(0).standard_normal(8192, dtype=np.float32)
    value = onnxruntime.OrtValue.ortvalue_from_numpy
    past: dict[str, Any] = {}
    for item in states:
        shape = [d if isinstance(d, int) else k for d, k in zip(item.shape, known, strict=True)]
        numbers = few.astype(np.float16 if "16" in item.type else np.float32)
        past[item.name] = value(np.resize(numbers, shape))
    length = context

    def step() -> None:
        nonlocal length
        length += 1
        given = {
            "input_ids": np.array([[7]]),
            "attention_mask": np.ones((1, length), np.int64),
            "position_ids": np.array([[length - 1]]),
        }
        feed = {name: value(given[name]) for name in inputs if name in given}
        if not in_place:
            values = session.run_with_ort_values(outputs, feed | past)
            found = dict(zip(outputs, values, strict=True))
            past.update({n: found[n.replace("past_key_values", "present")] for n in past})
            return
        binding = session.io_binding()
        for name, given_value in (feed | past).items():
            binding.bind_ortvalue_input(name, given_value)
        for name in outputs:
            if state := past.get(name.replace("present", "past_key_values")):
                binding.bind_ortvalue_output(name, state)
            else:
                binding.bind_output(name)
        session.run_with_iobinding(binding)

    return step


def graph_side(path: Path, threads: int, config: Any, context: int) -> Step:
    """A graph that is opened for these steps."""
    return graph_step(path, opened(path, threads), config, context)


# one copy, and none while models are exported or profiled
eager = cache(original)


def eager_side(name: str, context: int) -> Step:
    """The model in transformers, behind random keys and values."""
    model = eager(name)
    config = model.config
    past = DynamicCache(config=config)
    few = 0.1 * torch.randn(1, config.num_key_value_heads, 128, config.head_dim)
    whole = few.repeat(1, 1, context // 128, 1)
    for layer in range(config.num_hidden_layers):
        past.update(whole.clone(), whole.clone(), layer)
    step = partial(model, torch.tensor([[7]]), past_key_values=past, use_cache=True)
    return torch.inference_mode()(step)


def llama(options: argparse.Namespace, kind: str, context: int, steps: int) -> Row:
    """What `llama_peer` answers: with keys and values of one type, in a process of its own."""
    prompt = AutoTokenizer.from_pretrained(options.model)(PROMPT).input_ids
    words = [options.llama, Path(__file__).with_name("llama_peer.py"), options.gguf]
    words += ["--threads", options.threads, "--cache", kind, "--context", context]
    words += ["--steps", steps, "--prompt", ",".join(map(str, prompt))]
    output = run_process(words, options.threads)["output"]
    return dict(json.loads(output.splitlines()[-1]))


def agreement(options: argparse.Namespace, kind: str) -> str:
    """How many greedy tokens of llama.cpp in a row are those of transformers."""
    found = llama(options, kind, 128, 1)["greedy"]
    prompt = AutoTokenizer.from_pretrained(options.model)(PROMPT, return_tensors="pt").input_ids
    with torch.no_grad():
        ids = eager(options.model).generate(
            prompt, max_new_tokens=len(found), do_sample=False, eos_token_id=None
        )
    same = [a == b for a, b in zip(found, ids[0, -len(found) :].tolist(), strict=True)]
    return f"{[*same, False].index(False)} of {len(found)}"


def clocks() -> Any:
    """Seconds of the processor and of the clock."""
    return np.array([time.process_time(), time.perf_counter()])


def measure(
    sides: Mapping[str, Callable[[int], Step]],
    llamas: Mapping[str, Callable[[int, int], Row]],
    context: int,
    rounds: int,
) -> dict[str, Any]:
    """Median seconds of a step of each side, of the processor and of the clock, in turns.

    Sides are made one after the other at long contexts, where two would not fit in memory.
    llama.cpp, whose steps are not taken one by one, goes before: a mean for each round.
    """
    steps = next(n for c, n in STEPS.items() if context <= c)
    times: dict[str, list[Any]] = defaultdict(list)
    groups = [list(sides)] if context <= TOGETHER else [[name] for name in sides]
    for number in range(rounds):
        for name, seconds_of in llamas.items():
            found = seconds_of(context, steps)
            times[name].append([found["processor"], found["clock"]])
        for group in groups[:: -1 if number % 2 else 1]:
            made = {name: sides[name](context) for name in group}
            for name, seconds in in_turns(made, steps, clock=clocks).items():
                times[name] += seconds
            del made
            gc.collect()
    return {name: np.median(seconds, axis=0) for name, seconds in times.items()}


def profiled(path: Path, threads: int, config: Any, context: int, skipped: int = 4) -> Row:
    """Milliseconds of a token by what they go into, and MB of memory that are not files."""
    steps = STEPS[128]
    with tempfile.TemporaryDirectory() as folder:
        before = resident()
        session = opened(path, threads, f"{folder}/profile")
        taken = resident() - before
        step = graph_step(path, session, config, context)
        for _ in range(skipped + steps):
            step()
        events = json.loads(Path(session.end_profiling()).read_text())
    runs = [e for e in events if e["name"] == "model_run"][-steps:]
    found, operators = Counter(all=sum(e["dur"] for e in runs)), Counter[str]()
    for event in events:
        if event.get("cat") == "Node" and event["ts"] >= runs[0]["ts"]:
            operator = event["args"]["op_name"]
            kind = KINDS.get(operator, "other operators")
            shapes = str(event["args"].get("output_type_shape"))
            if kind == "products of blocks" and str(config.vocab_size) in shapes:
                kind = operator = "head"
            found[kind] += event["dur"]
            operators[operator] += event["dur"]
    times, of_operators = ({k: v / steps / 1e3 for k, v in c.items()} for c in (found, operators))
    return times | {"memory, MB": taken, "operators": of_operators}


def resident() -> float:
    """MB of memory of this process that are not files."""
    status = Path("/proc/self/status").read_text(encoding="utf-8").split("\n")
    return int(next(x for x in status if "RssAnon" in x).split()[1]) * 1024 / 1e6


def main() -> None:
    """Print a row for each context and each kind of time, or for each graph."""
    options = parse_options(
        __doc__, model=MODEL, work=Path("build/onnx"), contexts=tuple(STEPS), precision=("fp32",),
        blocks=(2,), graphs="*", sides=tuple(PASSES), peer=Path, llama=Path, gguf=Path,
        no_eager=False, rounds=2, profile=False,
    )  # fmt: skip
    config = AutoConfig.from_pretrained(options.model)
    paths = {"peer": options.peer} if options.peer else {}
    paths |= {f"{path.parent.name} {path.stem}": path for path in graphs(options)}
    if options.profile:
        table = Table(options, PROFILE, "profile")
        for case in table.missing({"graph": label} for label in paths):
            # a process for each, so that none finds memory that another has given back
            with ProcessPoolExecutor(1, get_context("spawn")) as pool:
                given = (paths[case["graph"]], options.threads, config, options.contexts[0])
                table.add(case | pool.submit(profiled, *given).result())
        return
    sides: dict[str, Callable[[int], Step]] = {}
    if not options.no_eager:
        sides["transformers fp32"] = partial(eager_side, options.model)
    for label, path in paths.items():
        sides[label] = partial(graph_side, path, options.threads, config)
    llamas = {}
    for kind in ("f32", "f16") if options.llama else ():
        name = f"llama.cpp {options.gguf.stem}, {kind} cache"
        llamas[name] = partial(llama, options, kind)
        print(f"{name}: {agreement(options, kind)} greedy tokens are those of transformers")
    names = [*sides, *llamas]
    columns = {"context": "{:,}", "tokens per second of": "{}"} | dict.fromkeys(names, "{:.2f}")
    table = Table(options, columns)
    for case in table.missing({"context": context} for context in options.contexts):
        seconds = measure(sides, llamas, case["context"], options.rounds)
        for number, kind in enumerate(("the processor", "the clock")):
            speeds = {name: float(1 / seconds[name][number]) for name in names}
            table.add(case | {"tokens per second of": kind} | speeds)


if __name__ == "__main__":
    main()
