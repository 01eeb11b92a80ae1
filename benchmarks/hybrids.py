"""Hybrids at full size: what a capture takes, and how fast they decode in ONNX Runtime."""

from __future__ import annotations

import json
import sys
import tempfile
from argparse import Namespace
from pathlib import Path
from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, DynamicCache

import reroll
from benchmarks.harness import Table, in_turns, medians, run_process
from benchmarks.onnx_speed import Step, graph_side
from reroll.export.onnx import Onnx

CAPTURE = """
import json, sys, torch, transformers, reroll
config = transformers.CONFIG_MAPPING[sys.argv[1]](**json.loads(sys.argv[2]))
with torch.device("meta"):
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
program = reroll.capture(model)
print(json.dumps({
    "parameters": sum(p.numel() for p in model.parameters()),
    "layers": config.num_hidden_layers,
    "loops": ", ".join(f"{l.trips} x {l.period}" for l in program.loops),
}))
"""


def captures(table: Table, options: Namespace) -> None:
    """Capture each model in a process of its own."""
    for case in table.missing():
        values = {k: _repeated(v) for k, v in options.configurations[case["model"]].items()}
        words = [values.pop("model_type"), json.dumps(values)]
        row = run_process([sys.executable, "-W", "ignore", "-c", CAPTURE, *words])
        found = json.loads(row.pop("output").strip().splitlines()[-1])
        table.add(case | row | found)


def _repeated(value: Any) -> Any:
    return value[0] * value[1] if isinstance(value, list) else value


def decode(table: Table, options: Namespace) -> None:
    """Time steps of all sides behind each context."""
    cases = list(table.missing())
    if not cases:
        return
    torch.manual_seed(0)
    model: Any = AutoModelForCausalLM.from_config(CONFIG_MAPPING[options.type](**options.shape))
    program = reroll.capture(model.eval())
    lowered = program.to_module()
    count = sum(p.numel() for p in model.parameters())
    with tempfile.TemporaryDirectory() as folder:
        Onnx(graphs=("unrolled",)).write(program, Path(folder))
        path = Path(folder, "unrolled.onnx")
        for case in cases:
            ids = torch.randint(options.shape["vocab_size"], (1, case["context"]))
            sides = {
                "transformers": module_side(model, ids, options.piece),
                "lowered": module_side(lowered, ids, options.piece),
                "ONNX Runtime": graph_side(path, options.threads, case["context"]),
            }
            times = medians(in_turns(sides, options.rounds))
            row = {f"{name}, ms": 1e3 * seconds for name, seconds in times.items()}
            ratio = times["ONNX Runtime"] / times["transformers"]
            table.add(case | row | {"parameters": count, "ONNX Runtime to transformers": ratio})


def module_side(model: Any, ids: torch.Tensor, piece: int) -> Step:
    """A step of a module behind a prompt [1, tokens]."""
    cache, past = DynamicCache(config=model.config), 0

    def add(tokens: torch.Tensor) -> None:
        nonlocal past
        at = torch.arange(past, past + tokens.shape[1])[None]
        past += tokens.shape[1]
        seen = torch.ones(1, past, dtype=torch.long)
        with torch.no_grad():
            model(
                tokens,
                attention_mask=seen,
                position_ids=at,
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            )

    for part in ids.split(piece, 1):
        add(part)
    return lambda: add(ids[:, :1])
