"""Lower a mixture of experts: each group of rows times the matrix of its own expert.

A Loop runs over the experts that have rows, so that a token costs only the matrices of its own
experts. In every run, the matrix of each expert with rows is copied out of the stack once. Apart
from the result, this needs the memory of one matrix.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from onnx import helper
from torch import fx

from reroll.errors import ExportError
from reroll.export.onnx.graph import ELEMENT, TARGET, Graph, Value
from reroll.export.onnx.ops.arguments import Parameter
from reroll.rewrite.ir.lowerings import lowering
from reroll.rewrite.ir.matching import shape

if TYPE_CHECKING:
    from reroll.export.onnx.emit.translate import Translator

BOOL, INT = torch.bool, torch.int64


@lowering(TARGET, "transformers::grouped_mm_fallback.default", "aten::_grouped_mm.default")
def grouped_mm(
    g: Translator,
    node: fx.Node,
    rows: Any,
    weight: Any,
    ends: Any = None,
    *,
    offs: Any = None,
    bias: Any = None,
    out_dtype: Any = None,
) -> Value:
    """Multiply rows [n, inputs], sorted by expert, by weight [experts, inputs, outputs].

    Expert i has the rows from `ends[i - 1]` to before `ends[i]`; rows after the last end are zero.
    """
    dtype, outputs = g.dtype(node), shape(node)[-1]
    ends = offs if ends is None else ends
    if ends is None or bias is not None or len(shape(node)) != 2:
        raise ExportError(
            "only [rows, inputs] by [experts, inputs, outputs] in groups, without a bias, has a "
            "lowering to ONNX",
            hint="add the bias afterwards, or use matmul for groups of equal size",
        )
    rows, ends = g.tensor(rows, dtype), g.tensor(ends, INT)
    first = g.op("Slice", ends, g.ints(0), g.ints(-1), g.ints(0))
    starts = g.op("Concat", g.ints(0), first, axis=0)
    busy = g.op("NonZero", g.op("Less", starts, ends, dtype=BOOL), dtype=INT)
    busy = g.op("Squeeze", busy, g.ints(0))
    # rows of no expert, which exist only if experts are distributed over processes
    last = g.op("Slice", ends, g.ints(-1), g.ints(2**62), g.ints(0))
    count = g.op("Sub", g.op("Shape", rows, start=0, end=1, dtype=INT), last)
    size = g.op("Concat", count, g.ints(outputs), axis=0)
    rest = g.op("Expand", g.number(0.0, dtype), size)
    products = _products(g, rows, weight, busy, (starts, ends), rest)
    return g.op("ConcatFromSequence", products, axis=0, dtype=dtype)


def _products(
    g: Translator, rows: Value, weight: Any, busy: Value, bounds: tuple[Value, Value], rest: Value
) -> Value:
    """Return a sequence of tensors: the products of the experts that have rows, then `rest`."""
    outer = g.graph
    count = g.op("Squeeze", g.op("Shape", busy, dtype=INT), g.ints(0))
    start = g.op("SequenceConstruct", rest)
    body = g.graph = Graph(outer)
    number = body.input(outer.fresh("number"), INT, ())
    condition = body.input(outer.fresh("condition"), BOOL, ())
    before = Value(outer.fresh("products"), rows.dtype, body)
    body.inputs.append(_sequence(before))
    expert = g.op("Gather", busy, number, axis=0)
    ends = [g.op("Unsqueeze", g.op("Gather", v, expert, axis=0), g.ints(0)) for v in bounds]
    matrix = g.cast(_matrix(g, weight, expert), rows.dtype)
    product = g.op("MatMul", g.op("Slice", rows, *ends, g.ints(0)), matrix)
    after = g.op("SequenceInsert", before, product, g.number(-1, INT))
    body.output(condition, outer.fresh("go_on"), ())
    body.outputs.append(_sequence(after))
    g.graph = outer
    made = Value(outer.fresh("products"), rows.dtype, outer)
    name = outer.fresh("experts")
    inputs = [count.name, g.number(True, BOOL).name, start.name]
    graph = body.finish(f"{name}.body")
    outer.nodes.append(helper.make_node("Loop", inputs, [made.name], name=name, body=graph))
    return made


def _sequence(value: Value) -> Any:
    """Return the type of a sequence of tensors."""
    return helper.make_tensor_sequence_value_info(value.name, ELEMENT[value.dtype], None)


def _matrix(g: Translator, weight: Any, expert: Value) -> Value:
    """Return the matrix [inputs, outputs] of one expert."""
    if isinstance(weight, Parameter):
        return weight.slice(expert)
    return g.op("Gather", g.tensor(weight), expert, axis=0)
