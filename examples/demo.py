"""The whole job on a real model: inspect, convert with three recipes, compare, generate.

    python examples/demo.py

Takes SmolLM2-135M-Instruct from models/ and text from data/text/ (`make models` makes both), and
writes the converted models and a report to out/demo/.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.table import Table

import reroll
from reroll.cli.inspecting import print_inspection
from reroll.cli.tables import format_size
from reroll.cli.terminal import Bars
from reroll.evaluate.compare import compare
from reroll.evaluate.generation import generate, open_generator
from reroll.evaluate.inspect import inspect_model
from reroll.evaluate.subjects import open_subject
from reroll.rewrite.analysis.costs import state_bytes
from reroll.rewrite.pipeline.manager import Event
from reroll.rewrite.pipeline.pipeline import recipe_path

ROOT = Path(os.path.relpath(Path(__file__).resolve().parents[1]))
RECIPES = ["exact", "linearize-quarter", "tie15-relax128"]
# tokens of context whose state is counted
CONTEXT = 32_768
PROMPT = "What is the capital of France? Answer in one sentence."

console = Console(highlight=False, width=None if Console().is_terminal else 120)
started = time.perf_counter()


@contextmanager
def step(what: str) -> Iterator[Bars]:
    """Say what is being done and, when it is done, how long it took."""
    console.print(f"[{time.perf_counter() - started:4.0f} s] {what}", markup=False)
    with Bars() as bars:
        yield bars


def decode_speed(model: Any, tokenizer: Any, text: str, context: int = 128, new: int = 32) -> float:
    """Tokens per second that a model adds to a context, one at a time; the better of two tries."""
    ids = torch.tensor([tokenizer(text)["input_ids"][:context]])
    options = {"do_sample": False, "pad_token_id": 0, "attention_mask": torch.ones_like(ids)}

    def seconds(count: int) -> float:
        begin = time.perf_counter()
        model.generate(ids, min_new_tokens=count, max_new_tokens=count, **options)
        return time.perf_counter() - begin

    seconds(2)
    return max(new / (seconds(new + 1) - seconds(1)) for _ in range(2))


def size_of(directory: Path) -> int:
    """Bytes of the weight files in a directory."""
    return sum(file.stat().st_size for file in directory.glob("*.safetensors"))


def examine(path: Path, text: str) -> dict[str, Any]:
    """What a saved model generates, how fast, and how large its files are."""
    model, tokenizer = open_generator(path)
    said = generate(model, tokenizer, [PROMPT], max_new_tokens=24, chat=True)["outputs"][0]["text"]
    speed = decode_speed(model, tokenizer, text)
    return {"file_bytes": size_of(path), "decode_tokens_per_second": speed, "says": said}


def main() -> None:
    """Run the demo and print its table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", type=Path, default=ROOT / "models" / "smollm2-135m-instruct")
    parser.add_argument("--text", type=Path, default=ROOT / "data" / "text" / "wiki.val.txt")
    parser.add_argument(
        "--calibrate-on", type=Path, default=ROOT / "data" / "text" / "wiki.train.txt"
    )
    parser.add_argument("--out", type=Path, default=ROOT / "out" / "demo")
    parser.add_argument("--tokens", type=int, default=4096, help="tokens of the text to compare on")
    arguments = parser.parse_args()
    for path in (arguments.model, arguments.text, arguments.calibrate_on):
        if not path.exists():
            parser.error(f"{path} is missing: make models NAMES='smollm2-135m-instruct text:wiki'")
    text = arguments.text.read_text(encoding="utf-8")

    with step(f"inspecting {arguments.model.name}") as bars:
        print_inspection(inspect_model(str(arguments.model), on_progress=bars))
    with step("running the original"):
        first = {"recipe": "original", **examine(arguments.model, text)}
    with step("opening it for comparison, and capturing it"):
        original = open_subject(str(arguments.model))
        program = reroll.capture(str(arguments.model))

    rows = [first]
    for name in RECIPES:
        out = arguments.out / name
        recipe = recipe_path(name)
        with step(f"converting by the recipe {name}") as bars:

            def tell(event: Event, bars: Bars = bars) -> None:
                if event.kind == "progress":
                    bars(event.done, event.total, event.what)

            converted = reroll.run_passes(
                program, recipe, text=arguments.calibrate_on, measure=False, on_event=tell
            )
            # low-rank factors are computed here, when the weights are written
            converted.save(
                str(out),
                overwrite=True,
                progress=lambda done, total, bars=bars: bars(
                    done >> 20, total >> 20, "MiB written"
                ),
            )
        with step(f"comparing it with the original on {arguments.tokens:,} tokens") as bars:
            found = compare(original, str(out), text, max_tokens=arguments.tokens, on_progress=bars)
        with step("running it"):
            seen = examine(out, text)
        passes = ", ".join(str(s.text) for s in converted.origin.steps) or "none, only rolled"
        state = {"state_bytes": state_bytes(converted, CONTEXT)}
        rows.append({"recipe": name, "passes": passes, **seen, **found, **state})
    first.update(
        parameters={"b": rows[1]["parameters"]["a"]},
        perplexity={"b": rows[1]["perplexity"]["a"]},
        state_bytes=state_bytes(program, CONTEXT),
    )

    console.print(f"\n> {PROMPT}", markup=False)
    for row in rows:
        console.print(f"{row['recipe']}: {row['says']!r}", markup=False)
    console.print(table(rows, arguments.tokens))
    report = arguments.out / "report.json"
    report.write_text(json.dumps(rows, indent=1) + "\n")
    console.print(f"The models and report.json are in {arguments.out}.", markup=False)
    console.print(f"It took {time.perf_counter() - started:.0f} s.")


def table(rows: list[dict[str, Any]], tokens: int) -> Table:
    """All models side by side."""
    made = Table(
        title=f"SmolLM2 and what became of it, on {tokens:,} held-out tokens of Wikipedia",
        box=box.SIMPLE_HEAD,
    )
    made.add_column("recipe")
    names = f"parameters,ratio,perplexity,KL,top-1,file,state at {CONTEXT >> 10}k,decode"
    for column in names.split(","):
        made.add_column(column, justify="right")
    whole = rows[0]["parameters"]["b"]
    for row in rows:
        apart = "kl" in row
        made.add_row(
            row["recipe"],
            f"{row['parameters']['b']:,}",
            f"{row['parameters']['b'] / whole:.2f}",
            f"{row['perplexity']['b']:,.4g}",
            f"{row['kl']:.3g}" if apart else "-",
            f"{row['top1_agreement']:.1%}" if apart else "-",
            format_size(row["file_bytes"]),
            format_size(row["state_bytes"]),
            f"{row['decode_tokens_per_second']:.1f}/s",
        )
    return made


if __name__ == "__main__":
    main()
