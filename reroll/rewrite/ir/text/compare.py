"""Compare two Programs for equality, and format their differences.

Only what runs is compared: graphs up to the names of their nodes, bodies, inputs, outputs, dtype
and weights. Types of nodes follow from these. The origin is not compared.
"""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import zip_longest
from typing import Any

from torch import fx

from reroll.rewrite.ir.program import Program
from reroll.rewrite.ir.text.literals import Namer, bare, node_name, type_to_text, value_to_text
from reroll.rewrite.ir.text.printer import node_to_text
from reroll.rewrite.ir.verify import MAIN
from reroll.rewrite.ir.weights import Weight
from reroll.rewrite.ir.weights.ranges import indices_to_text


def same(a: Program, b: Program) -> bool:
    """Whether two Programs compute the same thing in the same steps."""
    return canonical(a) == canonical(b)


def fingerprint(program: Program) -> str:
    """Hash what `same` compares; equal in every process, 64 hexadecimal digits."""
    return hashlib.sha256("\n".join(canonical(program)).encode()).hexdigest()


def canonical(program: Program) -> list[str]:
    """Return what `same` compares, as lines."""
    lines = list(_interface(program))
    for name, graph in sorted(_defaults(program).items()):
        reads = [str(node.target) for node in graph.nodes if node.op == "placeholder"]
        lines += ["", f"{bare(name)} of {', '.join(map(bare, reads))}", *_renumbered(graph)]
    for name, graph in sorted(program.graphs()):
        period = "" if name == MAIN else f" period={program.bodies[name].period}"
        lines += ["", f"{bare(name)}{period}", *_renumbered(graph)]
    return [*lines, "", *(_weight(n, w) for n, w in sorted(program.weights.items()))]


def diff(a: Program, b: Program, context: int = 3) -> str:
    """Format the changes from `a` to `b` like `diff -u`, graph by graph; "" if there are none."""
    parts = list(_unified("program", list(_interface(a)), list(_interface(b)), context))
    graphs_a, graphs_b = ({**_defaults(p), **dict(p.graphs())} for p in (a, b))
    for name in dict.fromkeys((*graphs_a, *graphs_b)):
        before, after = graphs_a.get(name, fx.Graph()), graphs_b.get(name, fx.Graph())
        parts += _unified(name, *_aligned(before, after), context)
    parts += _weight_changes(a.weights, b.weights)
    texts_a, texts_b = ([s.text for s in p.origin.steps] for p in (a, b))
    parts += _unified("steps", texts_a, texts_b, context)
    return "\n".join(parts) + "\n" if parts else ""


def _interface(program: Program) -> Iterator[str]:
    yield f"dtype {value_to_text(program.dtype)}"
    for item in program.inputs:
        yield f"input {bare(item.name)} : {type_to_text(item.type)} role={bare(item.role)}"
    yield from (f"output {bare(name)}" for name in program.outputs)
    for name, body in sorted(program.bodies.items()):
        yield f"body {bare(name)} period={body.period}"


def _defaults(program: Program) -> dict[str, fx.Graph]:
    """Return the graphs of the inputs' defaults."""
    return {f"default {i.name}": i.default for i in program.inputs if i.default is not None}


# ---- graphs


def _renumbered(graph: fx.Graph) -> list[str]:
    """Format a graph with its nodes numbered in order; nodes of weights are not numbered."""
    nodes = [node for node in graph.nodes if node.op != "get_attr"]
    number = {node: i for i, node in enumerate(nodes)}
    return _lines(nodes, lambda n: f"%{number[n]}" if n in number else node_name(n))


def _lines(nodes: list[fx.Node], name: Namer) -> list[str]:
    return [
        f"{name(node)} = input" if node.op == "placeholder" else node_to_text(node, name)
        for node in nodes
    ]


def _aligned(before: fx.Graph, after: fx.Graph) -> tuple[list[str], list[str]]:
    """Format two graphs so that corresponding nodes have the same name.

    Nodes correspond if their lines match without the names of nodes. Between those, runs of equal
    length correspond node by node, and other nodes by their ops.
    """
    old = [node for node in before.nodes if node.op != "get_attr"]
    new = [node for node in after.nodes if node.op != "get_attr"]
    names: dict[fx.Node, str] = {node: node_name(node) for node in old}
    names.update((y, names[x]) for x, y in _pairs(old, new))
    used = set(names.values())
    for node in new:
        if node not in names:
            names[node] = _fresh(node_name(node), used)
            used.add(names[node])
    namer: Namer = lambda node: names.get(node) or node_name(node)  # noqa: E731
    return _lines(old, namer), _lines(new, namer)


def _pairs(old: list[fx.Node], new: list[fx.Node]) -> Iterator[tuple[fx.Node, fx.Node]]:
    """Yield pairs of corresponding nodes."""
    for tag, x, y in _blocks(old, new, _lines(old, _anonymous), _lines(new, _anonymous)):
        if tag == "equal" or len(x) == len(y):
            yield from zip(x, y, strict=True)
            continue
        # between corresponding nodes, calls of the same op correspond, with other arguments
        for inner, u, v in _blocks(x, y, [n.target for n in x], [n.target for n in y]):
            if inner == "equal":
                yield from zip(u, v, strict=True)


def _blocks(
    old: list[fx.Node], new: list[fx.Node], keys_old: Sequence[Any], keys_new: Sequence[Any]
) -> Iterator[tuple[str, list[fx.Node], list[fx.Node]]]:
    matcher = difflib.SequenceMatcher(None, keys_old, keys_new, autojunk=False)
    for tag, i, i_end, j, j_end in matcher.get_opcodes():
        yield tag, old[i:i_end], new[j:j_end]


def _anonymous(node: fx.Node) -> str:
    return node_name(node) if node.op == "get_attr" else "%"


def _fresh(name: str, used: set[str]) -> str:
    while name in used:
        name += "'"
    return name


def _unified(title: str, before: list[str], after: list[str], context: int) -> Iterator[str]:
    lines = difflib.unified_diff(before, after, n=context, lineterm="")
    for i, line in enumerate(lines):
        # the first two lines name the files; the title replaces them
        if i == 0:
            yield f"--- {title}"
        elif i > 1:
            yield line


# ---- weights


def _weight(name: str, weight: Weight) -> str:
    """Format a weight as one line that is equal if and only if the weight is."""
    entries = [entry.digest.hex() for entry in weight.entries]
    return json.dumps([name, str(weight.meta), entries, weight.index, weight.trainable])


_ASPECTS: Mapping[str, Callable[[Weight], str]] = {
    "shape": lambda weight: str(weight.meta),
    "entries": lambda weight: str(len(weight.entries)),
    "trips": lambda weight: f"[{indices_to_text(weight.index or ())}]",
    "trainable": lambda weight: str(weight.trainable).lower(),
}


def _weight_changes(before: Mapping[str, Weight], after: Mapping[str, Weight]) -> Iterator[str]:
    lines = []
    for name in dict.fromkeys((*before, *after)):
        old, new = before.get(name), after.get(name)
        if old == new:
            continue
        if old is None or new is None:
            sign, weight = ("-", old) if new is None else ("+", new)
            assert weight is not None
            lines.append(f"{sign}@{bare(name)} : {weight.meta} x {len(weight.entries)}")
            continue
        changes = [
            f"{aspect} {text(old)} -> {text(new)}"
            for aspect, text in _ASPECTS.items()
            if text(old) != text(new)
        ]
        pairs = zip_longest(old.entries, new.entries)
        values = sum(x is not None and y is not None and x != y for x, y in pairs)
        if values:
            changes.append(f"{values} of {len(new.entries)} computed otherwise")
        lines.append(f"!@{bare(name)} : {', '.join(changes)}")
    if lines:
        yield "--- weights"
        yield from lines
