"""What least squares gives a tied and relaxed model before its first step of training.

The shared weights and residuals are fitted on the original's inputs to each layer, over text of
several domains; the model is measured before and after on text of another domain, and on held-out
text of one that was fitted.

    python -m benchmarks.least_squares [--train new|all] [--free] [--tokens 8192] [--passes TEXT]
        [--threads N] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

import reroll
from reroll.recover import Batch, Models
from reroll.recover.closed_form import fit_linear_layers
from reroll.recover.data import Rows
from reroll.recover.held_out import held_out
from reroll.recover.sequential_fit import fit_trip_by_trip
from reroll.recover.trainable import new_names

LENGTH = 512
MEASURED = 4 * LENGTH
FITTED = ("pydocs", "shakespeare", "sqlitedocs", "gcide")
# a source begins with titles, which are left out of what is fitted
SKIPPED = 1000
# characters that have the tokens wanted in any of the texts
CHARACTERS = 8


def rows(tokenizer: Any, file: str, tokens: int, skipped: int = 0) -> Rows:
    """The first tokens of a text, behind so many characters, in rows."""
    text = Path("data/text", file).read_text(encoding="utf-8")
    ids = tokenizer(text[skipped : skipped + tokens * CHARACTERS])["input_ids"][:tokens]
    data = torch.tensor(ids).view(-1, LENGTH)
    return Rows(data, torch.ones_like(data))


def main() -> None:
    """Convert, measure, fit, measure again."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="models/smollm2-135m-instruct")
    parser.add_argument("--passes", default="tie(blocks=15, init=average), relax(rank=128)")
    parser.add_argument("--train", choices=("new", "all"), default="new")
    parser.add_argument("--free", action="store_true", help="then trip by trip: start_free")
    parser.add_argument("--tokens", type=int, default=8192, help="to fit on, of all texts")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    original = reroll.capture(options.model, dtype=torch.float32)
    tied = reroll.run_passes(original, options.passes, measure=False)
    student = tied.to_module().eval()
    teacher = original.to_module().eval().requires_grad_(False)
    new = new_names(student, teacher)
    for name, parameter in student.named_parameters(remove_duplicate=False):
        parameter.requires_grad_(options.train == "all" or name in new)
    texts = {name: rows(tokenizer, f"{name}.val.txt", MEASURED) for name in ("wiki", "pydocs")}
    each = options.tokens // len(FITTED) // LENGTH * LENGTH
    batches = [
        Batch(row.data, row.mask)
        for name in FITTED
        for row in rows(tokenizer, f"{name}.train.txt", each, SKIPPED).split(1)
    ]
    before = {name: held_out(student, teacher, text) for name, text in texts.items()}
    start = time.perf_counter()
    both = Models(student, student, teacher)
    errors = fit_linear_layers(both, batches)
    if options.free:
        errors |= fit_trip_by_trip(both, batches)
    seconds = time.perf_counter() - start
    after = {name: held_out(student, teacher, text) for name, text in texts.items()}
    print("| text | | perplexity | original's | KL | top-1 |")
    print("| --- | --- | ---: | ---: | ---: | ---: |")
    for name in texts:
        for what, found in (("before", before[name]), ("after", after[name])):
            cells = (found[k] for k in ("perplexity", "original_perplexity", "kl"))
            numbers = " | ".join(f"{value:,.4g}" for value in cells)
            print(f"| {name} | {what} | {numbers} | {found['top1_agreement']:.1%} |")
    print("squared errors: " + ", ".join(f"{k} {v:.4f}" for k, v in errors.items()))
    print(f"{seconds:.0f} seconds")
    if options.json:
        whole = {"before": before, "after": after, "errors": errors, "seconds": seconds}
        options.json.write_text(json.dumps(whole), encoding="utf-8")


if __name__ == "__main__":
    main()
