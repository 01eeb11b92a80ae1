"""Evaluate weight expressions with few tensors in memory at any time.

Outputs that share an intermediate are computed one after the other, by a flat list of steps. Every
intermediate is computed once and dropped after its last use. A checkpoint tensor is cheap to read
again, so it is kept only while this output or the next one needs it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from reroll.errors import CheckpointError
from reroll.rewrite.ir.weights.expressions import (
    Apply,
    Expr,
    Source,
    TensorSource,
    children,
    meta_of,
    walk,
)
from reroll.rewrite.ir.weights.registry import FUNCTIONS


class Output(NamedTuple):
    """Stored tensor to compute."""

    name: str
    entry: int
    expr: Expr


@dataclass(frozen=True)
class EvaluationStep:
    """Step: ``compute`` a node, add one argument to a running ``sum``, or ``emit`` a tensor."""

    action: Literal["compute", "sum", "emit"]
    expr: Expr
    reads: tuple[Expr, ...]
    output: int


def evaluate_outputs(
    outputs: Sequence[Output],
    source: TensorSource,
    observe: Callable[[int], None] | None = None,
) -> Iterator[tuple[str, int, Tensor]]:
    """Yield (name, entry, tensor) of every output; no two tensors share memory.

    See `reroll.rewrite.ir.weights.evaluate`.
    """
    groups = _grouped(outputs)
    steps = _schedule(list(groups))
    drops = _last_uses(steps)
    live: dict[Expr, Tensor] = {}
    sums: dict[Expr, Tensor] = {}

    def read(expr: Expr) -> Tensor:
        if expr not in live:
            assert isinstance(expr, Source)
            live[expr] = _load(expr, source)
        return live[expr]

    for step, dropped in zip(steps, drops, strict=True):
        if step.action == "sum":
            _accumulate(sums, step.expr, read(step.reads[0]))
        elif step.action == "compute":
            assert isinstance(step.expr, Apply)
            if step.expr in sums:
                live[step.expr] = _finish_sum(step.expr, sums.pop(step.expr))
            else:
                live[step.expr] = _compute(step.expr, [read(e) for e in step.reads])
        else:
            read(step.expr)
        if observe is not None:
            observe(sum(t.nbytes for held in (live, sums) for t in held.values()))
        if step.action == "emit":
            *others, last = groups[step.expr]
            for output in others:
                yield output.name, output.entry, live[step.expr].clone()
            # a tensor that a later step reads is cloned, because the caller may write to it
            tensor = live[step.expr] if step.expr in dropped else live[step.expr].clone()
            yield last.name, last.entry, tensor
        for expr in dropped:
            live.pop(expr, None)


# ---- planning


def in_order(outputs: Sequence[Output]) -> list[Output]:
    """Sort outputs in the order in which `evaluate_outputs` yields them."""
    return [output for group in _grouped(outputs).values() for output in group]


def _grouped(outputs: Sequence[Output]) -> dict[Expr, list[Output]]:
    """Group outputs by expression; groups that share an intermediate or a source are adjacent."""
    groups: dict[Expr, list[Output]] = {}
    for output in outputs:
        groups.setdefault(output.expr, []).append(output)
    nodes = list(walk(groups))
    uses = Counter(child for node in nodes for child in children(node))
    uses.update(groups.keys())
    component = _components(nodes)
    # dicts keep the order in which components, and links within them, first occur
    ordered: dict[Expr, dict[Expr, list[Expr]]] = {}
    for root in groups:
        links = ordered.setdefault(component[root], {})
        links.setdefault(_link(root, uses), []).append(root)
    return {
        root: groups[root]
        for links in ordered.values()
        for roots in links.values()
        for root in roots
    }


def _components(nodes: Sequence[Expr]) -> dict[Expr, Expr]:
    """Map each node to a representative of its connected component (union-find)."""
    parent = {node: node for node in nodes}

    def find(node: Expr) -> Expr:
        while parent[node] is not node:
            parent[node] = parent[parent[node]]
            node = parent[node]
        return node

    for node in nodes:
        for child in children(node):
            parent[find(child)] = find(node)
    return {node: find(node) for node in nodes}


def _link(root: Expr, uses: Counter[Expr]) -> Expr:
    """Return the outermost shared intermediate of an output, else its first shared source."""
    shared_source = None
    stack = [root]
    while stack:
        expr = stack.pop()
        if isinstance(expr, Apply) and uses[expr] > 1:
            return expr
        if isinstance(expr, Source) and uses[expr] > 1 and shared_source is None:
            shared_source = expr
        stack.extend(reversed(children(expr)))
    return shared_source or root


def _schedule(roots: Sequence[Expr]) -> list[EvaluationStep]:
    """Plan the steps that compute and emit the roots in order, each intermediate once."""
    steps: list[EvaluationStep] = []
    done: set[Expr] = set()
    for number, root in enumerate(roots):
        # (node, how many of its arguments are ready)
        stack = [(root, 0)]
        while stack:
            expr, ready = stack.pop()
            if not isinstance(expr, Apply) or expr in done:
                continue
            arguments = expr.children
            summed = FUNCTIONS[expr.op].finish_sum is not None
            if summed and ready:
                steps.append(EvaluationStep("sum", expr, (arguments[ready - 1],), number))
            if ready < len(arguments):
                stack += [(expr, ready + 1), (arguments[ready], 0)]
            else:
                steps.append(EvaluationStep("compute", expr, () if summed else arguments, number))
                done.add(expr)
        steps.append(EvaluationStep("emit", root, (root,), number))
    return steps


def _last_uses(steps: Sequence[EvaluationStep]) -> list[list[Expr]]:
    """Return, for each step, the expressions to drop after it."""
    next_use: dict[Expr, int] = {}
    drops: list[list[Expr]] = []
    for step in reversed(steps):
        dropped = []
        for expr in set(step.reads):
            later = next_use.get(expr)
            far = isinstance(expr, Source) and later is not None and later > step.output + 1
            if later is None or far:
                dropped.append(expr)
            next_use[expr] = step.output
        drops.append(dropped)
    return drops[::-1]


# ---- arithmetic


def _load(expr: Source, source: TensorSource) -> Tensor:
    tensor = source.load(expr.name)
    if tuple(tensor.shape) != expr.meta.shape:
        raise CheckpointError(
            f"the tensor is {meta_of(tensor)}, but the program was made for {expr.meta}",
            where=expr.name,
            hint="use the checkpoint that the program was captured from",
        )
    both_float = tensor.dtype.is_floating_point and expr.meta.dtype.is_floating_point
    if tensor.dtype != expr.meta.dtype and not both_float:
        raise CheckpointError(
            f"the tensor has dtype {tensor.dtype}, but the program was made for {expr.meta}",
            where=expr.name,
        )
    return tensor.to(expr.meta.dtype)


def _work_dtype(expr: Expr) -> torch.dtype:
    wide = any(e.meta.dtype == torch.float64 for e in (expr, *children(expr)))
    return torch.float64 if wide else torch.float32


def _compute(expr: Apply, tensors: list[Tensor]) -> Tensor:
    function = FUNCTIONS[expr.op]
    if function.arithmetic:
        tensors = [t.to(_work_dtype(expr)) for t in tensors]
    inputs = iter(tensors)
    args = [next(inputs) if isinstance(a, Expr) else a for a in expr.args]
    with torch.no_grad():
        result = function.compute(*args).to(expr.meta.dtype)
    assert tuple(result.shape) == expr.meta.shape, f"{expr.op} gave {meta_of(result)}"
    # a function may return its argument or a view of it, which other outputs may share
    storages = {t.untyped_storage().data_ptr() for t in tensors}
    return result.clone() if result.untyped_storage().data_ptr() in storages else result


def _accumulate(sums: dict[Expr, Tensor], expr: Expr, tensor: Tensor) -> None:
    with torch.no_grad():
        if expr in sums:
            sums[expr] += tensor
        else:
            sums[expr] = tensor.to(_work_dtype(expr), copy=True)


def _finish_sum(expr: Apply, total: Tensor) -> Tensor:
    finish = FUNCTIONS[expr.op].finish_sum
    assert finish is not None
    with torch.no_grad():
        return finish(total, len(expr.children)).to(expr.meta.dtype)
