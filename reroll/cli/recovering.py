"""Define the commands `recover` and `sample`."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from reroll.bounds import COUNT, SEED, TOKENS
from reroll.cli.command import command
from reroll.cli.options import Json, Model, Out, Overwrite, Revision, Trust, integer
from reroll.cli.tables import Found, format_number, new_table
from reroll.cli.terminal import Bars, write, write_json
from reroll.errors import UsageError
from reroll.writing import check_file, new_file

UNITS = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9}


@command
def recover(
    model: Annotated[str, typer.Argument(metavar="OUT_IN", help="A converted model.")],
    out: Out,
    data: Annotated[
        list[str], typer.Option(help="A text file, a directory or a dataset. Repeatable.")
    ],
    recipe: Annotated[Path, typer.Option(help="A YAML file with stages, or the name of a recipe.")],
    tokens: Annotated[str, typer.Option(help="Tokens to train on, such as 500k or 2M.")],
    teacher: Annotated[
        str | None, typer.Option(help="The original.", show_default="what OUT_IN was made from")
    ] = None,
    restart: Annotated[
        bool, typer.Option("--restart", help="Begin anew instead of going on from a checkpoint.")
    ] = False,
    board: Annotated[
        Path | None,
        typer.Option("--tensorboard", metavar="DIR", help="Write each step for TensorBoard here."),
    ] = None,
    overwrite: Overwrite = False,
    trust_remote_code: Trust = False,
    dtype: Annotated[
        str | None,
        typer.Option(
            help="Save in this dtype: float32, bfloat16, float16; training is in fp32.",
            show_default="the model's own",
        ),
    ] = None,
    json_: Json = False,
) -> None:
    """Train a rewritten model against its original, and write the result.

    Interrupted runs go on from their last checkpoint. `accelerate launch -m reroll.cli recover ...`
    trains over several processes.
    """
    count = token_count(tokens)
    from reroll.recover import recover as run
    from reroll.recover import tensorboard

    boards = [] if board is None else [tensorboard(board)]
    with Bars() as bars:

        def show(step: Mapping[str, Any]) -> None:
            for each in boards:
                each(step)
            left = int(step["seconds_left"])
            bars(
                step["steps"],
                step["total_steps"],
                f"{step['stage']}: loss {step['smooth']:.4g}, {step['tokens_per_second']:.0f}"
                f" tokens/s, {left // 3600}:{left // 60 % 60:02}:{left % 60:02} left",
            )

        bars(0, 0, "opening the models and the text")
        report = run(
            model,
            out,
            data=data,
            recipe=recipe,
            tokens=count,
            teacher=teacher,
            restart=restart,
            overwrite=overwrite,
            trust_remote_code=trust_remote_code,
            dtype=dtype,
            on_step=show,
        )
    if report.main:
        write_json(vars(report)) if json_ else _print_recovery(vars(report))


def _print_recovery(found: Found) -> None:
    """Print what was measured on held-out text, by stage."""
    known = {
        "perplexity": "perplexity", "original_perplexity": "original's", "kl": "KL",
        "top1_agreement": "top-1", "cosine": "cosine", "relative_error": "relative error",
    }  # fmt: skip
    shown = {key: title for key, title in known.items() if key in found["measures"][-1]}
    table = new_table(
        "measured", ">tokens", *(f">{title}" for title in shown.values()),
        title=f"{found['out']}: {found['tokens']:,} tokens in {found['seconds']:.0f} s, held out",
    )  # fmt: skip
    for line in found["measures"]:
        table.add_row(
            f"before {line['before']}" if line["before"] else "at the end",
            format_number(line["tokens"]),
            *(format_number(line.get(key)) for key in shown),
        )
    write(table)


@command
def sample(
    model: Model,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The .jsonl file to write.")],
    tokens: Annotated[str, typer.Option(help="Tokens to write, such as 500k or 2M.")],
    length: Annotated[int, integer(COUNT, "The most tokens of a text.")] = 1024,
    batch: Annotated[int, integer(COUNT, "Texts that are written at a time.")] = 32,
    start: Annotated[
        str | None,
        typer.Option(
            help="The prompt that texts continue.", show_default="the tokenizer's first token"
        ),
    ] = None,
    seed: Annotated[int, integer(SEED, "Of the random choices.")] = 0,
    overwrite: Overwrite = False,
    revision: Revision = None,
    trust_remote_code: Trust = False,
) -> None:
    """Write text that a model samples itself, as data to recover a rewritten model on."""
    if out.suffix != ".jsonl":
        raise UsageError("texts are written as .jsonl", where=str(out), hint=f"{out}.jsonl")
    check_file(out, overwrite=overwrite, sources=[model])
    count = token_count(tokens)
    from reroll.evaluate.subjects import Opening, open_subject
    from reroll.recover.sampling import sampled_texts

    with Bars() as bars:
        bars(0, 0, "opening the model")
        opening = Opening(None, "sdpa", revision, trust_remote_code)
        subject = open_subject(model, opening)
        if not subject.generates or subject.tokenizer is None:
            raise UsageError("it is no language model with a tokenizer", where=model)
        with (
            new_file(out, overwrite=overwrite, sources=[model]) as part,
            part.open("w", encoding="utf-8") as file,
        ):
            for text in sampled_texts(
                subject.model, subject.tokenizer, tokens=count, length=length, batch=batch,
                start=start, seed=seed, on_progress=lambda n, of: bars(n, of, "tokens"),
            ):  # fmt: skip
                file.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
    write(str(out))


def token_count(text: str) -> int:
    """Parse a number such as 500k or 2M; raises UsageError if it is none."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([kmbKMB]?)", text.strip())
    count = 0.0 if found is None else float(found[1]) * UNITS[found[2].lower()]
    if count not in TOKENS:
        raise UsageError(
            f"{text!r:.40} is not a number of tokens", where="--tokens", hint="such as 500k or 2M"
        )
    return int(count)
