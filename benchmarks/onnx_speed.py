"""Exported models in ONNX Runtime: speed beside transformers and llama.cpp, and what bounds it.

See the files of cases. With one thread, a step's processor time is what it would take with the
machine to itself, but for caches and memory that others use. So that is reported beside the time by
the clock.
"""

from __future__ import annotations

import gc
import json
import sys
import tempfile
import time
from argparse import Namespace
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
from transformers import AutoConfig, AutoTokenizer

from benchmarks.harness import Row, Table, filled_cache, in_turns, original, run_process
from reroll.export.onnx.emit.session import Session

# a process of its own: what it takes of memory is of one export
EXPORT = """
import json, pathlib, sys, reroll, reroll.writing, reroll.export.onnx
model, passes, out, options = json.loads(sys.argv[1])
program = reroll.run_passes(reroll.capture(model, dtype="float32"), passes, measure=False)
with reroll.writing.new_directory(pathlib.Path(out)) as directory:
    reroll.export.onnx.Onnx(**options).write(program, directory)
"""
# the longest context at which all sides fit into memory together
TOGETHER = 1024
# tokens that fit into a cache behind the context
ROOM = 64
PROMPT = "The history of the bicycle begins in"
# takes one token
Step = Callable[[], Any]


def export(model: str, passes: str, out: Path, table: Table | None = None, **settings: Any) -> Path:
    """The directory of one exported model, made if it is not there."""
    if not out.exists():
        given = json.dumps([model, passes, str(out), settings])
        found = run_process([sys.executable, "-c", EXPORT, given])
        if table:
            row = found | {"exported": out.name, "output": None}
            row["bytes of weights"] = (out / "weights.bin").stat().st_size
            sizes = {graph.name: graph.stat().st_size for graph in out.glob("*.onnx")}
            table.add(row | {"bytes of graphs": sizes})
    return out


def exported(options: Namespace) -> Iterator[tuple[str, Path]]:
    """The graphs to run by name, exported first."""
    table = Table(options, options.exports, "exports")
    for side in options.sides:
        name, _, runtime = side.partition("@")
        tied = "tied" in name
        for precision in options.precision:
            for blocks in options.blocks if tied else ("",):
                label = f"{side.replace(' ', '-')}{f'-{blocks}' if tied else ''}-{precision}"
                out = export(
                    options.model,
                    options.pipelines[name].format(blocks=blocks),
                    Path(options.work, label),
                    table,
                    precision=precision,
                    runtime=runtime or "any",
                    # a Loop that gathers all weights of the original is slow
                    graphs=("unrolled", "loop") if tied else ("unrolled",),
                )
                for path in sorted(out.glob(f"{options.graphs}.onnx")):
                    yield f"{label} {path.stem}", path
    if options.peer:
        yield "peer", Path(options.peer)


# ---- steps


def graph_step(session: Any, path: Path, context: int) -> Step:
    """A step of a graph whose states, random numbers, stay where the runtime has them.

    Where all caches are appended to by GroupQueryAttention, past and present are one buffer.
    """
    inputs = [i.name for i in session.get_inputs()]
    states = [i for i in session.get_inputs() if i.name.startswith("past_key")]
    outputs = [o.name for o in session.get_outputs()]
    nodes = onnx.load(path, load_external_data=False).graph.node
    caches = sum(i.name.endswith(".key") for i in states)
    in_place = 0 < caches == sum(n.op_type == "GroupQueryAttention" for n in nodes)
    sizes = {"batch_size": 1, "past_sequence_length": context + ROOM * in_place}
    # a few thousand numbers, over and over: making all of them takes longer than the steps
    few = 0.1 * np.random.default_rng(0).standard_normal(8192, dtype=np.float32)
    value = onnxruntime.OrtValue.ortvalue_from_numpy
    past: dict[str, Any] = {}
    for item in states:
        shape = [d if isinstance(d, int) else sizes[d] for d in item.shape]
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
        feed = {name: value(given[name]) for name in inputs if name in given} | past
        binding = session.io_binding()
        for name, bound in feed.items():
            binding.bind_ortvalue_input(name, bound)
        for name in outputs:
            state = past.get(name.replace("present", "past_key_values"))
            if in_place and state:
                binding.bind_ortvalue_output(name, state)
            else:
                binding.bind_output(name)
        session.run_with_iobinding(binding)
        if not in_place:
            found = dict(zip(outputs, binding.get_outputs(), strict=True))
            past.update({n: found[n.replace("past_key_values", "present")] for n in past})

    return step


def graph_side(path: Path, threads: int, context: int) -> Step:
    """A graph that is opened for these steps."""
    return graph_step(Session(path, threads).session, path, context)


# one copy, and none while models are exported or profiled
eager = cache(original)


def module_side(model: Any, context: int) -> Step:
    """A step of a module behind random keys and values."""
    past = filled_cache(model, context)
    step = partial(model, torch.tensor([[7]]), past_key_values=past, use_cache=True)
    return torch.inference_mode()(step)


def llama(options: Namespace, kind: str, context: int, steps: int) -> Row:
    """What `llama_peer` answers: with keys and values of one type, in a process of its own."""
    prompt = AutoTokenizer.from_pretrained(options.model)(PROMPT).input_ids
    words = [options.llama, Path(__file__).with_name("llama_peer.py"), options.gguf]
    words += ["--threads", options.threads, "--cache", kind, "--context", context]
    words += ["--work", options.work, "--steps", steps, "--prompt", ",".join(map(str, prompt))]
    output = run_process(words, options.threads)["output"]
    return dict(json.loads(output.splitlines()[-1]))


def agreement(options: Namespace, kind: str) -> str:
    """How many greedy tokens of llama.cpp in a row are those of transformers."""
    found = llama(options, kind, 128, 1)["greedy"]
    prompt = AutoTokenizer.from_pretrained(options.model)(PROMPT, return_tensors="pt").input_ids
    greedy = {"max_new_tokens": len(found), "do_sample": False, "eos_token_id": None}
    ids = eager(options.model).generate(prompt, **greedy)[0, -len(found) :].tolist()
    same = [a == b for a, b in zip(found, ids, strict=True)]
    return f"{[*same, False].index(False)} of {len(found)}"


# ---- speed


def measure(table: Table, options: Namespace) -> None:
    """Add a row for each context and each kind of time."""
    sides: dict[str, Callable[[int], Step]] = {}
    if not options.no_eager:
        sides["transformers fp32"] = lambda context: module_side(eager(options.model), context)
    for label, path in exported(options):
        sides[label] = partial(graph_side, path, options.threads)
    llamas = {}
    for kind in ("f32", "f16") if options.llama else ():
        name = f"llama.cpp {Path(options.gguf).stem}, {kind} cache"
        llamas[name] = partial(llama, options, kind)
        print(f"{name}: {agreement(options, kind)} greedy tokens are those of transformers")
    for case in table.missing():
        seconds = _seconds(sides, llamas, case["context"], options)
        for number, kind in enumerate(("the processor", "the clock")):
            speeds = {name: float(1 / each[number]) for name, each in seconds.items()}
            table.add(case | {"tokens per second of": kind} | speeds)


def clocks() -> Any:
    """Seconds of the processor and of the clock."""
    return np.array([time.process_time(), time.perf_counter()])


def _seconds(
    sides: Mapping[str, Callable[[int], Step]],
    llamas: Mapping[str, Callable[[int, int], Row]],
    context: int,
    options: Namespace,
) -> dict[str, Any]:
    """Median seconds of a step of each side, of the processor and of the clock, in turns.

    Sides are made one after the other at long contexts, where two would not fit in memory.
    llama.cpp, whose steps are not taken one by one, goes before: a mean for each round.
    """
    steps = next(n for c, n in options.steps.items() if context <= c)
    times: dict[str, list[Any]] = defaultdict(list)
    groups = [list(sides)] if context <= TOGETHER else [[name] for name in sides]
    for number in range(options.rounds):
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


# ---- where a token's time goes

# what the operators of a graph are for; in a Loop's time is that of its nodes
KINDS = dict.fromkeys(("MatMul", "MatMulNBits", "Gemm"), "products of blocks")
KINDS |= dict.fromkeys(("Attention", "GroupQueryAttention", "LinearAttention"), "attention")
KINDS |= {"Loop": "loops"}


def profile(table: Table, options: Namespace) -> None:
    """Add a row for each graph."""
    config = AutoConfig.from_pretrained(options.model)
    paths = dict(exported(options))
    for case in table.missing({"graph": label} for label in paths):
        # a process for each, so that none finds memory that another has given back
        with ProcessPoolExecutor(1, get_context("spawn")) as pool:
            given = (paths[case["graph"]], options.threads, config, options.context, options.steps)
            table.add(case | pool.submit(profiled, *given).result())


def profiled(path: Path, threads: int, config: Any, context: int, steps: int) -> Row:
    """Milliseconds of a token by what they go into, and MB of memory that are not files."""
    with tempfile.TemporaryDirectory() as folder:
        before, settings = _resident(), onnxruntime.SessionOptions()
        settings.intra_op_num_threads, settings.enable_profiling = threads, True
        settings.profile_file_prefix = f"{folder}/profile"
        session = onnxruntime.InferenceSession(path, settings, providers=["CPUExecutionProvider"])
        taken = _resident() - before
        step = graph_step(session, path, context)
        for _ in range(4 + steps):
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


def _resident() -> float:
    """MB of memory of this process that are not files."""
    status = Path("/proc/self/status").read_text(encoding="utf-8").split("\n")
    return int(next(x for x in status if "RssAnon" in x).split()[1]) * 1024 / 1e6
