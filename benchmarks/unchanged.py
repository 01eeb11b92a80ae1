"""Whether two versions of reroll convert real models alike, bit for bit.

    python -m benchmarks.unchanged record --json FILE [--models NAMES] [--recipes NAMES]
    python -m benchmarks.unchanged compare BEFORE AFTER

`record` converts every model of `models/` by every recipe, as the command line does, and writes
down the digests of all files of the result (graphs, weights, configurations), and those of the
logits of 64 greedy tokens; of hidden states, for a model that generates nothing. A refusal is
written down with its message. It stops after `--minutes`, and then goes on where it was.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import tempfile
import time
from itertools import product
from pathlib import Path
from typing import Any

from benchmarks.harness import Row, Table, parse_options
from benchmarks.killed import cli, contents

ROOT = Path(__file__).parents[1]
MODELS = tuple(sorted(file.parent.name for file in ROOT.glob("models/*/config.json")))
RECIPES = tuple(sorted(file.stem for file in ROOT.glob("reroll/recipes/*.yaml")))
TOKENS = 64


def recorded(model: str, recipe: str) -> Row:
    """The digests of what a recipe makes of a model, or the message of its refusal."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out"
        refused = cli(["convert", str(ROOT / "models" / model), str(out), "--recipe", recipe])
        if refused:
            return {"refused": refused}
        files = contents(out, {".md"}) | {"program.json": _graphs(out / "program.json")}
        return {"files": files, "outputs": outputs(out)}


def outputs(out: Path) -> Row:
    """What the converted model computes: greedy tokens and their logits, or hidden states."""
    import torch
    from transformers import AutoModelForCausalLM

    import reroll

    torch.manual_seed(0)
    config = json.loads((out / "config.json").read_text())
    if "CausalLM" not in config["architectures"][0]:
        program = reroll.load(out)
        with torch.no_grad():
            values = program.to_module()(
                **{i.name: _random(i) for i in program.inputs if i.role == "data"}
            )
        return {name: _sum(v) for name, v in values.items() if isinstance(v, torch.Tensor)}
    model = AutoModelForCausalLM.from_pretrained(out).eval()
    prompt = torch.randint(5, 1000, (1, 16))
    with torch.no_grad():
        generated = model.generate(
            input_ids=prompt, max_new_tokens=TOKENS, do_sample=False, output_logits=True,
            return_dict_in_generate=True,
        )  # fmt: skip
    tokens = generated.sequences[0, 16:].tolist()
    return {"tokens": tokens, "logits": _sum(torch.stack(generated.logits))}


def _graphs(file: Path) -> str:
    """Digest the graphs and the table of weights of a program, without times and measurements."""
    program = json.loads(file.read_text(encoding="utf-8"))
    parts = [program[key] for key in ("graphs", "weights", "reference", "dtype", "halves")]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _random(item: Any) -> Any:
    """Make a value of an input: one row, and 16 where its size is free."""
    import torch

    _, *rest = item.type.shape
    sizes = [1, *(n if isinstance(n, int) else 16 for n in rest)]
    if item.type.dtype.is_floating_point:
        return torch.rand(sizes).to(item.type.dtype)
    return torch.randint(5, 1000, sizes)


def _sum(tensor: Any) -> str:
    return hashlib.sha256(tensor.float().contiguous().numpy().tobytes()).hexdigest()


def differences(before: Row, after: Row) -> str:
    """What differs between two records of a conversion; nothing if they are alike."""
    if before == after:
        return ""
    if not before.get("files") or not after.get("files"):
        states = (r.get("refused", "converted" if r else "not run") for r in (before, after))
        return " | ".join(states)
    return ", ".join(
        f"{part}: {name}"
        for part in ("files", "outputs")
        for name in sorted(before[part] | after[part])
        if before[part].get(name) != after[part].get(name)
    )


def compare(files: list[str]) -> int:
    """Print what differs between two files; how many conversions do."""
    before, after = (
        {(r["model"], r["recipe"]): r for r in json.loads(Path(file).read_text())["rows"]}
        for file in files
    )
    pairs = sorted(before | after)
    told = {pair: differences(before.get(pair, {}), after.get(pair, {})) for pair in pairs}
    differing = {pair: text for pair, text in told.items() if text}
    for (model, recipe), text in differing.items():
        print(f"{model} {recipe}: {text}")
    print(f"{len(pairs)} conversions, {len(differing)} differ")
    return len(differing)


def main() -> None:
    """Record, or compare two records."""
    options = parse_options(__doc__, "words", models=MODELS, recipes=RECIPES, minutes=40.0)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    if options.words[0] == "compare":
        sys.exit(bool(compare(options.words[1:])))
    table = Table(options, {"model": "{}", "recipe": "{}", "refused": "{}"})
    end = time.monotonic() + 60 * options.minutes
    pairs = product(options.models, options.recipes)
    for case in table.missing({"model": model, "recipe": recipe} for model, recipe in pairs):
        if time.monotonic() < end:
            table.add(case | recorded(**case))


if __name__ == "__main__":
    main()
