"""Put tables of results, which benchmarks keep as JSON, on the pages of `docs/results`.

    python -m benchmarks.tables

A page has `<!-- table: NAME -->` where the table of `docs/results/data/NAME.json` begins, and
`<!-- end of table -->` behind it. Some files hold more than a table: what is `DERIVED` says how
tables come from them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks import coverage_table, killed
from benchmarks.harness import markdown

PAGES = Path("docs/results")
TABLE = re.compile(r"(<!-- table: (\S+) -->\n).*?(<!-- end of table -->)", re.DOTALL)

# tables that are computed from what another file holds
DERIVED: dict[str, tuple[str, Callable[[Any], list[str]]]] = {
    f"coverage-causal-{part}": ("coverage", table)
    for part, table in coverage_table.tables("causal").items()
} | {"core-killed": ("killed", killed.summary)}


def rendered(name: str, folder: Path = PAGES / "data") -> str:
    """The Markdown table of a file of results."""
    file, derive = DERIVED.get(name, (name, _table))
    content = json.loads((folder / f"{file}.json").read_text(encoding="utf-8"))
    return "\n".join(derive(content)) + "\n"


def _table(content: Any) -> list[str]:
    return markdown(content["columns"], content["rows"])


def updated(text: str) -> str:
    """A page with its tables as the files have them."""
    return TABLE.sub(lambda match: f"{match[1]}\n{rendered(match[2])}\n{match[3]}", text)


def main() -> None:
    """Write every page whose tables differ."""
    for page in sorted(PAGES.glob("*.md")):
        text = page.read_text(encoding="utf-8")
        if (new := updated(text)) != text:
            page.write_text(new, encoding="utf-8")
            print(f"{page} has new tables")


if __name__ == "__main__":
    main()
