"""What recipes bring back: each converts the same model, and trains on the same tokens.

A recipe is a YAML file with `passes` and `recover`. For each, the model is measured after its
passes and, if it has a recovery, after that, beside the original, on text of another domain than it
was trained on. Models and results are kept in `--work`, and a run that was stopped goes on where it
was, so that long comparisons can be made in pieces.

    python -m benchmarks.recovery A B --tokens 2M --work out/recovery
        [--batch ROWS] [--train-only] [--recovered-only] [--model DIR] [--threads N]
        [--data FILE ...] [--text FILE] [--beside MEASURES] [--alone MEASURES]
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

import reroll
from reroll.cli.recovering import token_count
from reroll.evaluate.suite import choose, evaluate
from reroll.recover import Recipe, load_recipe, recover
from reroll.rewrite.pipeline.pipeline import read_yaml, recipe_path

DATA = [f"data/text/{name}.train.txt" for name in ("pydocs", "shakespeare", "gcide", "foldoc")]
# beside the original, and what needs no original
BESIDE = "agreement(contexts=[2048], tokens=8192), generation(prompts=4, new=32)"
ALONE = (
    "perplexity(contexts=[1024, 2048], tokens=8192), copying(lengths=[256, 1024]), "
    "recall(lengths=[512, 1024], depths=[0, 0.5], samples=4)"
)


def measured(model: Any, options: argparse.Namespace, file: Path) -> dict[str, Any]:
    """The headline of each measure; from the file if it is there."""
    if not file.is_file():
        lines: dict[str, Any] = {}
        # a model that is no directory has no tokenizer but the original's
        alone = None if isinstance(model, str) else options.model
        for text, original in ((options.beside, options.model), (options.alone, alone)):
            found = evaluate(model, original, choose(text, "quick"), text=Path(options.text))
            for each in found["measures"].values():
                lines |= each.get("headline", {}).get("model", {})
        file.write_text(json.dumps(lines, indent=1), encoding="utf-8")
    return dict(json.loads(file.read_text(encoding="utf-8")))


def started(path: Path, options: argparse.Namespace) -> Path:
    """The model after a recipe's passes: made if it is not there."""
    start: Path = options.work / f"{path.stem}-start"
    if not start.is_dir():
        program = reroll.capture(options.model, dtype=torch.float32)
        converted = reroll.run_passes(
            program, path, text=Path(options.data[0]), measure=False, seed=options.seed
        )
        converted.save(str(start))
    return start


def recovers(path: Path) -> bool:
    """Whether a recipe has more than passes."""
    return "recover" in dict(read_yaml(path))  # type: ignore[call-overload]


def trained(path: Path, options: argparse.Namespace) -> Path:
    """The model after a recipe's recovery: made if it is not there."""
    end: Path = options.work / f"{path.stem}-{options.tokens}"
    if end.is_dir():
        return end
    start = started(path, options)

    def show(step: Any) -> None:
        if step["steps"] % 10 == 0:
            left = step["seconds_left"] / 60
            rate = step["tokens_per_second"]
            print(
                f"  {path.stem}: {step['tokens']:,} tokens, {step['stage']} loss "
                f"{step['smooth']:.4g}, {rate:.0f} tokens/s, {left:.0f} minutes left",
                flush=True,
            )

    recipe = load_recipe(path)
    if options.batch:
        recipe = Recipe(replace(recipe.settings, batch=options.batch), recipe.stages)
    report = recover(
        str(start),
        end,
        data=options.data,
        recipe=recipe,
        tokens=options.tokens,
        teacher=options.model,
        on_step=show,
    )
    end.with_suffix(".run.json").write_text(json.dumps(vars(report), indent=1), encoding="utf-8")
    return end


def row(path: Path, options: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """What one recipe gives: after its passes, and after its recovery."""
    found: dict[str, dict[str, Any]] = {}
    if not (options.recovered_only and recovers(path)):
        start = started(path, options)
        found["passes only"] = measured(str(start), options, start.with_suffix(".json"))
    if not recovers(path):
        return found
    end = trained(path, options)
    run = json.loads(end.with_suffix(".run.json").read_text(encoding="utf-8"))
    cost = {"tokens": run["tokens"], "seconds": round(run["seconds"])}
    found["recovered"] = measured(str(end), options, end.with_suffix(".json")) | cost
    return found


def curve(end: Path, parts: int = 8) -> list[float]:
    """The mean loss of a run in each of its parts, of as many steps each."""
    log = (end / "recovery.jsonl").read_text(encoding="utf-8").splitlines()
    losses = [line["loss"] for line in map(json.loads, log) if "loss" in line]
    return [part.mean().item() for part in torch.tensor(losses).chunk(parts)]


def add_options(parser: argparse.ArgumentParser) -> None:
    """What all sides of the comparison have in common."""
    parser.add_argument("--model", default="models/smollm2-135m-instruct")
    parser.add_argument("--data", nargs="+", default=DATA)
    parser.add_argument("--text", default="data/text/wiki.val.txt")
    parser.add_argument("--tokens", default="500k", type=token_count)
    parser.add_argument("--work", type=Path, default=Path("out/recovery"))
    parser.add_argument("--beside", default=BESIDE, help="measures with the original beside")
    parser.add_argument("--alone", default=ALONE, help="measures without it")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch", type=int, help="rows of a step, instead of the recipe's")
    parser.add_argument("--recovered-only", action="store_true", help="not what passes alone give")
    parser.add_argument("--train-only", action="store_true", help="measure another time")


def main() -> None:
    """Run what has not been run yet, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("recipes", nargs="+", type=recipe_path)
    add_options(parser)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    options.work.mkdir(parents=True, exist_ok=True)
    if options.train_only:
        for path in filter(recovers, options.recipes):
            trained(path, options)
        return
    curves: dict[str, list[float]] = {}
    rows: dict[str, dict[str, Any]] = {
        "original": measured(options.model, options, options.work / "original.json")
    }
    for path in options.recipes:
        for what, found in row(path, options).items():
            rows[f"{path.stem}, {what}"] = found
        if recovers(path):
            curves[path.stem] = curve(trained(path, options))
    peer = options.work / f"tptt-{options.tokens}.json"
    if peer.is_file():
        rows["TPTT, recovered"] = json.loads(peer.read_text(encoding="utf-8"))
    labels = list(dict.fromkeys(label for found in rows.values() for label in found))
    print("| | " + " | ".join(labels) + " |")
    print("| --- |" + " ---: |" * len(labels))
    for name, found in rows.items():
        cells = [found.get(label, "") for label in labels]
        print(f"| {name} | " + " | ".join(_cell(value) for value in cells) + " |")
    for name, losses in curves.items():
        print(f"{name}, loss by eighths of the run: " + ", ".join(map(_cell, losses)))


def _cell(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else f"{value:,}" if value else ""


if __name__ == "__main__":
    main()
