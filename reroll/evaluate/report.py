"""Present an evaluation as the rows of a table, and as one HTML page.

The page needs no other file and no network: its plots are inline SVG.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from reroll.evaluate import pages
from reroll.evaluate.pages import document, escape, number, scroll
from reroll.writing import Paths

Results = Mapping[str, Any]
Number = float | int | None


class TableRow(NamedTuple):
    """One line of the table."""

    measure: str
    label: str
    model: Number
    original: Number

    @property
    def ratio(self) -> float | None:
        """Ratio of model to original, where both are numbers."""
        if self.model is None or not self.original:
            return None
        return self.model / self.original


def rows(results: Results) -> list[TableRow]:
    """Return the numbers that a table shows, measure by measure."""
    lines = []
    for name, each in results["measures"].items():
        sides = each.get("headline", {})
        # a side may lack labels of the other, for contexts that it cannot take
        labels = dict.fromkeys(label for side in sides.values() for label in side)
        for label in labels:
            values = [sides.get(side, {}).get(label) for side in ("model", "original")]
            lines.append(TableRow(name, label, *values))
    return lines


def problems(results: Results) -> list[tuple[str, str, str]]:
    """Return the name, status and reason of measures that have no result."""
    return [
        (name, each["status"], each.get("reason") or each.get("error") or "")
        for name, each in results["measures"].items()
        if each["status"] != "done"
    ]


# ---- the page

STYLE = """
figure { margin: 1.5rem 0 2rem; } figcaption { margin: .1rem 0 .5rem; }
figure svg { display: block; max-width: 100%; height: auto; border-radius: 8px;
  background: #fff; }
/* what is drawn side by side stays readable on a narrow screen, and scrolls */
@media (max-width: 40rem) { figure svg.wide { max-width: none; } }
details { margin: .3rem 0; }
"""


def check_page(path: Path, sources: Paths = ()) -> None:
    """Raise UsageError if a page cannot be drawn or written, before any long work.

    `sources` are the inputs, which the page must not replace.
    """
    from reroll.evaluate import plots

    plots.need_matplotlib()
    pages.check_page(path, sources)


def write_page(results: Results, path: Path) -> None:
    """Write the page; the file is whole, or as it was before."""
    pages.write(page(results), path)


def page(results: Results) -> str:
    """Build the HTML page."""
    from reroll.evaluate import plots

    title = f"Evaluation of {results['model']}"
    parts = [
        f"<h1>{escape(title)}</h1>",
        f'<p class="note">{escape(_about(results))}</p>',
        "<h2>Summary</h2>",
        scroll("".join(_table(results)), "summary"),
    ]
    for caption, drawn in plots.figures(results):
        parts += [f"<figure><figcaption>{escape(caption)}</figcaption>"]
        parts += [scroll(drawn, caption), "</figure>"]
    parts.append("<h2>Everything</h2>")
    for name, each in results["measures"].items():
        text = json.dumps(each, indent=1, ensure_ascii=False, default=str)
        parts.append(
            f"<details><summary>{escape(name)}: {escape(each['status'])}, "
            f"{each['seconds']:.1f} s</summary><pre>{escape(text)}</pre></details>"
        )
    return document(title, parts, STYLE)


def _about(results: Results) -> str:
    beside = f" beside {results['original']}" if results["original"] else ""
    return (
        f"{results['suite']} suite{beside}, seed {results['seed']}, text: {results['text']}, "
        f"{results['dtype']['model']}, threads: {results['threads']}, {results['seconds']:.0f} s"
    )


def _table(results: Results) -> Iterator[str]:
    heads = '<th class="n">model</th><th class="n">original</th><th class="n">ratio</th>'
    yield f"<table><thead><tr><th>measure</th><th></th>{heads}</tr></thead><tbody>"
    before = ""
    for row in rows(results):
        name = "" if row.measure == before else row.measure
        before = row.measure
        cells = "".join(
            f'<td class="n">{number(v)}</td>' for v in (row.model, row.original, row.ratio)
        )
        yield f"<tr><td>{escape(name)}</td><td>{escape(row.label)}</td>{cells}</tr>"
    for name, status, reason in problems(results):
        words = escape(f"{status}: {reason}")
        yield f'<tr><td>{escape(name)}</td><td colspan="4">{words}</td></tr>'
    yield "</tbody></table>"
