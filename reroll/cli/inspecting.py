"""Define the command `inspect`."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.markup import escape

from reroll.cli.command import command
from reroll.cli.options import Dtype, Json, Model, Revision, Trust
from reroll.cli.tables import Found, format_number, format_size, new_table
from reroll.cli.terminal import Bars, write, write_json


@command
def inspect(
    model: Model,
    check: Annotated[
        bool, typer.Option(help="Load the weights too, and compare with the model itself.")
    ] = True,
    dtype: Dtype = None,
    revision: Revision = None,
    trust_remote_code: Trust = False,
    json_: Json = False,
) -> None:
    """Say which loops and which attention a model has, and whether its capture is exact."""
    from reroll.evaluate.inspect import inspect_model

    with Bars() as bars:
        found = inspect_model(
            model,
            check,
            dtype=dtype,
            revision=revision,
            trust_remote_code=trust_remote_code,
            on_progress=bars,
        )
    write_json(found) if json_ else print_inspection(found)


def print_inspection(found: Found) -> None:
    """Print what `inspect` found."""
    write(f"{found['model']}: {found['architecture']}, {found['dtype']}")
    write(f"{found['parameters']:,} parameters, {format_size(found['bytes'])}")
    loops = found["loops"]
    if loops:
        rolled = sum(loop["layers"] for loop in loops)
        count = "one loop" if len(loops) == 1 else f"{len(loops)} loops"
        write(f"{rolled} layers roll into {count}")
    else:
        write("no loop was found: no two regions of the graph are alike")
    write(_exactness(found), *found["remarks"])
    if loops:
        table = new_table(
            "loop", ">trips", ">period", ">layers", ">body ops", ">carried", ">invariants",
            ">per trip",
        )  # fmt: skip
        for loop in loops:
            keys = ("trips", "period", "layers", "body_ops", "carried", "invariants", "per_trip")
            table.add_row(escape(loop["name"]), *(format_number(loop[k]) for k in keys))
        write(table)
    if found["attention"]:
        table = new_table(
            ">attention", "causal", ">window", ">heads", ">KV heads", ">head dim", "besides"
        )
        for kind in found["attention"]:
            besides = [k for k in ("chunk", "softcap", "sinks", "bias") if kind[k]]
            shown = ("count", "causal", "window", "heads", "kv_heads", "head_dim")
            table.add_row(*(format_number(kind[k]) for k in shown), ", ".join(besides))
        write(table)
    times = found["seconds"]
    write(f"captured in {times['capture']:.1f} s, rolled in {times['roll']:.1f} s")


def _exactness(found: Found) -> str:
    check = found["check"]
    if check is None:
        return "not compared with the original"
    flat, rolled = check["flat"], check["rolled"]
    if flat["failure"]:
        return f"captured wrongly: the program does not run on other inputs: {flat['failure']}"
    first = (
        "captured exactly: the same bits"
        if flat["bit_identical"]
        else f"captured, but not to the bit: largest error {flat['max_abs_error']:.2g}"
    )
    if rolled["bit_identical"]:
        second = "the same bits"
    elif rolled["failure"]:
        second = f"wrong: {rolled['failure']}"
    else:
        second = f"relative RMS error {rolled['relative_rms_error']:.2g}"
    return f"{first} of {found['output']} as the original; rolled: {second} ({check['inputs']})"
