"""Tied and relaxed models before any training: perplexity, parameters, residual left.

    python -m benchmarks.tying [--model DIR] [--text FILE] [--blocks 15,10,6] [--ranks 64,256]
        [--budgets 0.1] [--json FILE]

Every number of blocks is tied with every init, and relaxed with every rank and budget; the original
is in the first row. Perplexity is over the first 1,024 tokens of the text.
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from typing import Any

import torch

import reroll

INITS = ("stepwise", "average", "lower")
LEFT = re.compile(r"relative residual left (\d\.\d+)")


def row(program: Any, original: Any, text: Path, passes: str) -> tuple[dict[str, Any], Any]:
    """What one more pass gives, measured against the original."""
    result = reroll.run_passes(program, passes, text=text)
    step = result.origin.steps[-1]
    quality = step.measured["quality"]["original"]
    left = [float(m[1]) for r in step.remarks if (m := LEFT.search(r))]
    return {
        "passes": ", ".join(s.text for s in result.origin.steps),
        "parameters": result.parameters(),
        "part": result.parameters() / original.parameters(),
        "perplexity": quality["perplexity"]["after"],
        "kl": quality["kl"],
        "top1": quality["top1_agreement"],
        "residual_left": sum(left) / len(left) if left else None,
        "remarks": step.remarks,
    }, result


def main() -> None:
    """Print the table, row by row."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="models/smollm2-135m-instruct")
    parser.add_argument("--text", type=Path, default=Path("data/text/wiki.val.txt"))
    parser.add_argument("--blocks", default="15,10,6")
    parser.add_argument("--ranks", default="64,256")
    parser.add_argument("--budgets", default="0.1")
    parser.add_argument("--layout", default="cycle")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    original = reroll.capture(options.model, dtype=torch.float32)
    relaxes = [f"rank={rank}" for rank in options.ranks.split(",") if rank]
    relaxes += [f"budget={budget}" for budget in options.budgets.split(",") if budget]
    rows = []

    def show(found: dict[str, Any]) -> None:
        rows.append(found)
        left = "" if found["residual_left"] is None else f"{found['residual_left']:.3f}"
        print(
            f"| `{found['passes']}` | {found['parameters'] / 1e6:.1f} | {found['part']:.0%} "
            f"| {found['perplexity']:,.4g} | {found['kl']:.3g} | {found['top1']:.1%} | {left} |",
            flush=True,
        )
        if options.json:
            options.json.write_text(json.dumps(rows, indent=1))

    print("| passes | parameters, M | of the original | perplexity | KL | top-1 | residual left |")
    print("| --- | ---: | ---: | ---: | ---: | ---: | ---: |")
    for blocks in options.blocks.split(","):
        for init in INITS:
            tie = f"tie(blocks={blocks}, init={init}, layout={options.layout})"
            found, tied = row(original, original, options.text, tie)
            show(found)
            for relax in relaxes:
                show(row(tied, original, options.text, f"relax({relax})")[0])
    layers = original.loops[0].trips
    show(row(original, original, options.text, f"tie(blocks={layers})")[0])
    _, tied = row(original, original, options.text, f"tie(blocks={options.blocks.split(',')[0]})")
    show(row(tied, original, options.text, "relax(rank=full)")[0])


if __name__ == "__main__":
    main()
