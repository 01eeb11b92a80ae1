"""The CausalConvWithState operator, and a function that defines it for runtimes without a kernel.

As with `LinearAttention`, it is `com.microsoft.CausalConvWithState` up to opset 26, with a function
of the same name in the model, and a standard operator from opset 27.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import onnx
import onnx.parser
import torch
from torch import fx

from reroll.export.onnx.graph import TARGET, Value
from reroll.export.onnx.ops.linear_attention import CONTRIB, STANDARD
from reroll.export.onnx.plan.states import CONV
from reroll.rewrite.ir.lowerings import lowering
from reroll.rewrite.ir.matching import shape

if TYPE_CHECKING:
    from reroll.export.onnx.emit.translate import Translator

NAME = "CausalConvWithState"
# what CPU kernels compute in
FLOAT = torch.float32


@lowering(TARGET, "reroll::short_convolution.default")
def short_convolution(g: Translator, node: fx.Node, x: Any, weight: Any, bias: Any = None) -> Value:
    """Convolve [batch, channels, time], after the inputs before them."""
    numbers = g.states.of(g, node)
    is_standard = g.settings.opset >= STANDARD
    if bias is None:
        # the function needs all its inputs
        added = g.number([0.0] * shape(node.args[1])[0], FLOAT)
    else:
        added = g.tensor(bias, FLOAT)
    out, state = g.graph.ops(
        NAME,
        g.tensor(x, FLOAT),
        g.op("Unsqueeze", g.tensor(weight, FLOAT), g.ints(1)),
        added,
        g.cast(g.states.read(g, numbers, CONV), FLOAT),
        hints=("convolved", "state"),
        domain="" if is_standard else CONTRIB,
        activation="none",
    )
    g.states.write(g, numbers, CONV, g.cast(state, g.dtype(node)))
    if not is_standard:
        g.graph.root.functions.setdefault(NAME, ("", definition()))
    return g.cast(out, g.dtype(node))


@lowering(TARGET, "reroll::recent.default")
def recent(g: Translator, node: fx.Node, x: Any, kept: int) -> Value:
    """Put the last inputs before the new ones [batch, channels, time], and keep the last."""
    numbers = g.states.of(g, node)
    whole = g.op("Concat", g.states.read(g, numbers, CONV), g.tensor(x), axis=2)
    last = g.op("Slice", whole, g.ints(-kept), g.ints(2**62), g.ints(2))
    g.states.write(g, numbers, CONV, last)
    return whole


def definition() -> onnx.FunctionProto:
    """Define the operator by ONNX's own operators: a sum over the filter's tokens."""
    return onnx.parser.parse_function(f"""
<domain: "{CONTRIB}", opset_import: ["": 23]>
{NAME} <activation> (input, weight, bias, past_state) => (output, present_state)
{{
    zero = Constant <value_ints = [0]> ()
    one = Constant <value_ints = [1]> ()
    axis = Constant <value_ints = [2]> ()
    end = Constant <value_ints = [4611686018427387904]> ()
    whole = Concat <axis = 2> (past_state, input)
    kept = Shape <start = 2, end = 3> (past_state)
    time = Shape <start = 2, end = 3> (input)
    present_state = Slice(whole, time, end, axis)
    bias_column = Unsqueeze(bias, one)
    nothing = Sub(input, input)
    first = Add(nothing, bias_column)
    taps = Transpose <perm = [2, 0, 1]> (weight)
    output, from = Scan <num_scan_inputs = 1, body = tap (
        float[B, C, T] sum, int64[1] from, float[C, 1] factor
    ) => (float[B, C, T] after, int64[1] next) {{
        stretch = Add(from, time)
        part = Slice(whole, from, stretch, axis)
        product = Mul(part, factor)
        after = Add(sum, product)
        next = Add(from, one)
    }}> (first, zero, taps)
}}""")
