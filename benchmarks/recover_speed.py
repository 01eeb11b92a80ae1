"""Training speed of recovery beside a plain transformers + peft loop on the original.

Both train LoRA r=8 on q, k, v and o by cross-entropy in bf16 autocast, with the same rows and
optimizer; reroll on the rolled, untied model, or on what `--passes` make of it, through its engine
(text, checkpoints and log included). They run in turns, and the median steps are compared.

    python -m benchmarks.recover_speed [--passes "linearize(mixer=retention)"] [--length 2048]
        [--batch 1] [--steps 6] [--rounds 2] [--json FILE]
"""

from __future__ import annotations

import itertools
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor

import reroll
from benchmarks.harness import MODEL, TEXT, Table, medians, original, parse_options
from reroll.recover import recover
from reroll.recover.recipe import parse

ON = ["q_proj", "k_proj", "v_proj", "o_proj"]
RATE = 1e-4
STAGE = {"train": "lora", "lora_rank": 8, "lora_alpha": 16.0, "lora_on": ON, "lr": RATE}
PLAIN = "plain loop"


def with_adapters(model: Any) -> Any:
    """A model of transformers with adapters on its attentions' projections, to train."""
    return get_peft_model(model, LoraConfig(r=8, lora_alpha=16, target_modules=ON)).train()


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


def plain(options: Any, rows: Tensor) -> list[float]:
    """When each step of the plain loop ended."""
    batches = itertools.islice(itertools.cycle(rows), options.steps)
    steps = plain_loop(with_adapters(original(options.model)), batches, lr=RATE, betas=(0.9, 0.95))
    return [time.perf_counter() for _ in steps]


def ours(options: Any, work: Path) -> list[float]:
    """When each step of recovery ended."""
    times: list[float] = []
    shared = {"length": options.length, "batch": options.batch, "held_rows": 1, "precision": "bf16"}
    recover(
        work / "rolled",
        work / "out",
        data=[TEXT / "wiki.train.txt"],
        recipe=parse({"recover": {**shared, "stages": [{"tune": STAGE}]}}),
        tokens=options.steps * options.length * options.batch,
        overwrite=True,
        restart=True,
        on_step=lambda _: times.append(time.perf_counter()),
    )
    return times


def speeds(options: Any, work: Path) -> dict[str, float]:
    """Tokens per second of both sides; the first step of each run allocates and is not counted."""
    program = reroll.capture(options.model, dtype="float32")
    if options.passes:
        program = reroll.run_passes(program, options.passes, measure=False)
    program.save(str(work / "rolled"))
    generator = torch.Generator().manual_seed(0)
    seconds: dict[str, list[float]] = {PLAIN: [], "reroll": []}
    for _ in range(options.rounds):
        rows = torch.randint(0, 1000, (4, options.batch, options.length), generator=generator)
        for name, ends in ((PLAIN, plain(options, rows)), ("reroll", ours(options, work))):
            seconds[name] += [b - a for a, b in itertools.pairwise(ends)]
    return {n: options.length * options.batch / each for n, each in medians(seconds).items()}


def main() -> None:
    """Run both sides in turns; a row with their speeds and the ratio."""
    options = parse_options(
        __doc__, model=MODEL, passes="", length=512, batch=4, steps=6, rounds=2, threads=2
    )
    columns = {"": "{}", PLAIN: "{:.1f}", "reroll": "{:.1f}", "ratio": "{:.2f}"}
    table = Table(options, columns)
    name = f"{options.passes or 'rolled'}, {options.batch} x {options.length}, tokens/s"
    for case in table.missing([{"": name}]):
        with tempfile.TemporaryDirectory() as work:
            found = speeds(options, Path(work))
        table.add(case | found | {"ratio": found["reroll"] / found[PLAIN]})


if __name__ == "__main__":
    main()
