"""The plots of an evaluation, as SVG text. matplotlib is imported when a plot is drawn.

A line of one point is no line: what was measured at one place only is written as a table.
"""

from __future__ import annotations

import importlib.util
import io
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from reroll.errors import UsageError
from reroll.evaluate.pages import escape, number

Results = Mapping[str, Any]
SIDES = ("model", "original")
COLORS = {"model": "#c44e34", "original": "#3b6ea5"}
# not by colour alone
MARKERS = {"model": "o", "original": "s"}
INCH = 3.2


def need_matplotlib() -> None:
    """Raise UsageError if matplotlib is not installed."""
    if importlib.util.find_spec("matplotlib") is None:
        raise UsageError(
            "the page's plots need matplotlib, which is not installed",
            where="--html",
            hint='pip install "reroll[plots]", or leave --html out',
        )


def figures(result: Results) -> Iterator[tuple[str, str]]:
    """Captions and HTML of all plots that the results have data for."""
    results = {k: v["result"] for k, v in result["measures"].items() if v["status"] == "done"}
    if "perplexity" in results:
        panels = [("perplexity", _lines(results["perplexity"], "contexts", "perplexity"))]
        yield "Perplexity over the context (lower is better).", curves(panels, "context")
    yield from _recall(results.get("recall", {}))
    for name, caption in (
        ("state_tracking", "State tracking: accuracy over the number of items."),
        ("listops", "ListOps: accuracy over the most symbols."),
    ):
        if name in results:
            yield caption, _accuracies(results[name], name)
    if "speed" in results:
        keys = {
            "prefill, tokens/s": "prefill_tokens_per_second",
            "decode, tokens/s": "decode_tokens_per_second",
            "state, bytes": "state_bytes",
        }
        panels = [(t, _lines(results["speed"], "contexts", key)) for t, key in keys.items()]
        yield "Speed and state over the context.", curves(panels, "context")
    yield from _passes(result["passes"])


# ---- lines


def _lines(result: Results, table: str, key: str) -> dict[str, list[tuple[float, float]]]:
    """Return points by side: the first column of a table against another one."""
    lines = {}
    for side in SIDES:
        cells = result.get(side, {}).get(table, [])
        points = [(next(iter(c.values())), c[key]) for c in cells if _finite(c[key])]
        if points:
            lines[side] = points
    return lines


def _finite(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


Panel = tuple[str, Mapping[str, Sequence[tuple[float, float]]]]


def curves(panels: Sequence[Panel], label: str, chance: Sequence[float | None] = ()) -> str:
    """A panel for each title with lines of several points, and a table of all other numbers."""
    known = [*chance, *[None] * (len(panels) - len(chance))]
    drawn: list[tuple[Panel, float | None]] = []
    written: list[tuple[Panel, float | None]] = []
    for panel, by_chance in zip(panels, known, strict=True):
        several = any(len({x for x, _ in points}) > 1 for points in panel[1].values())
        (drawn if several else written).append((panel, by_chance))
    parts = [_lines_drawn(drawn, label)] if drawn else []
    return "".join([*parts, *([_written(written, label)] if written else [])])


def _lines_drawn(panels: Sequence[tuple[Panel, float | None]], label: str) -> str:
    """A line for each side over a logarithmic axis, in each panel."""
    figure, axes = _figure(len(panels))
    for axis, ((title, lines), chance) in zip(axes, panels, strict=True):
        for side, points in lines.items():
            x, y = zip(*points, strict=True)
            axis.plot(x, y, marker=MARKERS[side], color=COLORS[side], label=side)
            axis.set_xscale("log", base=2)
            axis.set_xticks(x, [f"{v:,}" for v in x])
        if chance is not None:
            axis.axhline(chance, color="#999", linestyle=":", label="chance")
            axis.set_ylim(-0.05, 1.05)
        axis.set_title(title)
        axis.set_xlabel(label)
        axis.minorticks_off()
    axes[0].legend(frameon=False)
    return _svg(figure)


def _written(panels: Sequence[tuple[Panel, float | None]], label: str) -> str:
    """Numbers that were measured at one place each."""
    rows = [
        (title, side, x, y, chance)
        for (title, lines), chance in panels
        for side, points in lines.items()
        for x, y in points
    ]
    return _table(("", "", label, "measured", "chance"), rows) if rows else ""


def _table(heads: Sequence[str], rows: Sequence[tuple[str | float | None, ...]]) -> str:
    """A table of words and numbers; a column of numbers has a head."""
    top = "".join(f'<th class="n">{escape(head)}</th>' for head in heads)
    lines = []
    for row in rows:
        cells = (
            f"<td>{escape(value)}</td>"
            if isinstance(value, str)
            else f'<td class="n">{escape(number(value))}</td>'
            for value in row
        )
        lines.append(f"<tr>{''.join(cells)}</tr>")
    return f"<table><thead><tr>{top}</tr></thead><tbody>{''.join(lines)}</tbody></table>"


def _accuracies(result: Results, name: str) -> str:
    """Draw accuracy over the first column of the cells, a panel for each task."""
    if name == "listops":
        tasks = {"listops": {side: result[side] for side in SIDES if side in result}}
    else:
        names = [k for k, v in result["model"].items() if isinstance(v, Mapping)]
        tasks = {
            task: {side: result[side][task] for side in SIDES if task in result.get(side, {})}
            for task in names
        }
    panels = [(task, _lines(sides, "cells", "accuracy")) for task, sides in tasks.items()]
    chance = [sides["model"]["chance"] for sides in tasks.values()]
    return curves(panels, "items" if name != "listops" else "symbols", chance)


# ---- recall


def _recall(result: Results) -> Iterator[tuple[str, str]]:
    maps = []
    for task in ("needle", "passkey"):
        for side in SIDES:
            cells = result.get(side, {}).get(task, {}).get("cells")
            if cells:
                maps.append((f"{task}, {side}", cells))
    single = [(title, cells) for title, cells in maps if len(cells) == 1]
    maps = [(title, cells) for title, cells in maps if len(cells) > 1]
    if single:
        rows = [(title, c["length"], c["depth"], c["accuracy"]) for title, (c,) in single]
        heads = ("", "tokens in context", "depth", "accuracy")
        yield "Recall at one depth and length.", _table(heads, rows)
    if maps:
        window = result.get("window")
        note = f" The window is {window:,} tokens." if window else ""
        yield f"Recall at depth x length, 1 is always right.{note}", heat_maps(maps)
    for task, column in (("mqar", "pairs"), ("phonebook", "entries")):
        sides = {s: result[s][task] for s in SIDES if task in result.get(s, {})}
        if sides:
            panels = [(task, _lines(sides, "cells", "accuracy"))]
            yield f"{task}: accuracy over the number of {column}.", curves(panels, column)


def heat_maps(maps: Sequence[tuple[str, Sequence[Results]]]) -> str:
    """Draw a heat map of accuracy for each title: depth downwards, length to the right."""
    figure, axes = _figure(len(maps))
    for axis, (title, cells) in zip(axes, maps, strict=True):
        lengths = sorted({c["length"] for c in cells})
        depths = sorted({c["depth"] for c in cells})
        values = [[float("nan")] * len(lengths) for _ in depths]
        for each in cells:
            row, column = depths.index(each["depth"]), lengths.index(each["length"])
            values[row][column] = each["accuracy"]
            color = "white" if each["accuracy"] > 0.6 else "black"
            style = {"ha": "center", "va": "center", "color": color, "zorder": 3}
            axis.text(column, row, f"{each['accuracy']:.2f}", **style)
        # the edges of the cells: from their centres alone, a single one would have no area
        edges = ([n - 0.5 for n in range(len(each) + 1)] for each in (lengths, depths))
        axis.pcolormesh(*edges, values, vmin=0, vmax=1, cmap="Blues", edgecolors="white")
        axis.invert_yaxis()
        axis.set_xticks(range(len(lengths)), [f"{n:,}" for n in lengths])
        axis.set_yticks(range(len(depths)), [f"{d:g}" for d in depths])
        axis.set_title(title)
        axis.set_xlabel("tokens in context")
        axis.set_ylabel("depth")
    return _svg(figure)


# ---- passes


def _passes(passes: Sequence[Results]) -> Iterator[tuple[str, str]]:
    """Yield plots of the change by each pass, as it was measured when it ran."""
    for title, key in (("parameters", "parameters"), ("perplexity", None)):
        steps = []
        for each in passes:
            measured = each["measured"]
            if key is None:
                measured = measured.get("quality", {}).get("previous", {})
            change = measured.get(key or "perplexity")
            if change is not None and _finite(change["before"]) and _finite(change["after"]):
                steps.append((each["pass"], change["before"], change["after"]))
        if steps:
            yield f"{title.capitalize()}, pass by pass.", waterfall(title, steps)


def waterfall(title: str, steps: Sequence[tuple[str, float, float]]) -> str:
    """Draw a bar for each step, from the value before it to the value after it."""
    figure, (axis,) = _figure(1, width=max(2.0, 0.5 + 0.35 * len(steps)))
    names = ["before", *(name if len(name) < 28 else f"{name[:27]}…" for name, _, _ in steps)]
    axis.bar(0, steps[0][1], color="#999")
    for position, (_, before, after) in enumerate(steps, 1):
        color = COLORS["original"] if after <= before else COLORS["model"]
        axis.bar(position, after - before, bottom=before, color=color)
        axis.annotate(f"{after:,.4g}", (position, max(before, after)), ha="center", va="bottom")
    axis.set_xticks(range(len(names)), names, rotation=20, ha="right")
    # room for the numbers above the bars
    axis.set_ylim(0, 1.15 * max(value for _, *pair in steps for value in pair))
    axis.set_title(title)
    return _svg(figure)


# ---- figures


def _figure(panels: int, width: float = 1.0) -> tuple[Any, list[Any]]:
    """Create a figure of panels in rows of at most three."""
    need_matplotlib()
    from matplotlib.figure import Figure

    # four fill two rows
    columns = 2 if panels == 4 else min(panels, 3) or 1
    rows = -(-panels // columns) or 1
    size = (INCH * 1.25 * columns * width, INCH * rows)
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).flatten().tolist()
    for axis in axes[panels:]:
        axis.set_visible(False)
    return figure, axes[:panels]


def _svg(figure: Any) -> str:
    """Render a figure as an `svg` element; equal figures give equal text."""
    import matplotlib

    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": "reroll", "svg.fonttype": "none"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    _, _, text = buffer.getvalue().partition("<svg")
    # what is one panel wide fits a narrow screen
    css_class = "narrow" if figure.get_figwidth() < 2 * INCH else "wide"
    return f'<svg class="{css_class}"{text}'
