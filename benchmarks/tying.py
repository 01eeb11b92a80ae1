"""Tied and relaxed models before any training: perplexity, parameters, residual left.

    python -m benchmarks.tying [--model DIR] [--text FILE] [--blocks 15,10,6] [--ranks 64,256]
        [--inits stepwise,average,lower] [--budgets 0.1] [--full] [--json FILE]

Every number of blocks is tied with every init, and relaxed with every rank and budget. Perplexity,
KL divergence from the original and agreement with it are over the first 1,024 tokens of the text.
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from typing import Any

import torch

import reroll
from reroll.rewrite.analysis.context import Context
from reroll.rewrite.analysis.program_distance import Measurer
from reroll.rewrite.pipeline.pipeline import resolve

INITS = ("stepwise", "average", "lower")
LEFT = re.compile(r"relative residual left (\d\.\d+)")


class Table:
    """The rows so far; every program is measured against the original."""

    def __init__(self, original: Any, text: Path, file: Path | None) -> None:
        self.original, self.file = original, file
        self.context = Context(text_source=text)
        self.measurer = Measurer(original, self.context)
        self.rows: list[dict[str, Any]] = []

    def add(self, program: Any, passes: str, before: str = "") -> Any:
        """Run one pass, print what comes of it, and return that."""
        (each,) = resolve(passes)
        self.context.remarks = []
        result = each.run(program.edit(), self.context)
        quality = self.measurer.compare(self.original, result)
        remarks = list(self.context.remarks)
        left = [float(m[1]) for r in remarks if (m := LEFT.search(r))]
        found = {
            "passes": f"{before}, {passes}" if before else passes,
            "parameters": result.parameters(),
            "part": result.parameters() / self.original.parameters(),
            "perplexity": quality["perplexity"]["after"],
            "original": quality["perplexity"]["before"],
            "kl": quality["kl"],
            "top1": quality["top1_agreement"],
            "residual_left": sum(left) / len(left) if left else None,
            "remarks": remarks,
        }
        self.measurer.keep([self.original, program])
        self.rows.append(found)
        shown = "" if found["residual_left"] is None else f"{found['residual_left']:.3f}"
        print(
            f"| `{found['passes']}` | {found['parameters'] / 1e6:.1f} | {found['part']:.0%} "
            f"| {found['perplexity']:,.4g} | {found['kl']:.3g} | {found['top1']:.1%} | {shown} |",
            flush=True,
        )
        if self.file:
            self.file.write_text(json.dumps(self.rows, indent=1))
        return result


def main() -> None:
    """Print the table, row by row."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="models/smollm2-135m-instruct")
    parser.add_argument("--text", type=Path, default=Path("data/text/wiki.val.txt"))
    parser.add_argument("--blocks", default="15,10,6")
    parser.add_argument("--inits", default=",".join(INITS))
    parser.add_argument("--ranks", default="64,256")
    parser.add_argument("--budgets", default="0.1")
    parser.add_argument("--layout", default="cycle")
    parser.add_argument("--full", action="store_true", help="also relax at full rank")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.set_grad_enabled(False)
    original = reroll.capture(options.model, dtype=torch.float32)
    relaxes = [f"rank={rank}" for rank in options.ranks.split(",") if rank]
    relaxes += [f"budget={budget}" for budget in options.budgets.split(",") if budget]
    relaxes += ["rank=full"] if options.full else []
    print("| passes | parameters, M | of the original | perplexity | KL | top-1 | residual left |")
    print("| --- | ---: | ---: | ---: | ---: | ---: | ---: |")
    table = Table(original, options.text, options.json)
    for blocks in options.blocks.split(","):
        for init in options.inits.split(","):
            tie = f"tie(blocks={blocks}, init={init}, layout={options.layout})"
            tied = table.add(original, tie)
            for relax in relaxes:
                table.add(tied, f"relax({relax})", tie)


if __name__ == "__main__":
    main()
