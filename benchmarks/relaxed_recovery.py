"""Relaxed recursive models before and after recovery, beside models cut by dropping layers.

Layers are tied into blocks and relaxed at several ranks, and then trained on the same tokens: with
the least squares, trip by trip, that the `align` stage begins with, with its steps as well, and
with neither. Beside each stands the original without some of its layers, as many as make it the
same size: those whose output is nearest to their input (block influence, Men et al., 2024, arXiv
2403.03853), and then distilled on the same tokens. Measured on text of another domain than was
trained on.

    python -m benchmarks.relaxed_recovery [--blocks 15,10] [--ranks 32,64,128] [--tokens 16384]
        [--sides fit,align,distil,drop] [--threads N] [--work out/relaxed]

Results are kept in `--work`: a run that was stopped goes on, and the table has all that is there.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import reroll
from benchmarks.least_squares import MEASURED, rows
from benchmarks.recovery import DATA
from reroll.cli.recovery import token_count
from reroll.recover import recover
from reroll.recover.held_out import held_out
from reroll.recover.hooks import removing_hooks
from reroll.recover.recipe import Recipe, parse

START = {"start_tokens": 8192, "start_free": True, "train": "new"}
STAGES: dict[str, list[dict[str, Any]]] = {
    "fit": [{"align": {**START, "share": 0}}, {"distil": {"lr": 3e-4}}],
    "align": [
        {"align": {**START, "share": 0.4, "lr": 1e-3}},
        {"distil": {"share": 0.6, "lr": 3e-4}},
    ],
    "distil": [{"distil": {"lr": 3e-4}}],
    "drop": [{"distil": {"lr": 3e-4}}],
}
NAMES = {
    "fit": "fitted, distilled",
    "align": "fitted, aligned, distilled",
    "distil": "distilled",
    "drop": "layers dropped, distilled",
}


def recipe(side: str) -> Recipe:
    """How one side is trained."""
    shared = {"length": 512, "batch": 2, "precision": "bf16", "held_rows": 8}
    return parse({"recover": {**shared, "stages": STAGES[side]}})


def influences(model: Any, ids: torch.Tensor) -> list[float]:
    """1 - the mean cosine of what each layer takes and gives, over text."""
    found: list[float] = []

    def note(_layer: Any, taken: tuple[torch.Tensor, ...], given: torch.Tensor) -> None:
        found.append(1 - torch.cosine_similarity(taken[0], given, -1).mean().item())

    with (
        torch.no_grad(),
        removing_hooks([n.register_forward_hook(note) for n in model.model.layers]),
    ):
        model(input_ids=ids)
    return found


def cut(path: str, parameters: int, out: Path) -> str:
    """The original without its least influential layers, of at most so many parameters."""
    if not out.is_dir():
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
        tokenizer = AutoTokenizer.from_pretrained(path)
        found = influences(model, rows(tokenizer, "pydocs.train.txt", MEASURED, 1000).data)
        layers = model.model.layers
        each = sum(p.numel() for p in layers[0].parameters())
        rest = sum(p.numel() for p in model.parameters()) - each * len(layers)
        count = min((parameters - rest) // each, len(layers))
        kept = sorted(sorted(range(len(layers)), key=lambda n: -found[n])[:count])
        model.model.layers = torch.nn.ModuleList(layers[n] for n in kept)
        model.config.num_hidden_layers = count
        if getattr(model.config, "layer_types", None):
            model.config.layer_types = [model.config.layer_types[n] for n in kept]
        for number, layer in enumerate(model.model.layers):
            layer.self_attn.layer_idx = number
        model.save_pretrained(out)
        tokenizer.save_pretrained(out)
    return str(out)


def case(options: argparse.Namespace, side: str, blocks: int, rank: int) -> dict[str, Any]:
    """One model, measured before and after its training."""
    file: Path = options.work / f"{side}-{blocks}-{rank}-{options.tokens}.json"
    if file.is_file():
        return dict(json.loads(file.read_text(encoding="utf-8")))
    original = reroll.capture(options.model, dtype=torch.float32)
    passes = f"tie(blocks={blocks}, init=average), relax(rank={rank})"
    student = reroll.run_passes(original, passes, measure=False)
    if side == "drop":
        dropped = options.work / f"cut-{student.parameters()}"
        path = cut(options.model, student.parameters(), dropped)
        student = reroll.capture(path, dtype=torch.float32)
    teacher = original.to_module().eval()
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    wiki = rows(tokenizer, "wiki.val.txt", MEASURED)
    before = held_out(student.to_module(), teacher, wiki)

    def show(step: Any) -> None:
        if step["steps"] % 4 == 0:
            left = step["seconds_left"] / 60
            print(f"  {file.stem}: {step['smooth']:.4g}, {left:.0f} minutes left", flush=True)

    out = file.with_suffix("")
    report = recover(
        student, out, data=DATA, recipe=recipe(side), tokens=options.tokens, teacher=original,
        overwrite=True, on_step=show,
    )  # fmt: skip
    after = held_out(reroll.load(out).to_module(), teacher, wiki)
    found = {
        "parameters": student.parameters(),
        "before": before,
        "after": after,
        "own": report.measures,
        "tokens": report.tokens,
        "seconds": report.seconds,
    }
    file.write_text(json.dumps(found, indent=1), encoding="utf-8")
    return found


def line(name: str, found: dict[str, Any]) -> str:
    """A row of the table."""
    before, after = found["before"], found["after"]
    first, last = found["own"][0], found["own"][-1]
    own = [f"{m['perplexity'] / m['original_perplexity']:,.4g}" for m in (first, last)]
    whole = after["original_perplexity"]
    cells = [
        f"{found['parameters'] / 1e6:.1f}",
        f"{before['perplexity'] / whole:,.4g}",
        f"{after['perplexity'] / whole:,.4g}",
        f"{after['kl']:.3g}",
        f"{after['top1_agreement']:.1%}",
        *own,
        f"{found['seconds'] / 60:.0f}",
    ]
    return f"| {name} | " + " | ".join(cells) + " |"


def main() -> None:
    """Run what has not been run yet, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="models/smollm2-135m-instruct")
    parser.add_argument("--blocks", default="15,10")
    parser.add_argument("--ranks", default="32,64,128")
    parser.add_argument("--sides", default=",".join(STAGES))
    parser.add_argument("--tokens", default="16384", type=token_count)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--work", type=Path, default=Path("out/relaxed"))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    options.work.mkdir(parents=True, exist_ok=True)
    lines = []
    for blocks in map(int, options.blocks.split(",")):
        for rank in map(int, options.ranks.split(",")):
            for side in options.sides.split(","):
                found = case(options, side, blocks, rank)
                size = f"{blocks} blocks, rank {rank}"
                lines.append(line(f"{size}: {NAMES[side]}", found))
    print("perplexities are times the original's")
    print("| | M parameters | wiki, before | after | KL | top-1 | own, before | after | minutes |")
    print("| --- |" + " ---: |" * 8)
    print("\n".join(lines))


if __name__ == "__main__":
    main()
