"""Whether two versions of reroll convert real models alike, bit for bit.

    python -m benchmarks.unchanged record FILE [--models NAMES] [--recipes NAMES] [--minutes 40]
    python -m benchmarks.unchanged compare BEFORE AFTER

`record` converts every model of `models/` by every recipe, as the command line does, and writes
down the digests of all files of the result (graphs, weights, configurations), and those of the
logits of 64 greedy tokens; of hidden states, for a model that generates nothing. A refusal is
written down with its message. Pairs that a file has are not run again.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import os
import re
import sys
import tempfile
import time
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RECIPES = ROOT / "reroll" / "recipes"
TOKENS = 64
# lines of a model card that tell the time or the version
_CHANGING = re.compile(r"[\d.e-]+ s\b")


def convert(model: Path, recipe: Path, out: Path) -> str | None:
    """Run `reroll convert`; the message of a refusal."""
    from reroll.cli import app

    said = io.StringIO()
    arguments = ["convert", str(model), str(out), "--recipe", str(recipe)]
    with redirect_stdout(io.StringIO()), redirect_stderr(said):
        status = app(arguments, prog_name="reroll", standalone_mode=False)
    return said.getvalue().strip().splitlines()[-1] if status else None


def digests(out: Path) -> dict[str, str]:
    """The SHA-256 of each file, without the times in it."""
    found = {}
    for file in sorted(out.rglob("*")):
        if file.is_file():
            data = file.read_bytes()
            if file.suffix == ".md":
                data = _CHANGING.sub("", data.decode()).encode()
            found[file.relative_to(out).as_posix()] = hashlib.sha256(data).hexdigest()
    return found


def outputs(out: Path) -> dict[str, Any]:
    """What the converted model computes: greedy tokens and their logits, or hidden states."""
    import torch
    from transformers import AutoModel, AutoModelForCausalLM

    import reroll  # noqa: F401

    torch.manual_seed(0)
    config = json.loads((out / "config.json").read_text())
    causal = "CausalLM" in config["architectures"][0]
    model = (AutoModelForCausalLM if causal else AutoModel).from_pretrained(out).eval()
    inputs = dict(model.dummy_inputs) if not causal else {}
    if causal:
        inputs["input_ids"] = torch.randint(5, 1000, (1, 16))
        with torch.no_grad():
            generated = model.generate(
                **inputs, max_new_tokens=TOKENS, do_sample=False, output_logits=True,
                return_dict_in_generate=True,
            )  # fmt: skip
        tokens = generated.sequences[0, 16:].tolist()
        return {"tokens": tokens, "logits": _sum(torch.stack(generated.logits))}
    with torch.no_grad():
        values = model(**inputs)
    return {name: _sum(v) for name, v in values.items() if isinstance(v, torch.Tensor)}


def _sum(tensor: Any) -> str:
    return hashlib.sha256(tensor.float().contiguous().numpy().tobytes()).hexdigest()


def record(options: argparse.Namespace) -> None:
    """Convert what a file does not have yet."""
    import torch

    torch.set_num_threads(options.threads)
    records: dict[str, Any] = {}
    if options.file.exists():
        records = json.loads(options.file.read_text())
    models = options.models or sorted(
        d.name for d in (ROOT / "models").iterdir() if (d / "config.json").exists()
    )
    recipes = options.recipes or sorted(f.stem for f in RECIPES.glob("*.yaml"))
    end = time.monotonic() + 60 * options.minutes
    for name in models:
        for recipe in recipes:
            pair = f"{name} {recipe}"
            if pair in records or time.monotonic() > end:
                continue
            with tempfile.TemporaryDirectory() as folder:
                out = Path(folder) / "out"
                refusal = convert(ROOT / "models" / name, RECIPES / f"{recipe}.yaml", out)
                if refusal is None:
                    records[pair] = {"files": digests(out), "outputs": outputs(out)}
                else:
                    records[pair] = {"refused": refusal}
            print(pair, refusal or "", flush=True)
            options.file.write_text(json.dumps(records, indent=1) + "\n")


def compare(options: argparse.Namespace) -> None:
    """Print what differs between two files; exit with 1 if anything does."""
    before, after = (json.loads(f.read_text()) for f in (options.before, options.after))
    differ = 0
    for pair in sorted(before | after):
        a, b = before.get(pair), after.get(pair)
        if a == b:
            continue
        differ += 1
        if not a or not b or "refused" in a or "refused" in b:
            print(f"{pair}: {a and a.get('refused', 'converted')} | {b and b.get('refused')}")
            continue
        for part in ("files", "outputs"):
            names = [n for n in sorted(a[part] | b[part]) if a[part].get(n) != b[part].get(n)]
            if names:
                print(f"{pair}: {part} differ: {', '.join(names)}")
    print(f"{len(before | after)} conversions, {differ} differ")
    sys.exit(bool(differ))


def main() -> None:
    """Record, or compare two records."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    commands = parser.add_subparsers(required=True)
    recording = commands.add_parser("record")
    recording.add_argument("file", type=Path)
    recording.add_argument("--models", type=lambda s: s.split(","))
    recording.add_argument("--recipes", type=lambda s: s.split(","))
    recording.add_argument("--minutes", type=float, default=40)
    recording.add_argument("--threads", type=int, default=1)
    recording.set_defaults(run=record)
    comparing = commands.add_parser("compare")
    comparing.add_argument("before", type=Path)
    comparing.add_argument("after", type=Path)
    comparing.set_defaults(run=compare)
    options = parser.parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    options.run(options)


if __name__ == "__main__":
    main()
