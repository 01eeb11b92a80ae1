"""Relaxed recursive models before and after recovery, beside models cut by dropping layers.

Layers are tied into blocks and relaxed at several ranks, and then trained on the same tokens: with
the least squares, trip by trip, that the `align` stage begins with, with its steps as well, and
with neither. Beside each stands the original without some of its layers, as many as make it the
same size: those whose output is nearest to their input (block influence, Men et al., 2024, arXiv
2403.03853), and then distilled on the same tokens. Measured on text of another domain than was
trained on; perplexities are times the original's. Models and results are kept in `--work`.

    python -m benchmarks.relaxed_recovery [--blocks 15,10] [--ranks 32,64,128] [--tokens 16384]
        [--sides fit,align,distil,drop] [--work out/relaxed] [--json FILE]
"""

from __future__ import annotations

from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

import reroll
from benchmarks.harness import MODEL, Row, Table, kept, original, parse_options, progress
from benchmarks.least_squares import rows
from benchmarks.recovery import DATA
from reroll.cli.recovering import token_count
from reroll.recover import recover
from reroll.recover.held_out import held_out
from reroll.recover.hooks import record_trips
from reroll.recover.recipe import parse

START = {"start_tokens": 8192, "start_free": True, "train": "new"}
DISTIL = {"lr": 3e-4}
SIDES: dict[str, tuple[str, list[dict[str, Any]]]] = {
    "fit": ("fitted, distilled", [{"align": {**START, "share": 0}}, {"distil": DISTIL}]),
    "align": (
        "fitted, aligned, distilled",
        [{"align": {**START, "share": 0.4, "lr": 1e-3}}, {"distil": {**DISTIL, "share": 0.6}}],
    ),
    "distil": ("distilled", [{"distil": DISTIL}]),
    "drop": ("layers dropped, distilled", [{"distil": DISTIL}]),
}
SETTINGS = {"length": 512, "batch": 2, "precision": "bf16", "held_rows": 8}
COLUMNS = {
    "": "{}", "M parameters": "{:.1f}", "before": "{:,.4g}", "after": "{:,.4g}", "KL": "{:.3g}",
    "top-1": "{:.1%}", "own domains, before": "{:,.4g}", "own, after": "{:,.4g}",
    "minutes": "{:.0f}",
}  # fmt: skip


def cut(path: str, teacher: Any, parameters: int, out: Path) -> str:
    """The original without its least influential layers, of at most so many parameters."""
    if not out.is_dir():
        with torch.no_grad(), record_trips(teacher.trip_modules()) as seen:
            teacher(input_ids=rows(path, "pydocs.train.txt", skip=1000).data)
        likeness = [torch.cosine_similarity(x, y, -1).mean().item() for x, y in seen]
        model = original(path)
        layers = model.model.layers
        each = sum(p.numel() for p in layers[0].parameters())
        rest = sum(p.numel() for p in model.parameters()) - each * len(layers)
        count = min((parameters - rest) // each, len(layers))
        stay = sorted(sorted(range(len(layers)), key=likeness.__getitem__)[:count])
        model.model.layers = torch.nn.ModuleList(layers[n] for n in stay)
        model.config.num_hidden_layers = count
        model.save_pretrained(out)
        AutoTokenizer.from_pretrained(path).save_pretrained(out)
    return str(out)


def recovered(options: Any, side: str, blocks: int, rank: int, out: Path) -> Row:
    """One model, measured before and after its training."""
    whole = reroll.capture(MODEL, dtype=torch.float32)
    teacher = whole.to_module().eval()
    passes = f"tie(blocks={blocks}, init=average), relax(rank={rank})"
    student = reroll.run_passes(whole, passes, measure=False)
    if side == "drop":
        size = student.parameters()
        path = cut(MODEL, teacher, size, options.work / f"cut-{size}")
        student = reroll.capture(path, dtype=torch.float32)
    wiki = rows(MODEL, "wiki.val.txt")
    before = held_out(student.to_module(), teacher, wiki)
    report = recover(
        student, out, data=options.data, tokens=options.tokens, teacher=whole, overwrite=True,
        recipe=parse({"recover": {**SETTINGS, "stages": SIDES[side][1]}}),
        on_step=progress(out.name),
    )  # fmt: skip
    after = held_out(reroll.load(out).to_module(), teacher, wiki)
    ratios = [m["perplexity"] / m["original_perplexity"] for m in (before, after, *report.measures)]
    return {
        "M parameters": student.parameters() / 1e6, "before": ratios[0], "after": ratios[1],
        "KL": after["kl"], "top-1": after["top1_agreement"], "own domains, before": ratios[2],
        "own, after": ratios[-1], "minutes": report.seconds / 60, "own": report.measures,
    }  # fmt: skip


def main() -> None:
    """Run what has not been run yet, and print the table."""
    options = parse_options(
        __doc__, blocks=(15, 10), ranks=(32, 64, 128), sides=tuple(SIDES), tokens="16384",
        data=DATA, work=Path("out/relaxed"),
    )  # fmt: skip
    options.tokens = token_count(options.tokens)
    options.work.mkdir(parents=True, exist_ok=True)
    table = Table(options, COLUMNS)
    for blocks, rank, side in product(options.blocks, options.ranks, options.sides):
        name = f"{blocks} blocks, rank {rank}: {SIDES[side][0]}"
        out = options.work / f"{side}-{blocks}-{rank}-{options.tokens}"
        for case in table.missing([{"": name}]):
            file = out.with_name(f"{out.name}.json")
            table.add(case | kept(file, partial(recovered, options, side, blocks, rank, out)))


if __name__ == "__main__":
    main()
