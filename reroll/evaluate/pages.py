"""What the HTML pages have in common: one file, no script, nothing from anywhere else."""

from __future__ import annotations

import html
from collections.abc import Iterable
from pathlib import Path

from reroll.writing import Paths, check_file, new_file

STYLE = """
:root { color-scheme: light dark; --ink: #1c1f24; --soft: #59616c; --line: #dcdfe4;
  --ground: #fafaf8; --card: #ffffff; --tint: #f1f2f4; --accent: #2b5c8a; --strong: #b5482f; }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e7ea; --soft: #9ba4af; --line: #323840;
  --ground: #14171a; --card: #1b1f23; --tint: #252a30; --accent: #8fbbe6; --strong: #ee9a80; } }
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; }
body { font: 15px/1.5 system-ui, -apple-system, "Segoe UI", "Noto Sans", sans-serif; margin: 0 auto;
  max-width: 80rem; padding: 1.75rem 1.5rem 3rem; color: var(--ink); background: var(--ground);
  overflow-wrap: break-word; }
h1 { font-size: 1.5rem; line-height: 1.25; margin: 0 0 .35rem; letter-spacing: -.01em; }
h2 { font-size: 1.15rem; margin: 2.2rem 0 .6rem; }
h3 { font-size: 1rem; margin: 0; } h4 { font-size: .85rem; margin: 1.1rem 0 .3rem; }
p { margin: .3rem 0 .8rem; } .note, figcaption { color: var(--soft); }
.scroll { overflow-x: auto; max-width: 100%; }
.scroll:focus-visible { outline: 2px solid var(--accent); }
table { border-collapse: collapse; } td, th { padding: .22rem .9rem .22rem 0; text-align: left;
  border-bottom: 1px solid var(--line); vertical-align: top; }
th { font-weight: 600; } thead th { color: var(--soft); font-size: .85em; vertical-align: bottom; }
tr > :last-child { padding-right: 0; }
td.n, th.n { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
summary { cursor: pointer; } a { color: var(--accent); }
pre { font: .8rem/1.45 ui-monospace, Menlo, Consolas, "DejaVu Sans Mono", monospace;
  overflow: auto; background: var(--tint); padding: .7rem; border-radius: 6px; }
@media (max-width: 40rem) { body { padding: 1.1rem 1rem 2rem; } h1 { font-size: 1.25rem; } }
"""


def escape(text: object) -> str:
    """Text as it stands between tags and in attributes."""
    return html.escape(str(text))


def document(title: str, parts: Iterable[str], style: str = "") -> str:
    """A page around its parts, which are HTML; the title is text."""
    return "\n".join(
        [
            "<!doctype html>",
            '<html lang="en"><head><meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{escape(title)}</title><style>{STYLE}{style}</style></head><body>",
            *parts,
            "</body></html>",
            "",
        ]
    )


def check_page(path: Path, sources: Paths = ()) -> None:
    """Raise UsageError if a page cannot be written, before anything takes long.

    `sources` are what is read, which it must not replace.
    """
    check_file(path, overwrite=True, sources=sources)


def write(text: str, path: Path) -> None:
    """Write a page; the file is whole, or as it was before."""
    with new_file(path, overwrite=True) as file:
        # what is no text in a stranger's name shows as a question mark
        file.write_text(text, encoding="utf-8", errors="replace")


def scroll(content: str, label: str) -> str:
    """A box in which something wide scrolls; it can be reached by keyboard."""
    name = f'role="region" aria-label="{escape(label)}" tabindex="0"'
    return f'<div class="scroll" {name}>{content}</div>'


def number(value: float | int | None) -> str:
    """A number for people; a dash for none."""
    if value is None:
        return "-"
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.4g}" if abs(value) < 10**4 else f"{value:,.0f}"


def size(count: float) -> str:
    """Bytes in the largest unit that leaves a whole number."""
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.4g} {unit}"
        count /= 1024
    return f"{count:.4g} GiB"
