"""Held-out perplexity and state of windows and mixers before any training.

Every line is the original after one pass, on the same tokens; contexts start afresh.

    python -m benchmarks.linearize_quality [--model DIR] [--contexts 512,2048] [--tokens 8192]
        [--positions 8] [--copies 256,1024] [--only NAME;NAME] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from transformers import AutoTokenizer

import reroll
from reroll.evaluate.suite import choose, evaluate
from reroll.rewrite.analysis.costs import state_bytes
from reroll.rewrite.ir.program import Program

# what queries and keys go through first: the delta rules scale them to length one themselves, and
# a slot or an exponential gate takes them as they are
FEATURES = {
    "linear": "",
    "retention": "elu",
    "mamba2": "elu",
    "gla": "elu",
    "hgrn2": "softmax",
    "rwkv6": "elu",
    "gsa": "",
    "mlstm": "",
    "deltanet": "",
    "gated_deltanet": "",
    "kda": "",
    "deltaproduct": "",
}
WAYS = {
    "hybrid": "gates=calibrated, samples=2",
    "hybrid, uncalibrated": "gain=1",
    "pure": "window=0, gates=calibrated, samples=2",
    "pure, uncalibrated": "window=0",
}
CONFIGURATIONS = {
    "original": "",
    "window 64": "window(size=64, sinks=0)",
    "window 64, 4 sinks": "window(size=64, sinks=4)",
    "masformer, full every 6th": "window(size=64, sinks=4, keep=6)",
} | {
    f"{mixer} {way}": (
        f"linearize(mixer={mixer}{feature and f', feature_map={feature}'}, rotary=true, {text})"
    )
    for mixer, feature in FEATURES.items()
    for way, text in WAYS.items()
}


def losses_of(
    program: Program, ids: torch.Tensor, context: int, first: int | None
) -> tuple[torch.Tensor, float]:
    """Nats per token [pieces, context - 1] over pieces of `context` tokens, and the seconds.

    `first` takes the place of the first token of each piece: without it Gemma is another model.
    """
    model = program.to_module()
    losses, start = [], time.perf_counter()
    with torch.inference_mode():
        for piece in ids.split(context):
            if piece.numel() < context:
                break
            if first is not None:
                piece = torch.cat((piece.new_tensor([first]), piece[1:]))
            logits = model(piece[None], use_cache=False).logits[0, :-1].float()
            losses.append(F.cross_entropy(logits, piece[1:], reduction="none"))
    return torch.stack(losses), time.perf_counter() - start


def main() -> None:
    """Print one line per configuration."""
    parser = argparse.ArgumentParser(description="perplexity of linearized models, untrained")
    parser.add_argument("--model", default="models/smollm2-135m-instruct")
    parser.add_argument("--held-out", type=Path, default=Path("data/text/wiki.val.txt"))
    parser.add_argument("--calibrate-on", type=Path, default=Path("data/text/wiki.train.txt"))
    parser.add_argument("--contexts", default="512,2048")
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--positions", type=int, help="also by so many parts of a context")
    parser.add_argument("--copies", help="also how much is copied over so many tokens")
    parser.add_argument("--only", help="names of configurations, or pipelines, separated by ;")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    text = options.held_out.read_text(encoding="utf-8")
    ids = torch.tensor(tokenizer(text[: 8 * options.tokens]).input_ids)[: options.tokens]
    first = tokenizer.bos_token_id if int(ids[0]) == tokenizer.bos_token_id else None
    sample = options.calibrate_on.read_text(encoding="utf-8")[:60_000]
    program = reroll.capture(options.model, dtype="float32")
    chosen = CONFIGURATIONS
    if options.only:
        names = [name.strip() for name in options.only.split(";")]
        chosen = {name: CONFIGURATIONS.get(name, name) for name in names}
    rows: list[dict[str, Any]] = []
    for name, text in chosen.items():
        after = program
        remarks: tuple[str, ...] = ()
        if text:
            after = reroll.run_passes(program, text, text=sample, measure=False)
            remarks = after.origin.steps[-1].remarks
        row: dict[str, Any] = {"name": name, "passes": text, "remarks": remarks}
        row["state"] = {c: state_bytes(after, c) for c in (1024, 131072)}
        for context in map(int, options.contexts.split(",")):
            losses, row[f"seconds {context}"] = losses_of(after, ids, context, first)
            row[f"perplexity {context}"] = math.exp(losses.mean().item())
            if options.positions:
                parts = losses.split(context // options.positions, 1)
                row[f"perplexity {context} by position"] = [p.mean().exp().item() for p in parts]
        if options.copies:
            measure = f"copying(lengths=[{options.copies}], passages=4)"
            found = evaluate(after, None, choose(measure, "quick"), text=options.held_out)
            for at in found["measures"]["copying"]["result"]["model"]["lengths"]:
                row[f"copied over {at['length']}"] = at["again"]
                row[f"first time, {at['length']}"] = at["first"]
        rows.append(row)
        shown = "  ".join(f"{k} {v:.4g}" for k, v in row.items() if isinstance(v, float))
        print(f"{name:44s} {shown}  state {row['state']}", *remarks, sep="\n    ", flush=True)
        for key in [k for k in row if k.endswith("by position")]:
            print(f"    {key}: " + ", ".join(f"{value:.4g}" for value in row[key]), flush=True)
    if options.json:
        options.json.write_text(json.dumps(rows, indent=2))


if __name__ == "__main__":
    main()
