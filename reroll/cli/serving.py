"""Define the command `serve-bench`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

import reroll
from reroll.bounds import COUNT, LARGEST, Range
from reroll.cli import reports
from reroll.cli.app import Json, app
from reroll.cli.options import integer
from reroll.cli.terminal import Bars, command, write_json
from reroll.errors import UsageError

# the first new token comes with the prompt, and only those after it are timed
NEW_TOKENS = Range(least=2, most=LARGEST)
THREADS = Range(least=1, most=1024)


@app.command("serve-bench")
@command
def serve_bench(
    model: Annotated[str, typer.Argument(metavar="OUT", help="A converted model with exits.")],
    text: Annotated[Path, typer.Option(help="A file; passages of it are the prompts.")],
    slots: Annotated[int, integer(COUNT, "Requests that run at once.")] = 16,
    queue: Annotated[int, integer(COUNT, "Requests for each slot in all.")] = 2,
    prompt_tokens: Annotated[int, integer(COUNT, "Tokens of a prompt.")] = 16,
    max_new_tokens: Annotated[int, integer(NEW_TOKENS, "New tokens of a request.")] = 32,
    rounds: Annotated[int, integer(COUNT, "How often all sides run.")] = 3,
    threads: Annotated[int, integer(THREADS, "Of the processor.")] = 1,
    json_: Json = False,
) -> None:
    """Answer many requests with depth-wise batching, and without, and say how fast.

    Greedy. With one thread, seconds are those of the processor.
    """
    import torch

    from reroll.evaluate.serving import compare_serving
    from reroll.evaluate.tokenizing import plain_ids, read_text, tokenizer_of
    from reroll.rewrite.analysis.reach import check_length

    torch.set_num_threads(threads)
    program = reroll.load(model)
    check_length(
        program, prompt_tokens + max_new_tokens, "--prompt-tokens and --max-new-tokens",
        "give at most {limit} together",
    )  # fmt: skip
    tokenizer = tokenizer_of(program)
    if tokenizer is None:
        raise UsageError("the model has no tokenizer", where=model)
    count = slots * queue
    ids = plain_ids(tokenizer, read_text(text)[: 32 * count * prompt_tokens])
    if len(ids) < count * prompt_tokens:
        raise UsageError(f"the text is too short for {count} prompts of {prompt_tokens} tokens")
    step = len(ids) // count
    prompts = [ids[i * step : i * step + prompt_tokens] for i in range(count)]
    with Bars() as bars:
        found = compare_serving(
            program.to_module(),
            prompts,
            slots=slots,
            tokens=max_new_tokens,
            rounds=rounds,
            progress=bars,
        )
    found = {"model": model, **found}
    write_json(found) if json_ else reports.served(found)
