"""Generate text with an exported ONNX directory, as `reroll.evaluate.generation` does in torch."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import reroll.onnx
from reroll.errors import UsageError
from reroll.evaluate.generation import as_chat, check_options
from reroll.evaluate.tokenizing import open_tokenizer
from reroll.runtime.speculation.report import summed


def generate(
    directory: str,
    prompts: Sequence[str],
    *,
    max_new_tokens: int = 64,
    temperature: float | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    chat: bool = False,
    read_twice: bool = False,
    speculate: str | None = None,
) -> dict[str, Any]:
    """Continue prompts one after the other, as JSON data: see `generation.generate`.

    `speculate` is a draft that `reroll.onnx.Runner.generate` takes. Raises UsageError for a
    directory that is no export, that has no tokenizer, and for options that are out of range.
    """
    check_options(prompts, max_new_tokens, temperature, top_k, top_p, 1, seed)
    runner = reroll.onnx.load(directory)
    tokenizer = open_tokenizer(directory)
    if tokenizer is None:
        raise UsageError("the export has no tokenizer", where=directory)
    ends = {*runner.ends, *(i for i in [tokenizer.eos_token_id] if i is not None)}
    if any(value is not None for value in (top_k, top_p)) and temperature is None:
        temperature = 1.0
    outputs, reports, start = [], [], time.perf_counter()
    for prompt in prompts:
        text = f"{prompt}\n\n{prompt}" if read_twice else prompt
        text = as_chat(tokenizer, text) if chat else text
        # the template's text has special tokens already
        ids = tokenizer(text, add_special_tokens=not chat)["input_ids"]
        if not ids:
            raise UsageError("a prompt has no tokens", hint="give a longer prompt")
        found = runner.generate(
            ids,
            max_new_tokens,
            speculate,
            ends=ends,
            temperature=temperature,
            top_k=top_k or 0,
            top_p=1.0 if top_p is None else top_p,
            seed=seed,
        )
        new = found[len(ids) :].tolist()
        assert runner.report is not None
        reports.append(runner.report)
        new = new[:-1] if new[-1] in ends else new
        text = tokenizer.decode(new, skip_special_tokens=True)
        outputs.append({"prompt": prompt, "text": text, "tokens": len(new)})
    seconds = time.perf_counter() - start
    return {
        **({} if speculate is None else {"speculation": summed(reports).as_data()}),
        "outputs": outputs,
        "steps": max(report.tokens for report in reports),
        "seconds": seconds,
        "tokens_per_second": sum(o["tokens"] for o in outputs) / seconds,
    }
