"""Loops without training: windows of layers in smaller steps, and a core that runs any often.

    python -m benchmarks.looping [--model DIR] [--starts 6,10,14,18] [--width 4] [--steps 2,3]
        [--schemes euler,heun,naive] [--tokens 2048] [--items 40] [--core "..."] [--json FILE]

Perplexity is over the first `--tokens` of the text, in rows of 256. The tasks are of the kind of
lm-eval's, made of the texts that ship: `continuation` asks which of four passages follows one, and
`definition` which of four definitions is a word's; the answer is the one with the highest mean
log-likelihood of its tokens, so guessing gives 25 %. They are run for the original and for the best
window of each scheme.
"""

from __future__ import annotations

import argparse
import json
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer

import reroll

ROW = 256
CONTEXT, ANSWER = 48, 16

Item = tuple[list[int], list[list[int]], int]


def perplexity(model: Any, ids: Tensor) -> float:
    """Of the first tokens of a text, in rows without context of the one before."""
    losses = []
    for row in ids.split(ROW):
        log = model(row[None], use_cache=False).logits[0].float().log_softmax(-1)
        losses.append(-log[:-1].gather(1, row[1:, None]))
    return torch.cat(losses).mean().exp().item()


def accuracy(model: Any, items: list[Item]) -> float:
    """The part of the questions whose answer has the highest mean log-likelihood."""
    right = 0
    for context, choices, answer in items:
        ids = torch.tensor([context + choice for choice in choices])
        keep = len(choices[0]) + 1
        log = model(ids, use_cache=False, logits_to_keep=keep).logits[:, :-1].log_softmax(-1)
        scores = log.gather(2, torch.tensor(choices)[..., None]).mean((1, 2))
        right += int(scores.argmax()) == answer
    return right / len(items)


def questions(pairs: list[tuple[list[int], list[int]]], count: int) -> list[Item]:
    """Each context with its own answer among those of three others."""
    chosen = random.Random(0)
    items = []
    for number, (context, own) in enumerate(pairs[:count]):
        others = [p[1] for i, p in enumerate(pairs) if i != number]
        choices = chosen.sample(others, 3)
        place = chosen.randrange(4)
        choices.insert(place, own)
        items.append((context, choices, place))
    return items


def tasks(encode: Callable[[str], list[int]], count: int) -> dict[str, list[Item]]:
    """The questions, from the held-out texts."""
    size = CONTEXT + ANSWER
    wiki = encode(Path("data/text/wiki.val.txt").read_text(encoding="utf-8")[:400_000])
    rows = [wiki[i : i + size] for i in range(0, len(wiki) - size, 4 * size)]
    passages = [(row[:CONTEXT], row[CONTEXT:]) for row in rows]
    dictionary = Path("data/text/foldoc.val.txt").read_text(encoding="utf-8")
    entries = re.findall(r"(?m)^(\S[^\n]{1,40})\n+\s+(\S[^\n]{40,})", dictionary)
    words = [(encode(f"{word}:"), encode(f" {text}")[:ANSWER]) for word, text in entries]
    words = [(word, text) for word, text in words if len(text) == ANSWER]
    return {"continuation": questions(passages, count), "definition": questions(words, count)}


def main() -> None:
    """Print the tables, row by row."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="models/smollm2-135m-instruct")
    parser.add_argument("--text", type=Path, default=Path("data/text/wiki.val.txt"))
    parser.add_argument("--starts", default="6,10,14,18")
    parser.add_argument("--width", type=int, default=4)
    parser.add_argument("--steps", default="2,3")
    parser.add_argument("--schemes", default="euler,heun,naive")
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--items", type=int, default=40, help="questions of each task; 0 for none")
    parser.add_argument("--core", default="prelude=4, core=6, coda=4", help="empty for none")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.set_grad_enabled(False)
    original = reroll.capture(options.model, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(options.model)

    def encode(text: str) -> list[int]:
        return list(tokenizer.encode(text, add_special_tokens=False))

    text = options.text.read_text(encoding="utf-8")[: 16 * options.tokens]
    ids = torch.tensor(encode(text)[: options.tokens])
    results: dict[str, Any] = {"windows": [], "tasks": [], "core": []}
    best: dict[str, tuple[float, str]] = {}
    print("| window | scheme | steps | layers run | perplexity |")
    print("| --- | --- | ---: | ---: | ---: |")
    base = perplexity(original.to_module(), ids)
    print(f"| none | | 1 | {original.loops[0].trips} | {base:.2f} |", flush=True)
    results["windows"].append({"scheme": None, "perplexity": base})
    for scheme in options.schemes.split(","):
        for start in map(int, options.starts.split(",")):
            for steps in options.steps.split(","):
                stop = start + options.width
                text = f"loop_window(start={start}, stop={stop}, steps={steps}, scheme={scheme})"
                program = reroll.run_passes(original, text, measure=False)
                found = perplexity(program.to_module(), ids)
                layers = sum(loop.layers for loop in program.loops)
                row = f"| {start} to {stop - 1} | {scheme} | {steps} | {layers} | {found:.2f} |"
                print(row, flush=True)
                results["windows"].append(
                    {"scheme": scheme, "start": start, "steps": steps, "perplexity": found}
                )
                best[scheme] = min(best.get(scheme, (float("inf"), "")), (found, text))
    questions_ = tasks(encode, options.items)
    print("\n| passes | " + " | ".join(questions_) + " |\n| --- |" + " ---: |" * len(questions_))
    for text in ["", *(text for _, text in best.values())] if options.items else []:
        program = reroll.run_passes(original, text, measure=False) if text else original
        model = program.to_module()
        scores = {name: accuracy(model, items) for name, items in questions_.items()}
        row = " | ".join(f"{score:.1%}" for score in scores.values())
        print(f"| `{text or 'none'}` | {row} |", flush=True)
        results["tasks"].append({"passes": text, **scores})
    print("\n| core | trips | perplexity | largest difference of logits from one trip |")
    print("| --- | ---: | ---: | ---: |")
    reference: Tensor | None = None
    remarks: tuple[str, ...] = ()
    for trips in (1, 2, 4, 8) if options.core else ():
        text = f"loop_core({options.core}, trips={trips})"
        program = reroll.run_passes(original, text, measure=False)
        model = program.to_module()
        logits = model(ids[None, :ROW], use_cache=False).logits
        reference = logits if reference is None else reference
        error = (logits - reference).abs().max().item()
        found = perplexity(model, ids)
        print(f"| `{options.core}` | {trips} | {found:,.4g} | {error:.2g} |", flush=True)
        results["core"].append({"trips": trips, "perplexity": found, "difference": error})
        remarks = program.origin.steps[-1].remarks
    print("\n" + "\n".join(remarks))
    if options.json:
        options.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
