"""Lazy weights: the public names of the weight system, and the evaluation of a table."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from torch import Tensor

from reroll.errors import ProgramError
from reroll.rewrite.ir.weights.builders import (
    add,
    cast,
    centre,
    concat,
    copy,
    full,
    identity,
    matvec,
    mean,
    mul,
    normal,
    offset,
    reshape,
    scale,
    slice_,
    sub,
    svd_down,
    svd_up,
    transpose,
    zeros,
)
from reroll.rewrite.ir.weights.evaluation import Output, evaluate_outputs
from reroll.rewrite.ir.weights.expressions import (
    Apply,
    Expr,
    Meta,
    Source,
    TensorSource,
    build,
    meta_of,
)
from reroll.rewrite.ir.weights.functions import elementwise
from reroll.rewrite.ir.weights.json_form import (
    expr_from_json,
    expr_to_json,
    table_from_json,
    table_to_json,
)
from reroll.rewrite.ir.weights.registry import weight_function
from reroll.rewrite.ir.weights.stacked import Weight, WeightTable
from reroll.rewrite.ir.weights.text import expr_to_text, table_to_text
from reroll.rewrite.ir.weights.text_parser import expr_from_text, table_from_text

__all__ = [
    "Apply",
    "Expr",
    "Meta",
    "Source",
    "TensorSource",
    "Weight",
    "WeightTable",
    "add",
    "build",
    "cast",
    "centre",
    "concat",
    "copy",
    "elementwise",
    "evaluate",
    "expr_from_json",
    "expr_from_text",
    "expr_to_json",
    "expr_to_text",
    "full",
    "identity",
    "matvec",
    "mean",
    "meta_of",
    "mul",
    "normal",
    "offset",
    "reshape",
    "scale",
    "slice_",
    "sub",
    "svd_down",
    "svd_up",
    "table_from_json",
    "table_from_text",
    "table_to_json",
    "table_to_text",
    "transpose",
    "weight_function",
    "zeros",
]


def evaluate(
    table: WeightTable,
    source: TensorSource,
    names: Iterable[str] | None = None,
    observe: Callable[[int], None] | None = None,
) -> Iterator[tuple[str, int, Tensor]]:
    """Compute the weights, or those in ``names``; yield each (name, entry, tensor) once.

    The order is not the table's order: it keeps few tensors in memory. An expression under two
    names is computed once and yielded for each, as separate tensors that do not share memory.
    ``observe`` is called during the computation with the bytes of all tensors in memory. Raises
    CheckpointError if a source tensor is missing or has another shape, and ProgramError for an
    unknown name.
    """
    wanted = set(table) if names is None else set(names)
    unknown = sorted(wanted - set(table))
    if unknown:
        raise ProgramError(f"no weight is called {unknown[0]!r}")
    outputs = [
        Output(name, entry, expr)
        for name, weight in table.items()
        if name in wanted
        for entry, expr in enumerate(weight.entries)
    ]
    return evaluate_outputs(outputs, source, observe)
