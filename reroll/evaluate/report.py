"""Present an evaluation as the rows of a table, and as one HTML page.

The page needs no other file and no network: its plots are inline SVG.
"""

from __future__ import annotations

import html
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from reroll.writing import Paths, check_file, new_file

Found = Mapping[str, Any]
Number = float | int | None


class Row(NamedTuple):
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


def rows(found: Found) -> list[Row]:
    """Return the numbers that a table shows, measure by measure."""
    lines = []
    for name, each in found["measures"].items():
        sides = each.get("headline", {})
        # a side may lack labels of the other, for contexts that it cannot take
        labels = dict.fromkeys(label for side in sides.values() for label in side)
        for label in labels:
            values = [sides.get(side, {}).get(label) for side in ("model", "original")]
            lines.append(Row(name, label, *values))
    return lines


def problems(found: Found) -> list[tuple[str, str, str]]:
    """Return the name, status and reason of measures that have no result."""
    return [
        (name, each["status"], each.get("reason") or each.get("error") or "")
        for name, each in found["measures"].items()
        if each["status"] != "done"
    ]


def number(value: Number) -> str:
    """Format a number; None is a dash."""
    if value is None:
        return "-"
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.4g}" if abs(value) < 10**4 else f"{value:,.0f}"


# ---- the page

STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; max-width: 64rem; margin: 2rem auto; padding: 0 1rem;
  color: #1b1b1b; background: #fff; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2rem; }
table { border-collapse: collapse; } td, th { padding: .2rem .8rem .2rem 0; text-align: left;
  border-bottom: 1px solid #ddd; vertical-align: top; }
td.n, th.n { text-align: right; font-variant-numeric: tabular-nums; }
figure { margin: 1.5rem 0; } figure svg { max-width: 100%; height: auto; }
figcaption, .note { color: #555; } pre { overflow: auto; background: #f6f6f6; padding: .6rem; }
"""


def check_page(path: Path, sources: Paths = ()) -> None:
    """Raise UsageError if a page cannot be drawn or written, before any long work.

    `sources` are the inputs, which the page must not replace.
    """
    from reroll.evaluate import plots

    plots.need_matplotlib()
    check_file(path, overwrite=True, sources=sources)


def write_page(found: Found, path: Path) -> None:
    """Write the page; if that fails, the file stays as it was."""
    with new_file(path, overwrite=True) as file:
        file.write_text(page(found), encoding="utf-8")


def page(found: Found) -> str:
    """Build the HTML page."""
    from reroll.evaluate import plots

    title = f"Evaluation of {found['model']}"
    parts = [
        "<!doctype html>",
        '<html lang="en"><head><meta charset="utf-8">',
        f"<title>{html.escape(title)}</title><style>{STYLE}</style></head><body>",
        f"<h1>{html.escape(title)}</h1>",
        f'<p class="note">{html.escape(_about(found))}</p>',
        *_table(found),
    ]
    for caption, svg in plots.figures(found):
        parts += [f"<figure>{svg}<figcaption>{html.escape(caption)}</figcaption></figure>"]
    parts.append("<h2>Everything</h2>")
    for name, each in found["measures"].items():
        text = json.dumps(each, indent=1, ensure_ascii=False, default=str)
        parts.append(
            f"<details><summary>{html.escape(name)}: {html.escape(each['status'])}, "
            f"{each['seconds']:.1f} s</summary><pre>{html.escape(text)}</pre></details>"
        )
    return "\n".join([*parts, "</body></html>", ""])


def _about(found: Found) -> str:
    beside = f" beside {found['original']}" if found["original"] else ""
    return (
        f"{found['suite']} suite{beside}, seed {found['seed']}, text: {found['text']}, "
        f"{found['dtype']['model']}, {found['threads']} threads, {found['seconds']:.0f} s"
    )


def _table(found: Found) -> Iterator[str]:
    yield "<h2>Summary</h2><table>"
    heads = '<th class="n">model</th><th class="n">original</th><th class="n">ratio</th>'
    yield f"<tr><th>measure</th><th></th>{heads}</tr>"
    before = ""
    for row in rows(found):
        name = "" if row.measure == before else row.measure
        before = row.measure
        cells = "".join(
            f'<td class="n">{number(v)}</td>' for v in (row.model, row.original, row.ratio)
        )
        yield f"<tr><td>{html.escape(name)}</td><td>{html.escape(row.label)}</td>{cells}</tr>"
    for name, status, reason in problems(found):
        words = html.escape(f"{status}: {reason}")
        yield f'<tr><td>{html.escape(name)}</td><td colspan="4">{words}</td></tr>'
    yield "</table>"
