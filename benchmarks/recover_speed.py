"""Training speed of recovery beside a plain transformers + peft loop on the original.

Both train LoRA r=8 on q, k, v and o by cross-entropy, with the same rows, optimizer and precision;
reroll on the rolled, untied model, or on what `--passes` make of it, through its engine (text,
checkpoints and log included). They run in turns, and the median seconds of a step are compared.

    python -m benchmarks.recover_speed [--model DIR] [--text FILE] [--precision bf16] [--json FILE]
        [--passes "linearize(mixer=retention)"] [--length 2048] [--batch 1]
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

import reroll
from reroll.recover import recover
from reroll.recover.recipe import parse

ON = ["q_proj", "k_proj", "v_proj", "o_proj"]
RANK, ALPHA, RATE = 8, 16.0, 1e-4


def plain(model: str, rows: torch.Tensor, steps: int, precision: str) -> list[float]:
    """Seconds of each step of the usual loop."""
    original = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    adapted = get_peft_model(
        original, LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=ON, lora_dropout=0.0)
    ).train()
    wanted = [p for p in adapted.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(wanted, lr=RATE, betas=(0.9, 0.95), weight_decay=0.0)
    seconds = []
    for step in range(steps):
        batch = rows[step % len(rows)]
        start = time.perf_counter()
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            loss = adapted(batch, labels=batch, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(wanted, 1.0)
        optimizer.step()
        loss.item()
        seconds.append(time.perf_counter() - start)
    return seconds


def ours(rolled: str, options: argparse.Namespace, work: Path) -> list[float]:
    """Seconds from step to step of recovery."""
    stage = {"train": "lora", "lora_rank": RANK, "lora_alpha": ALPHA, "lora_on": ON, "lr": RATE}
    settings = {"length": options.length, "batch": options.batch, "held_rows": 1}
    recipe = parse(
        {"recover": {**settings, "precision": options.precision, "stages": [{"tune": stage}]}}
    )
    times = []

    def on_step(_: Mapping[str, Any]) -> None:
        times.append(time.perf_counter())

    tokens = options.steps * options.length * options.batch
    recover(
        rolled, work / "out", data=[options.text], recipe=recipe, tokens=tokens,
        overwrite=True, restart=True, on_step=on_step,
    )  # fmt: skip
    return [b - a for a, b in itertools.pairwise(times)]


def main() -> None:
    """Run both in turns and print their speeds and the ratio."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="models/smollm2-135m-instruct")
    parser.add_argument("--text", default="data/text/wiki.train.txt")
    parser.add_argument("--passes", help="rewrite our side's model with these first")
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--steps", type=int, default=6, help="of each side in each round")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="bf16")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    generator = torch.Generator().manual_seed(0)
    shape = (4, options.batch, options.length)
    seconds: dict[str, list[float]] = {"transformers + peft": [], "reroll": []}
    with tempfile.TemporaryDirectory() as work:
        program = reroll.capture(options.model, dtype="float32")
        if options.passes:
            program = reroll.run_passes(program, options.passes, measure=False)
        program.save(f"{work}/rolled")
        for _ in range(options.rounds):
            rows = torch.randint(0, 1000, shape, generator=generator)
            # the first step allocates
            found = plain(options.model, rows, options.steps, options.precision)
            seconds["transformers + peft"] += found[1:]
            seconds["reroll"] += ours(f"{work}/rolled", options, Path(work))
    tokens = options.length * options.batch
    speeds = {name: tokens / statistics.median(each) for name, each in seconds.items()}
    for name, speed in speeds.items():
        print(f"{name:20s} {speed:8.1f} tokens/s")
    ratio = speeds["reroll"] / speeds["transformers + peft"]
    print(f"ratio                {ratio:8.3f}")
    if options.json:
        options.json.write_text(json.dumps({**speeds, "ratio": ratio}, indent=2))


if __name__ == "__main__":
    main()
