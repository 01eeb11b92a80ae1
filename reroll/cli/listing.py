"""Define the commands `passes`, `targets` and `plugins`, which list what is registered."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

import typer
from rich.markup import escape

from reroll.cli.command import command
from reroll.cli.options import Json
from reroll.cli.tables import Found, format_number, new_table
from reroll.cli.terminal import write, write_json


@command
def passes(
    name: Annotated[str | None, typer.Argument(help="One pass, in full.")] = None,
    json_: Json = False,
) -> None:
    """List the passes, their options and their contracts."""
    from reroll.rewrite.pipeline.base import PASSES

    found = [p.describe() for p in ([PASSES.find(name)] if name else PASSES.all().values())]
    if json_:
        write_json({"passes": found})
    elif name:
        _print_pass(found[0])
    else:
        _print_passes(found)


def _print_passes(found: Sequence[Found]) -> None:
    table = new_table("pass", "contract", "after", "what it does")
    for each in found:
        table.add_row(
            each["name"], each["contract"], ", ".join(each["requires"]), escape(each["summary"])
        )
    write(table, "reroll passes NAME describes one with its options")


def _print_pass(found: Found) -> None:
    requires = f", after {' and '.join(found['requires'])}" if found["requires"] else ""
    write(f"{found['name']} ({found['contract']}{requires})\n\n{found['documentation']}\n\n")
    if not found["options"]:
        write("It has no options.")
        return
    table = new_table("option", "default", "value", "meaning")
    for option in found["options"]:
        default = "required" if option["required"] else _value(option["default"])
        table.add_row(option["name"], default, escape(option["kind"]), escape(option["help"]))
    write(table)


def _value(value: Any) -> str:
    if isinstance(value, bool) or value is None:
        return str(value).lower()
    return escape(str(value))


@command
def targets(
    name: Annotated[str | None, typer.Argument(help="One target, in full.")] = None,
    json_: Json = False,
) -> None:
    """List what models can be exported to, and the options of each target."""
    from reroll.export.targets import find, registered

    found = [t.describe() for t in ([find(name)] if name else registered().values())]
    write_json({"targets": found}) if json_ else _print_targets(found)


def _print_targets(found: Sequence[Found]) -> None:
    for each in found:
        write(f"{each['name']}\n\n{each['documentation']}\n")
        rows = new_table("option", "value", "default", "")
        for item in each["options"]:
            default = item["default"]
            shown = ",".join(default) if isinstance(default, list) else format_number(default)
            rows.add_row(f"--{item['name']}", item["kind"], shown, item["help"])
        write(rows)


@command
def plugins(json_: Json = False) -> None:
    """List passes, mixers, targets, stages and measures, and where each comes from."""
    from reroll.rewrite.pipeline.registry import registries

    found = [
        {"kind": registry.category, "name": name, "from": registry.origin(name)}
        for registry in registries()
        for name in registry.all()
    ]
    if json_:
        write_json({"plugins": found})
        return
    table = new_table("kind", "name", "from")
    for each in found:
        table.add_row(each["kind"], each["name"], escape(each["from"]))
    write(table)
