"""Find what a model computes for inputs that a caller leaves out, by tracing it without them.

The captured graph has every input as a placeholder. A second trace leaves some of them out, and has
the values that the model computes instead. Both graphs are walked in parallel, from an attention
backwards: where one has the placeholder, the other has the default. The second trace ends at the
first attention that depends on all of these inputs, so it is cheap.
"""

from __future__ import annotations

import logging
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, fx

from reroll.errors import RerollError
from reroll.rewrite.capture.signature import Example
from reroll.rewrite.capture.tracing import Halt
from reroll.rewrite.ir.defaults import evaluate, extract, fitted, numbers
from reroll.rewrite.ir.matching import argument
from reroll.rewrite.ir.ops import ATTENTION, CACHE
from reroll.rewrite.ir.program import Program, ancestors
from reroll.rewrite.ir.records import Input
from reroll.rewrite.ir.shapes import concrete

log = logging.getLogger(__name__)

_ANCHORS = {ATTENTION: ("q", "k", "bias"), CACHE: ("k", "v")}


@dataclass(frozen=True)
class TracedGraph:
    """Flat graph with the names of its outputs and the values of its constants."""

    graph: fx.Graph
    outputs: tuple[str, ...]
    constants: Mapping[str, Tensor]

    def returned(self) -> dict[str, Any]:
        """Return the graph's outputs by name."""
        values: Any = self.graph.output_node().args[0]
        return dict(zip(self.outputs, values, strict=True))


# traces with these inputs alone, up to an attention if a Halt is given
Trace = Callable[[Sequence[Example], Halt | None], TracedGraph]


def with_defaults(
    program: Program,
    examples: Sequence[Example],
    stateful: bool,
    constants: Mapping[str, Tensor],
    trace: Trace,
) -> Program:
    """Give each input the graph of its default, where its role does not imply it."""
    whole = TracedGraph(program.graph, program.outputs, constants)
    counted = {e.name for e in examples if e.role in ("positions", "offsets", "zeros")}
    hidden = {e.name for e in examples if e.role == "padding"}
    shifted = {e.name for e in examples if e.name == "decoder_input_ids"}
    defaults: dict[str, fx.Graph] = {}
    # positions may depend on the padding mask, so they are first left out alone
    plans = [(counted, counted), (hidden | shifted, counted | hidden | shifted)]
    for wanted, left_out in plans:
        used = {str(n.target) for n in program.graph.nodes if n.op == "placeholder" and n.users}
        if not wanted & used:
            continue
        halt, anchors = _anchors(whole, left_out & used)
        kept = [e for e in examples if e.name not in left_out]
        try:
            without = trace(kept, halt)
        except RerollError as error:
            log.debug("not traced without %s: %s", ", ".join(sorted(left_out)), error)
            continue
        search = _Search(program, whole, without, left_out)
        search.walk(anchors, without.returned())
        for name in wanted & used:
            graph = search.default_of(name, stateful and not hidden & left_out)
            if graph is not None:
                defaults[name] = graph
    inputs = tuple(replace(i, default=defaults.get(i.name)) for i in program.inputs)
    return replace(program, inputs=inputs)


def _anchors(whole: TracedGraph, left_out: set[str]) -> tuple[Halt | None, dict[str, Any]]:
    """Find where a trace may end, and the corresponding values of the whole graph.

    It ends at the first attention, or update of a cache, by which all inputs in `left_out` have
    been read. If there is none, the trace is complete and the values are the outputs.
    """
    nodes = list(whole.graph.nodes)
    op = ATTENTION if any(n.target is ATTENTION for n in nodes) else CACHE
    read: set[str] = set()
    for number, node in enumerate((n for n in nodes if n.target is op), 1):
        anchors = {name: argument(node, name) for name in _ANCHORS[op]}
        anchors = {name: value for name, value in anchors.items() if value is not None}
        read |= {str(n.target) for n in ancestors(anchors.values()) if n.op == "placeholder"}
        if left_out <= read:
            return Halt(number), anchors
    return None, whole.returned()


@dataclass
class _Search:
    """Parallel walk over the graph of a capture and one without some inputs."""

    program: Program
    whole: TracedGraph
    without: TracedGraph
    left_out: set[str]
    counterparts: dict[str, list[Any]] = field(default_factory=dict)
    differ: list[tuple[fx.Node, Any]] = field(default_factory=list)

    def walk(self, whole: Mapping[str, Any], without: Mapping[str, Any]) -> None:
        """Pair the values of two graphs by name, and then all values that they depend on."""
        stack = [(value, without.get(name)) for name, value in whole.items()]
        visited: set[tuple[Any, Any]] = set()
        while stack:
            pair = tuple(map(_uncached, stack.pop()))
            if pair in visited or not isinstance(pair[0], fx.Node):
                continue
            visited.add(pair)
            a, b = pair
            if a.op == "placeholder" and str(a.target) in self.left_out:
                self.counterparts.setdefault(str(a.target), []).append(b)
                continue
            inner = _operands(a, b)
            if inner is None:
                self.differ.append((a, b))
            else:
                stack += inner

    def default_of(self, name: str, with_past: bool) -> fx.Graph | None:
        """Return the graph of an input's default; None if its role implies it or it is unknown."""
        item = next(i for i in self.program.inputs if i.name == name)
        nodes = [
            n for n in dict.fromkeys(self.counterparts.get(name, ())) if isinstance(n, fx.Node)
        ]
        special = [n for n in nodes if not self._is_plain(item, n, with_past)]
        if not special:
            self._tell_unknown(item, bool(nodes), with_past)
            return None
        order = [i.name for i in self.program.inputs]
        graph = extract(special[0], order)
        before = order[: order.index(name)]
        places = [str(n.target) for n in graph.nodes if n.op == "placeholder"]
        if any(n.op == "get_attr" for n in graph.nodes) or not set(places) <= set(before):
            log.info("the default of %s is more than a function of inputs before it", name)
            return None
        return graph

    def _is_plain(self, item: Input, node: fx.Node, with_past: bool) -> bool:
        """Whether a default equals what the input's role implies, tested on sample inputs."""
        if item.role == "data":
            return False
        for values in self._trials(numbers(node.graph), with_past):
            plain = _plain(item, values)
            try:
                value = fitted(item, evaluate(node, values, self.without.constants), len(plain))
            except Exception as error:
                log.debug("the default of %s does not run: %s", item.name, error)
                return False
            if value.shape != plain.shape or not bool((value == plain).all()):
                return False
        return True

    def _tell_unknown(self, item: Input, known: bool, with_past: bool) -> None:
        """Log that an input's default is unknown if the graphs differ where they depend on it."""
        if known or item.role == "padding":
            return
        for a, b in self.differ:
            names = {str(n.target) for n in ancestors([a]) if n.op == "placeholder"}
            if item.name in names and not self._agree(a, b, with_past):
                log.info("%s: it is not known what the model does without it", item.name)
                return

    def _agree(self, a: fx.Node, b: Any, with_past: bool) -> bool:
        """Whether two values are equal if all inputs left out are what their roles imply."""
        if not isinstance(b, fx.Node):
            return False
        for values in self._trials(numbers(b.graph), with_past):
            all_values = dict(values)
            for item in self.program.inputs:
                if item.name in self.left_out:
                    all_values[item.name] = _plain(item, values)
            try:
                expected = evaluate(b, values, self.without.constants)
                actual = evaluate(a, all_values, self.whole.constants)
                if not bool((expected == actual).all()):
                    return False
            except Exception:
                return False
        return True

    def _trials(self, special: set[int], with_past: bool) -> Iterator[dict[str, Tensor]]:
        """Yield sample values for the inputs not left out, with several lengths, masks and ids."""
        generator = torch.Generator().manual_seed(0)
        ids = torch.tensor(sorted({*range(40)} | {n for n in special if 0 <= n < 2**20}))
        for length, past in ((7, 4 if with_past else 0), (6, 0)):
            sizes = {"b": 4, "s": length, "t": length + past, "e": 9, "l": 160}
            values = {}
            for item in self.program.inputs:
                if item.name in self.left_out:
                    continue
                shape = [concrete(dim, sizes) for dim in item.type.shape]
                if item.type.dtype.is_floating_point:
                    values[item.name] = torch.randn(shape, generator=generator)
                elif item.role == "padding":
                    values[item.name] = _masks(*shape).to(item.type.dtype)
                else:
                    at = torch.randint(0, len(ids), shape, generator=generator)
                    values[item.name] = ids[at].to(item.type.dtype)
            yield values


def _uncached(value: Any) -> Any:
    """Replace an output of a cache by the corresponding input; return other values unchanged."""
    if isinstance(value, fx.Node) and value.target is operator.getitem:
        source, number = value.args
        if isinstance(source, fx.Node) and source.target is CACHE:
            return source.args[number]  # type: ignore[index]
    return value


def _operands(a: fx.Node, b: Any) -> list[tuple[Any, Any]] | None:
    """Pair the arguments of two nodes; None if their ops or constants differ."""
    if not isinstance(b, fx.Node) or a.op != b.op or a.target != b.target:
        return None
    if a.op != "call_function":
        return []
    pairs: list[tuple[Any, Any]] = []
    stack: list[tuple[Any, Any]] = [(a.args, b.args), (a.kwargs, b.kwargs)]
    while stack:
        x, y = stack.pop()
        if _is_size(x) and _is_size(y):
            continue
        if isinstance(x, Mapping) and isinstance(y, Mapping) and x.keys() == y.keys():
            stack += [(x[key], y[key]) for key in x]
        elif isinstance(x, tuple | list) and isinstance(y, tuple | list) and len(x) == len(y):
            stack += zip(x, y, strict=True)
        elif isinstance(x, fx.Node):
            pairs.append((x, y))
        elif isinstance(y, fx.Node) or x != y:
            return None
    return pairs


def _is_size(value: Any) -> bool:
    """Whether a value is a size; sizes are not compared, because equal ones may look different."""
    if isinstance(value, fx.Node):
        return value.op == "call_function" and value.meta.get("type") is None
    return isinstance(value, int) and not isinstance(value, bool)


def _plain(item: Input, values: Mapping[str, Tensor]) -> Tensor:
    """Return the value that an input's role implies, given the other inputs."""
    decoder = item.name.startswith("decoder_")
    pairs = [(n, t) for n, t in values.items() if n.startswith("decoder_") == decoder]
    tokens = next(t for n, t in pairs if "mask" not in n)
    mask = next((t for n, t in pairs if "mask" in n), tokens)
    batch, length = tokens.shape[:2]
    if item.counts:
        past = mask.shape[1] - length
        return torch.arange(past, past + length).expand(batch, -1)
    if item.role == "padding":
        return torch.ones(batch, length)
    return torch.zeros(batch, length)


def _masks(rows: int, length: int) -> Tensor:
    """Return masks with no padding, with left, with right, and with padding in the middle."""
    at = torch.arange(length)
    kinds = [at >= 0, at >= 2, at < length - 3, at != length // 2]
    return torch.stack([kinds[row % 4] for row in range(rows)])
