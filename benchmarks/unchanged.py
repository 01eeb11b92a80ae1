"""Whether two versions of reroll convert real models alike, bit for bit: see the file of cases."""

from __future__ import annotations

import hashlib
import json
import os
import sys
import tempfile
import time
from argparse import Namespace
from itertools import product
from pathlib import Path

import torch

import reroll
from benchmarks.__main__ import main
from benchmarks.harness import Row, Table
from benchmarks.killed import cli, contents
from reroll.rewrite.analysis.samples import random_inputs

ROOT = Path(__file__).parents[1]
TOKENS = 64


def recorded(model: str, recipe: str) -> Row:
    """The digests of what a recipe makes of a model, or the message of its refusal."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out"
        refused = cli(["convert", str(ROOT / "models" / model), str(out), "--recipe", recipe])
        if refused:
            return {"refused": refused}
        # without times and measurements
        program = json.loads((out / "program.json").read_text(encoding="utf-8"))
        parts = [program[key] for key in ("graphs", "weights", "reference", "dtype", "halves")]
        files = contents(out, {".md"}) | {"program.json": _digest(json.dumps(parts).encode())}
        return {"files": files, "outputs": outputs(out)}


def outputs(out: Path) -> Row:
    """What the converted model computes: greedy tokens and their logits, or hidden states."""
    # not before the environment says that nothing is to be fetched
    from transformers import AutoModelForCausalLM

    program = reroll.load(out)
    inputs = random_inputs(program, rows=1)
    with torch.no_grad():
        if "CausalLM" not in program.origin.auto_class:
            found = program.to_module()(**inputs)
            return {name: _digest(v) for name, v in found.items() if isinstance(v, torch.Tensor)}
        made = AutoModelForCausalLM.from_pretrained(out).generate(
            **inputs, max_new_tokens=TOKENS, do_sample=False, output_logits=True,
            return_dict_in_generate=True,
        )  # fmt: skip
    tokens = made.sequences[0, -len(made.logits) :].tolist()
    return {"tokens": tokens, "logits": _digest(torch.stack(made.logits))}


def _digest(value: bytes | torch.Tensor) -> str:
    if isinstance(value, torch.Tensor):
        value = value.float().contiguous().numpy().tobytes()
    return hashlib.sha256(value).hexdigest()


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


def compare(*files: str) -> int:
    """Print what differs between two files; how many conversions do."""
    before, after = (
        {(r["model"], r["recipe"]): r for r in json.loads(Path(file).read_text())["rows"]}
        for file in files
    )
    pairs = sorted(before | after)
    told = {each: differences(before.get(each, {}), after.get(each, {})) for each in pairs}
    differing = [f"{' '.join(pair)}: {text}" for pair, text in told.items() if text]
    print("\n".join([*differing, f"{len(pairs)} conversions, {len(differing)} differ"]))
    return len(differing)


def measure(table: Table, options: Namespace) -> None:
    """Record, or compare two records."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    match options.name[1:]:
        case ["compare", before, after]:
            sys.exit(bool(compare(before, after)))
        case ["record"]:
            pass
        case _:
            raise SystemExit(options.about)
    models = sorted(file.parent.name for file in ROOT.glob("models/*/config.json"))
    recipes = sorted(file.stem for file in ROOT.glob("reroll/recipes/*.yaml"))
    chosen = [
        given.split(",") if given else known
        for given, known in ((options.models, models), (options.recipes, recipes))
    ]
    end = time.monotonic() + 60 * options.minutes
    for case in table.missing({"model": m, "recipe": r} for m, r in product(*chosen)):
        if time.monotonic() < end:
            table.add(case | recorded(**case))


if __name__ == "__main__":
    main(["unchanged", *sys.argv[1:]])
