"""Speed, memory and time of compilation, beside peers that do the same: see the files of cases."""

from __future__ import annotations

import itertools
import json
import shutil
import sys
import tempfile
import time
from argparse import Namespace
from collections.abc import Callable, Iterable, Iterator
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
    filled_cache,
    in_turns,
    medians,
    original,
    run_process,
)
from reroll.mixers import compiled, make
from reroll.recover import recover
from reroll.recover.recipe import parse
from reroll.rewrite.analysis.costs import state_bytes
from reroll.runtime.functions.attention import attend
from reroll.runtime.functions.bands import Band

Run = Callable[[], Any]
TOKEN = torch.tensor([[7]])


# ---- prefill and decoding


@torch.inference_mode()
def speed(table: Table, options: Namespace) -> None:
    """Prefill and decoding of a rolled, untied model, and of the original."""
    models = {
        "transformers": original(options.model, attn_implementation=options.attention),
        "reroll": reroll.capture(options.model, dtype="float32").to_module().eval(),
    }
    caches: dict[str, Any] = {}
    torch.manual_seed(0)

    def prefill(name: str, ids: Tensor) -> None:
        out = models[name](ids, use_cache=True, logits_to_keep=1)
        caches[name] = out.past_key_values

    def decode(name: str, ids: Tensor) -> None:
        models[name](ids[:, :1], past_key_values=caches[name], use_cache=True)

    for case in table.missing():
        context = case["context"]
        ids = torch.randint(0, models["reroll"].config.vocab_size, (1, context))
        rounds = options.prefills.get(context, 3)
        phases = {"prefill": (prefill, rounds, 1), "decode": (decode, 16 * rounds, 3)}
        for phase, (run, count, warm) in phases.items():
            sides = {name: partial(run, name, ids) for name in models}
            seconds = medians(in_turns(sides, count, warm=warm))
            tokens = context if phase == "prefill" else 1
            case |= {f"{phase}, {name}, tokens/s": tokens / s for name, s in seconds.items()}
            case[f"{phase}, ratio"] = seconds["transformers"] / seconds["reroll"]
        table.add(case)


@torch.inference_mode()
def linearized(table: Table, options: Namespace) -> None:
    """Decoding of models with a state of constant size, beside the original at each context."""
    program = reroll.capture(options.model, dtype="float32")
    programs = {
        name: reroll.run_passes(program, text, measure=False)
        for name, text in options.pipelines.items()
    }
    models = {name: each.to_module() for name, each in programs.items()}
    models = {"original": original(options.model)} | models

    def step(name: str, context: int) -> Run:
        model = models[name]
        if name == "original":
            cache = filled_cache(model, context)
        else:
            # a prompt that fills the state, which then stands at the context's end
            cache = model(torch.arange(160)[None] + 100, use_cache=True).past_key_values
            for layer in cache.layers:
                layer.cumulative_length = context
        return partial(model, TOKEN, past_key_values=cache, use_cache=True)

    drift: dict[str, dict[str, float]] = {}
    for name in programs:
        sides = {str(context): step(name, context) for context in options.contexts}
        took = medians(in_turns(sides, 2 * options.steps, warm=3))
        drift[name] = {context: s / next(iter(took.values())) for context, s in took.items()}
    for context in options.contexts:
        sides = {name: step(name, context) for name in models}
        seconds = medians(in_turns(sides, options.steps, warm=3))
        for name, each in seconds.items():
            row = {"context": context, "model": name, "tokens/s": 1 / each}
            row["of the original"] = seconds["original"] / each
            row["state, MB"] = state_bytes(programs.get(name, program), context) / 1e6
            row["over the first"] = drift.get(name, {}).get(str(context))
            table.add(row)


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
                shared = program
                if count < program.loops[0].trips:
                    text = f"tie(blocks={count}, layout={options.layout})"
                    shared = reroll.run_passes(program, text, measure=False)
                run = _in_onnx(shared, options.threads, folder) if integers else _in_torch(shared)
                run(torch.arange(options.context)[None] + 5)
                sides[side] = partial(run, TOKEN)
            # a step of its own brings back what the last side put out of the cache
            clock = clock_of(options.threads)
            seconds = medians(in_turns(sides, options.steps, clock=clock, before=True))
        first, *rest = counts.values()
        case |= {side: 1 / seconds[side] for side in counts.values()}
        table.add(case | {f"{side}, ratio": seconds[first] / seconds[side] for side in rest})


def _in_torch(program: Any) -> Callable[[Tensor], Any]:
    """What takes tokens behind those before, by the lowered module."""
    from transformers import DynamicCache

    model = program.to_module()
    cache = DynamicCache(config=model.config)
    return torch.inference_mode()(partial(model, past_key_values=cache))


def _in_onnx(program: Any, threads: int, folder: str) -> Callable[[Tensor], Any]:
    """The same by the exported graph, whose weights are integers."""
    from reroll.export.onnx import Onnx
    from reroll.export.onnx.emit.session import Session

    directory = Path(tempfile.mkdtemp(dir=folder))
    Onnx(graphs=("unrolled",), precision="int8").write(program, directory)
    session = Session(directory / "unrolled.onnx", threads)
    session.reset(1)
    length = 0

    def run(ids: Tensor) -> None:
        nonlocal length
        start, length = length, length + ids.shape[1]
        mask = torch.ones(1, length, dtype=torch.long)
        positions = torch.arange(start, length)[None]
        session.run({"input_ids": ids, "attention_mask": mask, "position_ids": positions})

    return run


# ---- mixers

HEADS, KV_HEADS, SIZE = 9, 3, 64


def mixers(table: Table, options: Namespace) -> None:
    """Each form of a mixer or of a window, and softmax attention, in turns."""
    torch.manual_seed(0)
    for case in table.missing():
        length, dtype = case["tokens"], getattr(torch, case["dtype"])
        make_forms = _windowed if case[""] == "window" else partial(_mixing, case[""])
        q, k, v = inputs = _drawn(length, torch.float32)
        attention = partial(F.scaled_dot_product_attention, q, k, v, is_causal=True)
        forms: dict[str, Form] = {"peer": (attention, inputs)}
        leaves, named = make_forms(length, dtype)
        forms |= {name: (form, leaves) for name, form in named.items()}
        backward = case["backward"] == "yes"
        sides = {name: partial(_run, *form, backward) for name, form in forms.items()}
        turns = max(2, options.turns * 2048 // length)
        seconds = best(in_turns(sides, turns, clock=clock_of(options.threads)))
        peer = seconds.pop("peer")
        for form, took in seconds.items():
            times = {
                "ms": 1e3 * took,
                "attention, ms": 1e3 * peer,
                "attention over it": peer / took,
            }
            table.add(case | {"form": form} | times)


Forward = Callable[[], Tensor]
# what is run, and what has gradients
Form = tuple[Forward, list[Tensor]]
Forms = tuple[list[Tensor], dict[str, Forward]]


def _run(forward: Forward, leaves: list[Tensor], backward: bool) -> None:
    """A forward, or that and all gradients."""
    for leaf in leaves:
        leaf.requires_grad_(backward)
    with torch.set_grad_enabled(backward):
        out = forward()
    if backward:
        torch.autograd.grad(out.float().sum(), leaves, allow_unused=True)


def _drawn(length: int, dtype: torch.dtype, kv_heads: int = HEADS) -> list[Tensor]:
    """Random q, k and v [1, heads, length, size]."""
    heads = (HEADS, kv_heads, kv_heads)
    return [torch.randn(1, count, length, SIZE).to(dtype) for count in heads]


def _mixing(name: str, length: int, dtype: torch.dtype) -> Forms:
    """A mixer from inputs to output and state."""
    mixer = make(name)
    kinds = mixer.gates(SIZE, SIZE)
    gates = [g.activation(torch.randn(1, HEADS, length, *g.shape)) for g in kinds]
    q, k, v = drawn = _drawn(length, dtype)
    return [*drawn, *gates], {
        "eager": lambda: mixer.chunk(q, k, v, gates)[0],
        "compiled": lambda: compiled.chunk(mixer, q, k, v, gates)[0],
    }


def _windowed(length: int, dtype: torch.dtype) -> Forms:
    """Attention over a window of 64 and 4 sinks."""
    band = Band(length, 64, 4)
    masks = {
        "causal": None,
        "mask of all pairs": band.written_out(torch.device("cpu")),
        "blocks": band,
    }
    q, k, v = drawn = _drawn(length, dtype, KV_HEADS)
    return drawn, {
        name: partial(attend, q, k, v, SIZE**-0.5, True, mask) for name, mask in masks.items()
    }


# ---- training

ADAPTED = ["q_proj", "k_proj", "v_proj", "o_proj"]
RATE = 1e-4
LORA = {"train": "lora", "lora_rank": 8, "lora_alpha": 16.0, "lora_on": ADAPTED, "lr": RATE}


def with_adapters(model: Any) -> Any:
    """A model of transformers with adapters on its attentions' projections, to train."""
    from peft import LoraConfig, get_peft_model

    return get_peft_model(model, LoraConfig(r=8, lora_alpha=16, target_modules=ADAPTED)).train()


def plain_loop(model: Any, batches: Iterable[Tensor], **options: Any) -> Iterator[float]:
    """Train on rows of tokens [rows, length] as scripts usually do; yields each step's loss."""
    wanted = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(wanted, weight_decay=0.0, **options)
    for rows in batches:
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(input_ids=rows, labels=rows, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(wanted, 1.0)
        optimizer.step()
        yield loss.item()


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
    """When each step of the plain loop ended."""
    rows = torch.randint(0, 1000, (4, options.batch, options.length))
    batches = itertools.islice(itertools.cycle(rows), options.steps)
    steps = plain_loop(with_adapters(original(options.model)), batches, lr=RATE, betas=(0.9, 0.95))
    return [time.perf_counter() for _ in steps]


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
