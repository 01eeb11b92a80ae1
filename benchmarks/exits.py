"""Agreement with the full depth against mean depth, for every criterion of exits.

    python -m benchmarks.exits [--model DIR] [--at 12,18,24] [--tokens 512] [--fit 4096]
        [--criteria margin,...] [--before FILE] [--plot FILE] [--json FILE]

The model is not trained for exits, and its own norm and head read the hidden states ("logit lens").
Thresholds are quantiles of the scores at each exit on other text; every token is run with the
caches of those that left before it. `linear`, `mlp` and `gated` are logistic fits on cached states
of `--fit` tokens of training text. `--before` adds the results of another run to the plot.
Agreement is the part of tokens whose most likely next token is that of the full depth.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

import reroll
from reroll.evaluate.classifiers import ExitStates, exit_states
from reroll.evaluate.exits import predicted, scores_at, with_open
from reroll.passes.exits.scores import CLASSIFIERS
from reroll.rewrite.ir.exits import exit_loop

CRITERIA = ("margin", "entropy", "patience", "saturation", "latent", "linear", "mlp", "gated")
LEVELS = (0.9, 0.7, 0.5, 0.3, 0.1)


def plot(found: dict[str, list[dict[str, Any]]], trips: int, path: Path) -> None:
    """One line for each criterion."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    _, axes = pyplot.subplots(figsize=(6, 4))
    for name, points in found.items():
        ordered = sorted(points, key=lambda p: p["depth"])
        axes.plot(
            [p["depth"] for p in ordered] + [trips],
            [p["agreement"] for p in ordered] + [1.0],
            marker="o",
            linestyle="--" if name.endswith("before") else "-",
            label=name,
        )
    axes.set_xlabel(f"mean depth of {trips} layers")
    axes.set_ylabel("agreement with the full depth")
    axes.grid(alpha=0.3)
    axes.legend()
    pyplot.tight_layout()
    pyplot.savefig(path, dpi=120)


def main() -> None:
    """Print the table, criterion by criterion."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="models/smollm2-135m-instruct")
    parser.add_argument("--text", type=Path, default=Path("data/text/wiki.val.txt"))
    parser.add_argument("--train", type=Path, default=Path("data/text/wiki.train.txt"))
    parser.add_argument("--at", default="12,18,24")
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--fit", type=int, default=4096)
    parser.add_argument("--criteria", default=",".join(CRITERIA))
    parser.add_argument("--steps", type=int, default=150, help="of a fit")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--before", type=Path)
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    original = reroll.capture(options.model, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(options.model)

    def tokens(path: Path, count: int) -> torch.Tensor:
        with path.open(encoding="utf-8") as file:
            text = file.read(16 * count)
        return torch.tensor(tokenizer.encode(text, add_special_tokens=False)[:count])

    rows = tokens(options.text, options.tokens).split(256)
    train = tokens(options.train, options.fit)
    expected = None
    found: dict[str, list[dict[str, Any]]] = {}
    if options.before:
        earlier = json.loads(options.before.read_text())
        found = {f"{name}, before": points for name, points in earlier.items()}
    states: ExitStates | None = None
    print("| criterion | " + " | ".join(f"quantile {q}" for q in LEVELS) + " |")
    print("| --- |" + " ---: |" * len(LEVELS))
    for criterion in options.criteria.split(","):
        text = f"insert_exits(at=[{options.at}], criterion={criterion})"
        program = reroll.run_passes(original, text, measure=False)
        inserted = exit_loop(program)
        assert inserted is not None
        loop, exits = inserted
        at = [int(stop) - 1 for stop in options.at.split(",")]
        if expected is None:
            full = program.to_module()
            expected = [predicted(full, row)[0] for row in rows]
        accuracy = {}
        if criterion in CLASSIFIERS:
            model = program.to_module()
            states = states or exit_states(model, train)
            accuracy = reroll.fit_exits(model, states, steps=options.steps)
            program = model.to_program()
        scores = scores_at(program, exits, at, train[:256].split(256))
        found[criterion] = []
        for level in LEVELS:
            thresholds = {trip: scores[trip].quantile(level).item() for trip in at}
            model = with_open(program, thresholds).to_module()
            answers = [predicted(model, row) for row in rows]
            same = torch.cat([a == e for (a, _), e in zip(answers, expected, strict=True)])
            depth = torch.cat([d for _, d in answers]).float().mean().item()
            found[criterion].append(
                {"level": level, "agreement": same.float().mean().item(), "depth": depth}
            )
        cells = " | ".join(f"{p['agreement']:.1%} at {p['depth']:.1f}" for p in found[criterion])
        fitted = ", ".join(f"{t}: {a:.1%}" for t, a in accuracy.items())
        print(f"| {criterion}{f' (fit {fitted})' if fitted else ''} | {cells} |", flush=True)
        if options.json:
            options.json.write_text(json.dumps(found, indent=1))
    if options.plot:
        plot(found, loop.trips, options.plot)


if __name__ == "__main__":
    main()
