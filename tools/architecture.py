"""Draws the rooms of the package and what imports what, as a Mermaid graph in the documents.

python -m tools.architecture            # writes it into docs/architecture.md
"""

from __future__ import annotations

import ast
import re
from pathlib import Path

import grimp

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "architecture.md"
START, END = "<!-- generated: rooms -->\n", "<!-- end of generated -->"
# rooms whose inner rooms are drawn; the others are one box each
OPEN = ("rewrite", "runtime")
ROOMS = (
    "cli",
    "export",
    "recover",
    "evaluate",
    "onnx",
    "runtime",
    "passes",
    "kernels",
    "mixers",
    "rewrite",
)


def rooms() -> list[str]:
    """The rooms that are drawn, by dotted name without the package's."""
    names = []
    for top in ROOMS:
        folder = ROOT / "reroll" / top
        inner = sorted(d.name for d in folder.iterdir() if (d / "__init__.py").exists())
        names += [f"{top}.{name}" for name in inner] if top in OPEN else [top]
    return names


def says(room: str) -> str:
    """What a room says of itself in the first line of its docstring."""
    source = (ROOT / "reroll" / Path(*room.split(".")) / "__init__.py").read_text("utf-8")
    return (ast.get_docstring(ast.parse(source)) or "").splitlines()[0]


def imports(names: list[str]) -> set[tuple[str, str]]:
    """Which room imports which, without what another edge leads to anyway."""
    graph = grimp.build_graph("reroll", exclude_type_checking_imports=True)
    edges = set()
    for module in graph.modules:
        for other in graph.find_modules_directly_imported_by(module):
            pair = room_of(module, names), room_of(other, names)
            if None not in pair and pair[0] != pair[1]:
                edges.add(pair)
    found: set[tuple[str, str]] = {(str(a), str(b)) for a, b in edges}
    return {(a, b) for a, b in found if (b, a) in found or not _reaches(a, b, found - {(a, b)})}


def room_of(module: str, names: list[str]) -> str | None:
    """The room that a module is in."""
    inner = f"{module.removeprefix('reroll.')}."
    return next((name for name in names if inner.startswith(f"{name}.")), None)


def _reaches(start: str, end: str, edges: set[tuple[str, str]]) -> bool:
    stack, seen = [start], set()
    while stack:
        node = stack.pop()
        if node == end:
            return True
        if node not in seen:
            seen.add(node)
            stack += [b for a, b in edges if a == node]
    return False


def drawn() -> str:
    """The graph and the table of rooms, as Markdown."""
    names = rooms()
    lines = ["```mermaid", "flowchart TD"]
    for top in ROOMS:
        own = [n for n in names if n.split(".")[0] == top]
        if top in OPEN:
            lines += [f"  subgraph {top}"]
            lines += [f"    {n.replace('.', '_')}[{n.split('.')[1]}]" for n in own]
            lines += ["  end"]
        else:
            lines.append(f"  {top}")
    for a, b in sorted(imports(names)):
        lines.append(f"  {a.replace('.', '_')} --> {b.replace('.', '_')}")
    lines += ["```", "", "| room | what is in it |", "| --- | --- |"]
    lines += [f"| `reroll/{n.replace('.', '/')}` | {says(n)} |" for n in names]
    return "\n".join(lines) + "\n"


def page() -> str:
    """The page with the graph as the tree is now."""
    text = PAGE.read_text("utf-8")
    return re.sub(
        f"{re.escape(START)}.*?{re.escape(END)}",
        lambda _: f"{START}\n{drawn()}\n{END}",
        text,
        flags=re.DOTALL,
    )


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
