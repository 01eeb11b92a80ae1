"""Agreement with the full depth against mean depth, for every criterion of exits.

The model's own norm and head read the hidden states ("logit lens"). Thresholds are quantiles of the
scores at each exit on other text; every token is run with the caches of those that left before it.
`linear`, `mlp` and `gated` are logistic fits on cached states of `--fit` tokens of training text.
Agreement is the part of tokens whose most likely next token is that of the full depth.

    python -m benchmarks.exits [--model DIR] [--at 12,18,24] [--tokens 512] [--fit 4096]
        [--criteria margin,...] [--json FILE] [--plot FILE] [--before FILE]

`--before` adds what another run kept to the plot.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

import reroll
from benchmarks.harness import MODEL, TEXT, WIKI, Row, Table, parse_options, text_ids
from reroll.evaluate.classifiers import ExitStates, exit_states
from reroll.evaluate.exits import predicted, scores_at, with_open
from reroll.passes.exits.scores import CLASSIFIERS
from reroll.rewrite.ir.exits import exit_loop

CRITERIA = ("margin", "entropy", "patience", "saturation", "latent", *CLASSIFIERS)
LEVELS = {0.9: "quantile 0.9", 0.7: "0.7", 0.5: "0.5", 0.3: "0.3", 0.1: "0.1"}


def plot(rows: list[Row], file: Path) -> None:
    """Draw a line for each criterion."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="tight")
    axes = figure.add_subplot()
    for row in rows:
        depths, agreements = zip(*sorted(row["points"]), strict=True)
        style = "--" if row["criterion"].endswith("before") else "-"
        axes.plot(depths, agreements, marker="o", linestyle=style, label=row["criterion"])
    axes.set(xlabel="mean depth", ylabel="agreement with the full depth")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(file, dpi=120)


def measured(options: Any, criteria: list[str]) -> Iterator[Row]:
    """Agreement and mean depth at each quantile, and those of the full depth, by criterion."""
    original = reroll.capture(options.model, dtype=torch.float32)
    rows = text_ids(options.model, WIKI, options.tokens).split(256)
    train = text_ids(options.model, TEXT / "wiki.train.txt", options.fit)
    trips = [stop - 1 for stop in options.at]
    expected: torch.Tensor | None = None
    states: ExitStates | None = None
    for criterion in criteria:
        passes = f"insert_exits(at={list(options.at)}, criterion={criterion})"
        program = reroll.run_passes(original, passes, measure=False)
        inserted = exit_loop(program)
        assert inserted is not None
        loop, exits = inserted
        found: Row = {"criterion": criterion, "points": [(loop.trips, 1.0)]}
        full = program.to_module()
        if expected is None:
            expected = torch.cat([predicted(full, row)[0] for row in rows])
        if criterion in CLASSIFIERS:
            states = states or exit_states(full, train)
            fitted = reroll.fit_exits(full, states, steps=150)
            found["right when fitted"] = ", ".join(f"{share:.0%}" for share in fitted.values())
            program = full.to_program()
        scores = scores_at(program, exits, trips, [train[:256]])
        for level, title in LEVELS.items():
            thresholds = {trip: scores[trip].quantile(level).item() for trip in trips}
            model = with_open(program, thresholds).to_module()
            tokens, depths = zip(*(predicted(model, row) for row in rows), strict=True)
            same = (torch.cat(tokens) == expected).float().mean().item()
            depth = torch.cat(depths).float().mean().item()
            found["points"].append((depth, same))
            found[title] = f"{same:.1%} at {depth:.1f}"
        yield found


def main() -> None:
    """Add a row for each criterion, and draw all of them."""
    options = parse_options(
        __doc__, model=MODEL, at=(12, 18, 24), tokens=512, fit=4096, criteria=CRITERIA,
        before=Path, plot=Path,
    )  # fmt: skip
    columns = {"criterion": "{}", **dict.fromkeys(LEVELS.values(), "{:}")}
    table = Table(options, columns | {"right when fitted": "{}"})
    cases = table.missing({"criterion": name} for name in options.criteria)
    missing = [case["criterion"] for case in cases]
    for row in measured(options, missing) if missing else ():
        table.add(row)
    if options.plot:
        before = json.loads(options.before.read_text())["rows"] if options.before else []
        earlier = [row | {"criterion": f"{row['criterion']}, before"} for row in before]
        plot([*earlier, *table.rows], options.plot)


if __name__ == "__main__":
    main()
