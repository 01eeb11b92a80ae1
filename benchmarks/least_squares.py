"""What least squares gives a tied and relaxed model before its first step of training.

The shared weights (`--train all`) and residuals are fitted on the original's inputs to each layer,
over text of several domains, and with `--free` the residuals again, trip by trip, on the model's
own. Measured on text of another domain, and on held-out text of one that was fitted.

    python -m benchmarks.least_squares [--train new] [--free] [--tokens 8192] [--json FILE]
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

import reroll
from benchmarks.harness import MODEL, TEXT, Row, Table, parse_options, text_ids
from reroll.recover import Batch, Models
from reroll.recover.closed_form import fit_linear_layers
from reroll.recover.data import Rows
from reroll.recover.held_out import held_out
from reroll.recover.sequential_fit import fit_trip_by_trip
from reroll.recover.stages.align import Align
from reroll.recover.trainable import new_names, training

PASSES = "tie(blocks=15, init=average), relax(rank=128)"
LENGTH = 512
MEASURED = 4 * LENGTH
TEXTS = ("wiki", "pydocs")
FITTED = ("pydocs", "shakespeare", "sqlitedocs", "gcide")
# characters at the start of a source, which are titles
TITLES = 1000
COLUMNS = {
    f"{text}: {title}": form
    for text in TEXTS
    for title, form in {"perplexity": "{:,.4g}", "kl": "{:.3g}", "top1_agreement": "{:.1%}"}.items()
}
ERRORS = {"error_before": "{:.4f}", "error_after": "{:.4f}", "seconds": "{:.0f}"}


def rows(model: str, file: str, tokens: int = MEASURED, skip: int = 0) -> Rows:
    """The first tokens of a text in rows, behind so many characters."""
    data = text_ids(model, TEXT / file, tokens, skip=skip, special=True).view(-1, LENGTH)
    return Rows(data, torch.ones_like(data))


def main() -> None:
    """Convert, fit, and measure at each step."""
    options = parse_options(__doc__, model=MODEL, train="new", free=False, tokens=8192)
    fits: dict[str, Callable[[Models, list[Batch]], Row]] = {
        "by SVD": lambda models, batches: {},
        "fitted on the original's inputs": fit_linear_layers,
    }
    if options.free:
        fits["then on the model's own"] = fit_trip_by_trip
    table = Table(options, {"": "{}"} | COLUMNS | ERRORS)
    if not list(table.missing({"": name} for name in fits)):
        return
    original = reroll.capture(options.model, dtype=torch.float32)
    tied = reroll.run_passes(original, PASSES, measure=False)
    student, teacher = tied.to_module().eval(), original.to_module().eval().requires_grad_(False)
    each = options.tokens // len(FITTED) // LENGTH * LENGTH
    batches = [
        Batch(row.data, row.mask)
        for name in FITTED
        for row in rows(options.model, f"{name}.train.txt", each, TITLES).split(1)
    ]
    stage = Align.make({"train": options.train})
    with training(student, stage, new_names(student, teacher)):
        for name, fit in fits.items():
            start = time.perf_counter()
            found = fit(Models(student, student, teacher), batches)
            found["seconds"] = time.perf_counter() - start
            for case in table.missing([{"": name}]):
                for text in TEXTS:
                    measured = held_out(student, teacher, rows(options.model, f"{text}.val.txt"))
                    found |= {f"{text}: {title}": value for title, value in measured.items()}
                table.add(case | found)


if __name__ == "__main__":
    main()
