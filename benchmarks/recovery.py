"""What recipes bring back: each converts the same model, and trains on the same tokens.

A recipe is a YAML file with `passes` and `recover`. For each, the model is measured after its
passes and, if it has a recovery, after that, beside the original, on text of another domain than it
was trained on. Models and results are kept in `--work`, and a run that was stopped goes on where it
was, so that long comparisons can be made in pieces.

    python -m benchmarks.recovery A B --tokens 2M --work out/recovery [--batch ROWS]
        [--beside MEASURES] [--alone MEASURES] [--data FILE,...] [--json FILE]

`tptt` among the recipes is TPTT (arXiv 2506.17671), from its package: `pip install tptt` into an
environment beside reroll's. Its LiZA puts a delta rule on each attention's own projections and
mixes both outputs; adapters on q, k, v and o then learn the text, in rows of `--length` tokens,
while the share of the delta rule rises. The softmax attention stays whole, and so does its state.
"""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

import reroll
from benchmarks.harness import (
    MODEL,
    TEXT,
    WIKI,
    Row,
    Table,
    kept,
    original,
    parse_options,
    progress,
    write_json,
)  # fmt: skip
from benchmarks.timed import plain_loop, with_adapters
from reroll.cli.recovering import token_count
from reroll.evaluate.suite import choose, evaluate
from reroll.evaluate.tokenizing import plain_ids, special_ids
from reroll.recover import Recipe, load_recipe, recover
from reroll.recover.data import make_corpus, take
from reroll.rewrite.pipeline.pipeline import read_yaml, recipe_path

DATA = tuple(str(TEXT / f"{n}.train.txt") for n in ("pydocs", "shakespeare", "gcide", "foldoc"))
# beside the original, and what needs no original
BESIDE = "agreement(contexts=[2048], tokens=8192), generation(prompts=4, new=32)"
ALONE = (
    "perplexity(contexts=[1024, 2048], tokens=8192), copying(lengths=[256, 1024]), "
    "recall(lengths=[512, 1024], depths=[0, 0.5], samples=4)"
)


def measured(model: Any, options: Any) -> Row:
    """The headline of each measure."""
    lines: Row = {}
    # a model that is no directory has no tokenizer but the original's
    alone = None if isinstance(model, str) else options.model
    for text, beside in ((options.beside, options.model), (options.alone, alone)):
        found = evaluate(model, beside, choose(text, "quick"), text=WIKI)
        for each in found["measures"].values():
            lines |= each.get("headline", {}).get("model", {})
    return lines


def converted(path: Path, options: Any) -> str:
    """The model after a recipe's passes: made if it is not there."""
    start: Path = options.work / f"{path.stem}-start"
    if not start.is_dir():
        program = reroll.capture(options.model, dtype=torch.float32)
        first = Path(options.data[0])
        reroll.run_passes(program, path, text=first, measure=False).save(str(start))
    return str(start)


def trained(path: Path, options: Any) -> Path:
    """The model after a recipe's recovery, and its report beside it: made if it is not there."""
    end: Path = options.work / f"{path.stem}-{options.tokens}"
    if not end.is_dir():
        recipe = load_recipe(path)
        if options.batch:
            recipe = Recipe(replace(recipe.settings, batch=options.batch), recipe.stages)
        report = recover(
            converted(path, options), end, data=options.data, recipe=recipe, tokens=options.tokens,
            teacher=options.model, on_step=progress(path.stem),
        )  # fmt: skip
        write_json(end.with_suffix(".run.json"), vars(report))
    return end


def results(path: Path, options: Any) -> dict[str, Row]:
    """What one recipe gives: after its passes, and after its recovery."""
    start = converted(path, options)
    found = {"passes only": kept(Path(f"{start}.json"), lambda: measured(start, options))}
    if "recover" in dict(read_yaml(path)):  # type: ignore[call-overload]
        end = trained(path, options)
        run = json.loads(end.with_suffix(".run.json").read_text(encoding="utf-8"))
        cost = {"tokens": run["tokens"], "seconds": round(run["seconds"]), "losses": losses(end)}
        file = end.with_suffix(".json")
        found["recovered"] = kept(file, lambda: measured(str(end), options)) | cost
    return found


def losses(end: Path, parts: int = 8) -> str:
    """The mean loss of a run in each of its parts, of as many steps each."""
    log = (end / "recovery.jsonl").read_text(encoding="utf-8").splitlines()
    found = torch.tensor([line["loss"] for line in map(json.loads, log) if "loss" in line])
    return ", ".join(f"{part.mean():.3g}" for part in found.chunk(parts))


def tptt(options: Any) -> Row:
    """TPTT trained as published (rank 8, the delta rule's share from 0.01 to 0.5), and measured."""
    from tptt import LiZACallback, get_tptt_model
    from transformers import AutoTokenizer

    torch.manual_seed(0)
    base, tokenizer = original(options.model), AutoTokenizer.from_pretrained(options.model)
    mixed, _ = get_tptt_model(base, base.config, operator_mode="delta_rule", mag_weight=0.01)
    model = with_adapters(mixed)
    batch = options.batch or 2
    steps = max(round(options.tokens / (options.length * batch)), 1)
    tokens = steps * options.length * batch
    callback = LiZACallback(model, "gradual", 0.01, 0.5, transition_step=max(steps // 4, 1))
    corpus = make_corpus(
        options.data, lambda text: plain_ids(tokenizer, text), length=options.length,
        tokens=tokens, held_rows=8, pack="join",
        before=special_ids(tokenizer)[0], end=tokenizer.eos_token_id, seed=0,
    )  # fmt: skip
    batches = (take(corpus.train, step * batch, batch).data for step in range(steps))
    start = time.perf_counter()
    for step, _ in enumerate(plain_loop(model, batches, lr=5e-4), 1):
        callback.on_step_end(None, SimpleNamespace(global_step=step), None)
    seconds = round(time.perf_counter() - start)
    cost = {"tokens": tokens, "seconds": seconds}
    return measured(model.merge_and_unload().eval(), options) | cost


def main() -> None:
    """Run what has not been run yet, and print the table."""
    options = parse_options(
        __doc__, "recipes", model=MODEL, data=DATA, tokens="500k", work=Path("out/recovery"),
        beside=BESIDE, alone=ALONE, batch=0, length=1024, threads=2,
    )  # fmt: skip
    options.tokens = token_count(options.tokens)
    file = options.work / "original.json"
    found = {"original": kept(file, lambda: measured(options.model, options))}
    for name in options.recipes:
        if name == "tptt":
            file = options.work / f"tptt-{options.tokens}.json"
            found["tptt, recovered"] = kept(file, lambda: tptt(options))
        else:
            path = recipe_path(name)
            found |= {f"{path.stem}, {k}": row for k, row in results(path, options).items()}
    titles = dict.fromkeys(title for row in found.values() for title in row)
    forms = {"tokens": "{:,}", "seconds": "{:,}", "losses": "{}"}
    table = Table(options, {"": "{}"} | {title: forms.get(title, "{:.4g}") for title in titles})
    for case in table.missing({"": name} for name in found):
        table.add(case | found[case[""]])


if __name__ == "__main__":
    main()
