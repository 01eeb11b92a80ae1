"""Define the commands that decode: `generate`, and `calibrate` and `serve-bench` for exits."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

import reroll
from reroll.bounds import BETWEEN, COUNT, LARGEST, POSITIVE, SEED, TOP_P, Range
from reroll.cli.command import command
from reroll.cli.options import (
    AnyModel,
    Dtype,
    Json,
    Overwrite,
    Revision,
    Trust,
    WithExits,
    integer,
    number,
)
from reroll.cli.tables import Found, new_table
from reroll.cli.terminal import Bars, write, write_json
from reroll.errors import UsageError

if TYPE_CHECKING:
    from reroll.rewrite.ir.program import Program

# the first new token comes with the prompt, and only those after it are timed
NEW_TOKENS = Range(least=2, most=LARGEST)
# of near ties, so many are named
_TIES = 8
THREADS = Range(least=1, most=1024)


@command
def generate(
    model: AnyModel,
    prompt: Annotated[
        list[str] | None, typer.Option(help="Text to continue. Repeatable: a batch.")
    ] = None,
    prompt_file: Annotated[
        Path | None, typer.Option(help="A file with text to continue, in the place of a prompt.")
    ] = None,
    max_new_tokens: Annotated[int, integer(COUNT, "At most this many new tokens.")] = 64,
    temperature: Annotated[float | None, number(POSITIVE, "Sample, at this temperature.")] = None,
    top_k: Annotated[int | None, integer(COUNT, "Sample from the k likeliest tokens.")] = None,
    top_p: Annotated[float | None, number(TOP_P, "Sample from this share of likelihood.")] = None,
    beams: Annotated[int, integer(COUNT, "Beams of a beam search.")] = 1,
    seed: Annotated[int, integer(SEED, "For sampling.")] = 0,
    chat: Annotated[bool, typer.Option("--chat", help="Use the chat template.")] = False,
    read_twice: Annotated[
        bool,
        typer.Option(
            "--read-twice", help="Read each prompt twice: recurrent models recall better."
        ),
    ] = False,
    speculate: Annotated[
        str | None,
        typer.Option(
            help="Decode with a draft: passes that make one of the model, with `int8` behind them "
            "or alone, `draft` for the one that was saved with it, `lookup`, `exit`, `prompts`, or "
            "`auto`, which uses what pays. The tokens are the model's own."
        ),
    ] = None,
    exact: Annotated[
        bool,
        typer.Option(
            "--exact",
            help="With a draft: a step of one token decides where the two best logits lie within "
            "rounding of each other.",
        ),
    ] = False,
    stop: Annotated[
        list[str] | None, typer.Option(help="A text that ends an answer. Repeatable.")
    ] = None,
    load_state: Annotated[
        Path | None, typer.Option(help="Go on from what this file says was read.")
    ] = None,
    save_state: Annotated[
        Path | None, typer.Option(help="Write a file to go on from, with all that was read.")
    ] = None,
    overwrite: Overwrite = False,
    dtype: Dtype = None,
    revision: Revision = None,
    trust_remote_code: Trust = False,
    json_: Json = False,
) -> None:
    """Continue prompts. Greedy unless an option for sampling is given.

    MODEL may be a directory that was exported to ONNX: it then runs in ONNX Runtime.
    """
    from reroll.evaluate.exported import generate as run_exported
    from reroll.evaluate.generation import generate as run
    from reroll.evaluate.generation import open_generator
    from reroll.evaluate.subjects import Opening
    from reroll.evaluate.tokenizing import read_text
    from reroll.onnx.directory import is_exported

    prompts = list(prompt or ())
    if prompt_file is not None:
        prompts.append(read_text(prompt_file))
    if not prompts:
        raise UsageError(
            "there is no prompt", where="generate", hint="give --prompt TEXT or --prompt-file FILE"
        )
    if is_exported(model):
        refused = {
            "--beams": beams > 1,
            "--load-state": load_state is not None,
            "--save-state": save_state is not None,
            "--dtype": dtype is not None,
            "--exact": exact,
            "--stop": bool(stop),
        }
        for name in (name for name, given in refused.items() if given):
            raise UsageError(
                f"{name} is not for an exported model", model, "generate with what was exported"
            )
        with Bars() as bars:
            bars(0, 0, "generating")
            found = run_exported(
                model,
                prompts,
                max_new_tokens=max_new_tokens,
                temperature=temperature,
                top_k=top_k,
                top_p=top_p,
                seed=seed,
                chat=chat,
                read_twice=read_twice,
                speculate=speculate,
            )
        found = {"model": model, **found}
        write_json(found) if json_ else _print_texts(found, can_decide=False)
        return
    with Bars() as bars:
        bars(0, 0, "opening the model")
        opening = Opening(dtype, revision=revision, trust_remote_code=trust_remote_code)
        # only a captured model has drafts, and states that are saved
        captured = any(each is not None for each in (speculate, load_state, save_state))
        options = {"dtype": dtype, **opening.code}
        opened = reroll.capture(model, **options) if captured else model
        module, tokenizer = open_generator(opened, opening)
        bars(0, 0, "generating")
        found = run(
            module,
            tokenizer,
            prompts,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            beams=beams,
            seed=seed,
            chat=chat,
            read_twice=read_twice,
            stop=stop or (),
            speculate=speculate,
            exact=exact,
            load_state=load_state,
            save_state=save_state,
            overwrite=overwrite,
        )
    found = {"model": model, **found}
    write_json(found) if json_ else _print_texts(found)


def _print_texts(found: Found, *, can_decide: bool = True) -> None:
    outputs = found["outputs"]
    for output in outputs:
        if len(outputs) > 1:
            write(f"> {output['prompt']}")
        write(output["text"])
    tokens = sum(o["tokens"] for o in outputs)
    rate = found["tokens_per_second"]
    write(f"\n{tokens} tokens in {found['seconds']:.1f} s, {rate:.1f} tokens/s with the prompt")
    if "depth" in found:
        write(_depth(found["depth"]))
    if "speculation" in found:
        _print_speculation(found["speculation"], can_decide=can_decide)


def _print_speculation(report: Found, *, can_decide: bool) -> None:
    drafts = ", ".join(
        f"{name}: {each['accepted']} of {each['proposed']} accepted"
        for name, each in report["drafts"].items()
    )
    write(f"{report['tokens']} tokens in {report['steps']} steps; {drafts}")
    ties = report["near_ties"]
    if ties:
        at = ", ".join(str(tie["place"]) for tie in ties[:_TIES])
        more = f" and {len(ties) - _TIES} more" if len(ties) > _TIES else ""
        write(
            f"{len(ties)} tokens with another nearly as likely, within rounding: new tokens "
            f"{at}{more}" + ("; --exact decides them as plain decoding does" if can_decide else "")
        )


@command
def calibrate(
    model: WithExits,
    text: Annotated[Path, typer.Option(help="A file with text to calibrate on.")],
    risk: Annotated[
        float, number(BETWEEN, "The part of tokens that may differ from the full depth.")
    ] = 0.05,
    confidence: Annotated[float, number(BETWEEN, "With which that has to hold.")] = 0.95,
    max_tokens: Annotated[int, integer(COUNT, "Use at most so many tokens.")] = 4096,
    json_: Json = False,
) -> None:
    """Choose the thresholds of a model's exits on text, and write them into the model."""
    program = reroll.load(model)
    ids = _ids(program, model, text, 16 * max_tokens)[:max_tokens]
    with Bars() as bars:
        result, chosen = reroll.calibrate(
            program, ids, risk=risk, confidence=confidence, progress=bars
        )
        bars(0, 0, f"writing {model}")
        result.save(model, overwrite=True)
    found = {"model": model, **chosen.as_data()}
    write_json(found) if json_ else _print_thresholds(found)


def _ids(program: Program, model: str, text: Path, characters: int) -> list[int]:
    """Tokenize the first characters of a file with a model's tokenizer."""
    from reroll.evaluate.tokenizing import plain_ids, read_text, tokenizer_of

    tokenizer = tokenizer_of(program)
    if tokenizer is None:
        raise UsageError("the model has no tokenizer", where=model)
    return plain_ids(tokenizer, read_text(text)[:characters])


def _print_thresholds(found: Found) -> None:
    if found["thresholds"] is None:
        write("no threshold keeps the risk: nobody leaves")
        return
    table = new_table("after", "threshold", title="exits")
    for trips, threshold in found["thresholds"].items():
        table.add_row(f"{trips} trips", f"{threshold:.4g}")
    write(
        table,
        f"at most {found['risk']:.3g} of tokens differ from the full depth, with confidence "
        f"{found['confidence']:.3g}: {found['observed']:.3g} of {found['tokens']} did; mean depth "
        f"{found['depth']:.4g} of {found['trips']}",
    )


@command
def serve_bench(
    model: WithExits,
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
    from reroll.rewrite.analysis.reach import check_length

    torch.set_num_threads(threads)
    program = reroll.load(model)
    check_length(
        program, prompt_tokens + max_new_tokens, "--prompt-tokens and --max-new-tokens",
        "give at most {limit} together",
    )  # fmt: skip
    count = slots * queue
    ids = _ids(program, model, text, 32 * count * prompt_tokens)
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
    write_json(found) if json_ else _print_speeds(found)


def _print_speeds(found: Found) -> None:
    table = new_table("side", ">tokens/s", ">of lockstep", ">batches", ">rows each", ">mean depth")
    for name, side in found["sides"].items():
        table.add_row(
            name,
            f"{side['tokens_per_second']:.1f}",
            f"{side['of_lockstep']:.2f}",
            str(side["batches"]),
            f"{side['rows_per_batch']:.1f}",
            f"{side['depth']['mean']:.1f}",
        )
    write(
        table,
        f"{found['requests']} requests of {found['tokens']} tokens, {found['slots']} at once, "
        f"{found['threads']} threads; prompts' time not counted",
        _depth(found["sides"]["depth"]["depth"]),
    )


def _depth(found: Found) -> str:
    counts = ", ".join(f"{trips}: {count}" for trips, count in found["histogram"].items())
    return f"{found['mean']:.4g} trips per token ({counts})"
