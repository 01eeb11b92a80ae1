"""Speed, memory and time of compilation, beside peers that do the same: see the files of cases."""

from __future__ import annotations

import itertools
import json
import shutil
import sys
import tempfile
import time
from argparse import Namespace
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import reroll
from benchmarks.harness import (
    TEXT,
    Row,
    Table,
    best,
    clock_of,
    in_turns,
    medians,
    original,
    passing,
    run_process,
)
from benchmarks.onnx_speed import export, graph_side, module_side
from reroll.mixers import compiled, make
from reroll.recover import recover
from reroll.recover.recipe import parse
from reroll.runtime.functions.attention import attend
from reroll.runtime.functions.bands import Band

Run = Callable[[], Any]


# ---- decoding


def tied(table: Table, options: Namespace) -> None:
    """Decoding with fewer distinct layers, in each precision: what a layer's weights cost."""
    counts = {count: f"{count} layers" for count in options.blocks}
    for case in table.missing():
        integers = case["precision"] == "int8"
        dtype = torch.float32 if integers else getattr(torch, case["precision"])
        program = reroll.capture(options.model, dtype=dtype)
        elements = sum(w.meta.elements for w in program.weights.values() if w.index is not None)
        case["MB of a layer"] = elements * (1 if integers else dtype.itemsize) / 1e6
        with tempfile.TemporaryDirectory() as folder:
            sides: dict[str, Run] = {}
            for count, side in counts.items():
                shared = count < program.loops[0].trips
                passes = f"tie(blocks={count}, layout={options.layout})" if shared else ""
                if integers:
                    out = Path(folder, side)
                    graphs = ("unrolled",)
                    export(options.model, passes, out, graphs=graphs, precision="int8")
                    path = out / "unrolled.onnx"
                    sides[side] = graph_side(path, options.threads, options.context)
                else:
                    model = reroll.run_passes(program, passes, measure=False).to_module()
                    sides[side] = module_side(model, options.context)
            # a step of its own brings back what the last side put out of the cache
            clock = clock_of(options.threads)
            seconds = medians(in_turns(sides, options.steps, clock=clock, before=True))
        first, *rest = counts.values()
        case |= {side: 1 / seconds[side] for side in counts.values()}
        table.add(case | {f"{side}, ratio": seconds[first] / seconds[side] for side in rest})


# ---- mixers

HEADS, KV_HEADS, SIZE = 9, 3, 64
Forms = dict[str, Callable[..., Tensor]]


def mixers(table: Table, options: Namespace) -> None:
    """Each form of a mixer or of a window, and softmax attention, in turns."""
    torch.manual_seed(0)
    for case in table.missing():
        length, dtype = case["tokens"], getattr(torch, case["dtype"])
        make_forms = _windowed if case[""] == "window" else partial(_mixing, case[""])
        backward = case["backward"] == "yes"
        attention = partial(F.scaled_dot_product_attention, is_causal=True)
        sides = {"peer": passing(attention, _drawn(length, torch.float32), backward)}
        inputs, forms = make_forms(length, dtype)
        sides |= {name: passing(form, inputs, backward) for name, form in forms.items()}
        turns = max(2, options.turns * 2048 // length)
        seconds = best(in_turns(sides, turns, clock=clock_of(options.threads)))
        peer = seconds.pop("peer")
        for form, took in seconds.items():
            ms = {"ms": 1e3 * took, "attention, ms": 1e3 * peer}
            table.add(case | {"form": form} | ms | {"attention over it": peer / took})


def _drawn(length: int, dtype: torch.dtype, kv_heads: int = HEADS) -> list[Tensor]:
    """Random q, k and v [1, heads, length, size]."""
    heads = (HEADS, kv_heads, kv_heads)
    return [torch.randn(1, count, length, SIZE).to(dtype) for count in heads]


def _mixing(name: str, length: int, dtype: torch.dtype) -> tuple[list[Tensor], Forms]:
    """Inputs of a mixer, and its forms from a state of zeros."""
    mixer = make(name)
    gates = [
        gate.activation(torch.randn(1, HEADS, length, *gate.shape))
        for gate in mixer.gates(SIZE, SIZE)
    ]
    return [*_drawn(length, dtype), *gates], {
        "eager": lambda q, k, v, *gates: mixer.chunk(q, k, v, gates)[0],
        "compiled": lambda q, k, v, *gates: compiled.chunk(mixer, q, k, v, gates)[0],
    }


def _windowed(length: int, dtype: torch.dtype) -> tuple[list[Tensor], Forms]:
    """Queries, keys and values, and forms of attention over a window of 64 and 4 sinks."""
    band = Band(length, 64, 4)
    written_out = band.written_out(torch.device("cpu"))
    masks = {"causal": None, "mask of all pairs": written_out, "blocks": band}
    return _drawn(length, dtype, KV_HEADS), {
        name: partial(attend, scale=SIZE**-0.5, causal=True, mask=mask)
        for name, mask in masks.items()
    }


# ---- training

ADAPTED = ["q_proj", "k_proj", "v_proj", "o_proj"]
RATE = 1e-4
LORA = {"train": "lora", "lora_rank": 8, "lora_alpha": 16.0, "lora_on": ADAPTED, "lr": RATE}


def training(table: Table, options: Namespace) -> None:
    """Steps of recovery and of the plain loop; the first of each run is not counted."""
    shape = f"{options.batch} x {options.length}"
    case = {"": f"{options.passes or 'rolled'}, {shape}, tokens/s"}
    for _ in table.missing([case]):
        with tempfile.TemporaryDirectory() as work:
            program = reroll.capture(options.model, dtype="float32")
            reroll.run_passes(program, options.passes, measure=False).save(f"{work}/rolled")
            seconds: dict[str, list[float]] = {"plain loop": [], "reroll": []}
            torch.manual_seed(0)
            for _ in range(options.rounds):
                for name, run in (("plain loop", _plain), ("reroll", _recovered)):
                    seconds[name] += [b - a for a, b in itertools.pairwise(run(options, work))]
        took = medians(seconds)
        found = {name: options.length * options.batch / each for name, each in took.items()}
        table.add(case | found | {"ratio": found["reroll"] / found["plain loop"]})


def _plain(options: Namespace, work: str) -> list[float]:
    """When each step ended of training a model of transformers and peft as scripts usually do."""
    from peft import LoraConfig, get_peft_model

    adapters = LoraConfig(r=8, lora_alpha=16, target_modules=ADAPTED)
    model = get_peft_model(original(options.model), adapters).train()
    wanted = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(wanted, lr=RATE, betas=(0.9, 0.95), weight_decay=0.0)
    times = []
    for _ in range(options.steps):
        rows = torch.randint(0, 1000, (options.batch, options.length))
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(input_ids=rows, labels=rows, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(wanted, 1.0)
        optimizer.step()
        loss.item()
        times.append(time.perf_counter())
    return times


def _recovered(options: Namespace, work: str) -> list[float]:
    """When each step of recovery ended."""
    times: list[float] = []
    shared = {"length": options.length, "batch": options.batch, "held_rows": 1, "precision": "bf16"}
    recover(
        f"{work}/rolled",
        f"{work}/out",
        data=[TEXT / "wiki.train.txt"],
        recipe=parse({"recover": {**shared, "stages": [{"tune": LORA}]}}),
        tokens=options.steps * options.length * options.batch,
        overwrite=True,
        restart=True,
        on_step=lambda _: times.append(time.perf_counter()),
    )
    return times


# ---- processes of their own


def compiling(table: Table, options: Namespace) -> None:
    """From a cold start to compiled, each side with an empty compiler cache."""
    for case in table.missing():
        call = f"compile_once({case['']!r}, {options.model!r})"
        code = f"from benchmarks.timed import compile_once; {call}"
        with tempfile.TemporaryDirectory() as cache:
            found = run_process(
                [sys.executable, "-c", code], options.threads, TORCHINDUCTOR_CACHE_DIR=cache
            )
        case |= json.loads(found["output"].splitlines()[-1])
        peer = table.rows[0]["seconds"] if table.rows else case["seconds"]
        table.add(case | {"ratio": peer / case["seconds"]})


def compile_once(side: str, model: str) -> None:
    """Time the first compiled forward of one side, and print it as JSON."""
    ids = torch.randint(0, 1000, (1, 64))
    start = time.perf_counter()
    torch.compile(lambda x: x.sin().sum())(torch.ones(64, 64))
    toolchain = time.perf_counter() - start
    if side == "reroll":
        run = reroll.capture(model, dtype="float32").to_module().eval()
        start = time.perf_counter()
        run.compile_trips()
    else:
        whole = original(model)
        start = time.perf_counter()
        run = torch.compile(whole)
    with torch.no_grad():
        run(input_ids=ids, use_cache=False)
    print(json.dumps({"seconds": time.perf_counter() - start, "once, seconds": toolchain}))


def memory(table: Table, options: Namespace) -> None:
    """Peak memory of converting a checkpoint of random weights, and of merging it with itself."""
    if options.work is None:
        raise SystemExit("--work DIR: a folder for about 20 GB of files")
    source, out = Path(options.work, "checkpoint"), Path(options.work, "converted")
    if not source.exists():
        _write_checkpoint(source, options.shape | {"num_hidden_layers": options.layers})
    words = [sys.executable, "-m", "reroll.cli", "convert", source, out]
    commands = {"reroll": [*words, "--passes", options.passes, "--measure", "off"]}
    if options.mergekit:
        # by another name: mergekit refuses to merge a path with itself
        again = source.with_name("checkpoint-again")
        again.unlink(missing_ok=True)
        again.symlink_to(source.resolve(), target_is_directory=True)
        models = [{"model": str(m), "parameters": {"weight": 0.5}} for m in (source, again)]
        merge = {"merge_method": "linear", "models": models, "dtype": "bfloat16"}
        (file := source.with_name("merge.yaml")).write_text(json.dumps(merge))
        commands["mergekit"] = [options.mergekit, file, out, "--lazy-unpickle", "--allow-crimes"]
    for case in table.missing({"": side} for side in commands):
        shutil.rmtree(out, ignore_errors=True)
        row: Row = case | run_process(commands[case[""]], options.threads) | {"output": None}
        for title, directory in (("written, MB", out), ("checkpoint, MB", source)):
            row[title] = sum(f.stat().st_size for f in directory.glob("*.safetensors")) / 1e6
        table.add(row)
    if not options.keep:
        shutil.rmtree(options.work, ignore_errors=True)


def _write_checkpoint(directory: Path, shape: dict[str, Any]) -> None:
    """Write a Llama checkpoint of random weights in shards of a few layers."""
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**shape)).bfloat16()
    model.to_empty(device="cpu")
    model.tie_weights()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in model.parameters():
            weight.normal_(0, 0.02, generator=generator)
    model.save_pretrained(directory, max_shard_size="850MB")
