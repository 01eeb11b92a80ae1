"""Make tables of what commands found, and format the numbers in them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich import box
from rich.table import Table

from reroll.evaluate import pages

# what a command found, as JSON data
Found = Mapping[str, Any]


def new_table(*columns: str, title: str | None = None) -> Table:
    """Create a table whose columns are right-aligned where the name starts with `>`."""
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for column in columns:
        right = column.startswith(">")
        table.add_column(column.removeprefix(">"), justify="right" if right else "left")
    return table


def format_number(value: Any) -> str:
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


def format_size(count: int | None) -> str:
    """Format bytes in the largest unit in which they are 1 or more; None is a dash."""
    return "-" if count is None else pages.size(count)
