"""Print the results of commands as text and tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.markup import escape
from rich.table import Table

from reroll.cli.terminal import results, write

Found = Mapping[str, Any]


def new_table(*columns: str, title: str | None = None) -> Table:
    """Create a table whose columns are right-aligned where the name starts with `>`."""
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for column in columns:
        right = column.startswith(">")
        table.add_column(column.removeprefix(">"), justify="right" if right else "left")
    return table


def _print(*things: Any) -> None:
    console = results()
    for thing in things:
        console.print(
            escape(thing) if isinstance(thing, str) else thing, soft_wrap=isinstance(thing, str)
        )


def number(value: Any) -> str:
    """Format a count or a measurement; None is a dash."""
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return "0" if value == 0 else f"{value:.4g}"
    return str(value)


def size(count: int | None) -> str:
    """Format bytes in the largest unit in which they are 1 or more."""
    if count is None:
        return "-"
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.4g} {unit}"
        count /= 1024  # type: ignore[assignment]
    return f"{count:.4g} GiB"


# ---- inspect


def inspected(found: Found) -> None:
    """Print what `inspect` found."""
    lines = [f"{found['model']}: {found['architecture']}, {found['dtype']}"]
    lines.append(f"{found['parameters']:,} parameters, {size(found['bytes'])}")
    loops = found["loops"]
    if loops:
        rolled = sum(loop["layers"] for loop in loops)
        count = "one loop" if len(loops) == 1 else f"{len(loops)} loops"
        lines.append(f"{rolled} layers roll into {count}")
    else:
        lines.append("no loop was found: no two regions of the graph are alike")
    lines.append(_exactness(found))
    lines += found["remarks"]
    _print("\n".join(lines))
    if loops:
        table = new_table(
            "loop",
            ">trips",
            ">period",
            ">layers",
            ">body ops",
            ">carried",
            ">invariants",
            ">per trip",
        )
        for loop in loops:
            keys = ("trips", "period", "layers", "body_ops", "carried", "invariants", "per_trip")
            table.add_row(escape(loop["name"]), *(number(loop[k]) for k in keys))
        _print(table)
    if found["attention"]:
        table = new_table(
            ">attention", "causal", ">window", ">heads", ">KV heads", ">head dim", "besides"
        )
        for kind in found["attention"]:
            besides = [k for k in ("chunk", "softcap", "sinks", "bias") if kind[k]]
            shown = ("count", "causal", "window", "heads", "kv_heads", "head_dim")
            table.add_row(*(number(kind[k]) for k in shown), ", ".join(besides))
        _print(table)
    times = found["seconds"]
    _print(f"captured in {times['capture']:.1f} s, rolled in {times['roll']:.1f} s")


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


# ---- convert


def converted(found: Found, timing: bool) -> None:
    """Print the sizes and costs before and after `convert`."""
    table = new_table("", ">before", ">after", ">ratio")
    for label, key, shown in (
        ("parameters", "parameters", number),
        ("weights", "bytes", size),
        ("FLOPs per token", "flops_per_token", number),
    ):
        _change(table, label, found[key], shown)
    for context, change in found["state_bytes"].items():
        if change["before"] or change["after"]:
            _change(table, f"state at {int(context):,} tokens", change, size)
    _print(table)
    if timing:
        times = new_table("step", ">seconds")
        for name, seconds in found["seconds"].items():
            if name != "total":
                times.add_row(name, f"{seconds:.2f}")
            if name == "passes":
                for step in found["passes"]:
                    times.add_row(escape(f"  {step['pass']}"), f"{step['seconds']:.2f}")
        times.add_row("total", f"{found['seconds']['total']:.2f}")
        _print(times)
    _print(*found["remarks"])
    _print(f"wrote {found['out']}: {size(sum(found['files'].values()))}")


def _change(table: Table, label: str, change: Found, shown: Any) -> None:
    before, after = change["before"], change["after"]
    ratio = f"{after / before:.3f}" if before else "-"
    table.add_row(label, shown(before), shown(after), ratio)


# ---- compare


def compared(found: Found) -> None:
    """Print the distances that `compare` measured."""
    inputs = found["inputs"]
    on = inputs["kind"]
    if on == "text":
        source = "the sample text" if inputs["text"] == "sample" else inputs["text"]
        on = f"{source}, {inputs['windows']} windows of {inputs['length']} tokens"
        on += ", the text goes on" if inputs["cut"] else ""
    _print(
        f"a: {found['a']} ({found['dtype']['a']})\nb: {found['b']} ({found['dtype']['b']})\non {on}"
    )
    table = new_table("", ">a", ">b", ">b / a")
    rows: list[tuple[str, Found | None, Any]] = [("perplexity", found["perplexity"], number)]
    rows += [("parameters", found["parameters"], number), ("weights", found["bytes"], size)]
    rows += [("FLOPs per token", found["flops_per_token"], number)]
    for context, sides in (found["state_bytes"] or {}).items():
        rows.append((f"state at {int(context):,} tokens", sides, size))
    for label, sides, shown in rows:
        if sides is not None:
            a, b = sides["a"], sides["b"]
            table.add_row(label, shown(a), shown(b), f"{b / a:.3f}" if a and b is not None else "-")
    _print(table)
    apart = new_table(f"distance of {found['output']}", ">")
    for label, key in (
        ("KL divergence (nats)", "kl"),
        ("top-1 agreement", "top1_agreement"),
        ("relative RMS error", "relative_rms_error"),
        ("largest error", "max_abs_error"),
    ):
        if found[key] is not None:
            shown = f"{found[key]:.2%}" if key == "top1_agreement" else f"{found[key]:.3g}"
            apart.add_row(label, shown)
    _print(apart)


# ---- evaluate


def evaluated(found: Found, page: Path | None) -> None:
    """What `evaluate` measured."""
    from reroll.evaluate.pages import number as shown
    from reroll.evaluate.report import problems, rows

    beside = found["original"] is not None
    heads = ["measure", "", ">model", *([">original", ">ratio"] if beside else [])]
    title = f"{found['model']}, {found['suite']} suite, {found['seconds']:.0f} s"
    table = new_table(*heads, title=escape(title))
    before = None
    for row in rows(found):
        values = [row.model, row.original, row.ratio] if beside else [row.model]
        name = "" if row.measure == before else row.measure
        table.add_row(escape(name), escape(row.label), *map(shown, values))
        before = row.measure
    _print(table)
    for name, status, reason in problems(found):
        _print(f"{name} {status}: {reason}")
    if page is not None:
        _print(f"wrote {page}")


# ---- recover


def recovered(found: Found) -> None:
    """Print the measurements of a recovery, by stage."""
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
            number(line["tokens"]),
            *(number(line.get(key)) for key in shown),
        )
    _print(table)


# ---- generate


def generated(found: Found) -> None:
    """Print the texts that `generate` produced."""
    outputs = found["outputs"]
    for output in outputs:
        if len(outputs) > 1:
            _print(f"> {output['prompt']}")
        write(output["text"])
    tokens = sum(o["tokens"] for o in outputs)
    rate = found["tokens_per_second"]
    _print(f"\n{tokens} tokens in {found['seconds']:.1f} s, {rate:.1f} tokens/s with the prompt")
    if "depth" in found:
        _print(_depth(found["depth"]))


def served(found: Found) -> None:
    """Print the results of `serve-bench`."""
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
    _print(table)
    _print(
        f"{found['requests']} requests of {found['tokens']} tokens, {found['slots']} at once, "
        f"{found['threads']} threads; prompts' time not counted"
    )
    _print(_depth(found["sides"]["depth"]["depth"]))


def _depth(found: Found) -> str:
    counts = ", ".join(f"{trips}: {count}" for trips, count in found["histogram"].items())
    return f"{found['mean']:.4g} trips per token ({counts})"


def calibrated(found: Found) -> None:
    """Print the thresholds that `calibrate` chose."""
    if found["thresholds"] is None:
        _print("no threshold keeps the risk: nobody leaves")
        return
    table = new_table("after", "threshold", title="exits")
    for trips, threshold in found["thresholds"].items():
        table.add_row(f"{trips} trips", f"{threshold:.4g}")
    _print(table)
    _print(
        f"at most {found['risk']:.3g} of tokens differ from the full depth, with confidence "
        f"{found['confidence']:.3g}: {found['observed']:.3g} of {found['tokens']} did; mean depth "
        f"{found['depth']:.4g} of {found['trips']}"
    )


# ---- passes


def passes(found: Sequence[Found]) -> None:
    """Print a table of all passes."""
    table = new_table("pass", "contract", "after", "what it does")
    for each in found:
        table.add_row(
            each["name"], each["contract"], ", ".join(each["requires"]), escape(each["summary"])
        )
    _print(table)
    _print("reroll passes NAME describes one with its options")


def plugins(found: Sequence[Found]) -> None:
    """Print a table of all registered passes, mixers, targets, stages and measures."""
    table = new_table("kind", "name", "from")
    for each in found:
        table.add_row(each["kind"], each["name"], escape(each["from"]))
    _print(table)


def one_pass(found: Found) -> None:
    """Print the documentation and options of one pass."""
    requires = f", after {' and '.join(found['requires'])}" if found["requires"] else ""
    _print(f"{found['name']} ({found['contract']}{requires})\n\n{found['documentation']}\n")
    if not found["options"]:
        _print("It has no options.")
        return
    table = new_table("option", "default", "value", "meaning")
    for option in found["options"]:
        default = "required" if option["required"] else _value(option["default"])
        table.add_row(option["name"], default, escape(option["kind"]), escape(option["help"]))
    _print(table)


def _value(value: Any) -> str:
    if isinstance(value, bool) or value is None:
        return str(value).lower()
    return escape(str(value))
