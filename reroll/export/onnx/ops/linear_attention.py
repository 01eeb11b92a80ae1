"""The LinearAttention operator, and a function that defines it for runtimes without a kernel.

Up to opset 26 it is `com.microsoft.LinearAttention`. The model carries a function of the same name.
A runtime with a kernel uses that; any other runs the function, token by token. From opset 27 it is
a standard operator.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import onnx
import onnx.parser
import torch
from torch import fx

from reroll.errors import ExportError
from reroll.export.onnx.graph import Value

if TYPE_CHECKING:
    from reroll.export.onnx.emit.translate import Translator
    from reroll.export.onnx.ops.recurrence import Tokens

CONTRIB, NAME = "com.microsoft", "LinearAttention"
# the first opset in which the operator is standard
STANDARD = 27
FLOAT = torch.float32


def linear_attention(
    g: Translator,
    node: fx.Node,
    x: Tokens,
    rule: str,
    decay: Value | None = None,
    beta: Value | None = None,
    part: str = "recurrent_state",
) -> Value:
    """Compute [batch, time, heads * d_v] for tokens, with one part of the node's state.

    `decay` [batch, kv_heads, time] also has d_k at the end if `x.by_channel`; `beta` never does.
    """
    numbers = g.states.of(g, node)
    past = g.states.read(g, numbers, part)
    is_standard = g.settings.opset >= STANDARD
    inputs = [_packed(g, x.q, x.heads * x.d_k), _packed(g, x.k, x.kv_heads * x.d_k)]
    inputs += [_packed(g, x.v, x.kv_heads * x.d_v), past]
    out, state = g.graph.ops(
        NAME,
        *inputs,
        _packed_gate(g, decay, x.kv_heads * x.d_k if x.by_channel else None),
        _packed_gate(g, beta, None),
        hints=("mixed", "state"),
        domain="" if is_standard else CONTRIB,
        q_num_heads=x.heads,
        kv_num_heads=x.kv_heads,
        update_rule=rule,
        scale=x.scale,
    )
    g.states.write(g, numbers, part, state)
    if not is_standard:
        _define(g, rule)
    return out


def _packed(g: Translator, value: Value, width: int) -> Value:
    """Reshape [batch, heads, time, d] to [batch, time, heads * d]."""
    turned = g.op("Transpose", value, perm=[0, 2, 1, 3])
    return g.op("Reshape", turned, g.ints(0, 0, width))


def _packed_gate(g: Translator, gate: Value | None, width: int | None) -> Value | None:
    """Reshape a gate [batch, kv_heads, time] to [batch, time, kv_heads].

    With channels of the key, it becomes [batch, time, kv_heads * d_k].
    """
    if gate is None:
        return None
    if width is not None:
        return _packed(g, gate, width)
    return g.op("Transpose", gate, perm=[0, 2, 1])


def _define(g: Translator, rule: str) -> None:
    """Add the function of an update rule to the model, for all its recurrences.

    Raises ExportError if it has recurrences of two rules.
    """
    functions = g.graph.root.functions
    known, _ = functions.setdefault(NAME, (rule, definition(rule)))
    if known != rule:
        raise ExportError(
            f"recurrences of the rules {known} and {rule} in one model have no common function",
            hint=f"export with --opset {STANDARD}, where the operator is standard",
        )


# steps of a token's update of the state [batch, kv_heads, d_k, d_v]
_FADE = """
    kept = Exp(g)
    kept_column = Unsqueeze(kept, last)
    before = Mul(state, kept_column)"""
_KEEP = "before = Identity(state)"
_DELTA = """
    k_row = Unsqueeze(k, second_last)
    held_row = MatMul(k_row, before)
    held = Squeeze(held_row, second_last)
    changed = Sub(v, held)
    written = Mul(b, changed)"""
_WRITE = "written = Identity(v)"


def definition(rule: str) -> onnx.FunctionProto:
    """Define the operator by ONNX's own operators, token by token, for one update rule.

    S *= exp(decay); S += k (beta (v - k S))^T, or S += k v^T; output = scale q S. Sizes and numbers
    of heads are those of the inputs.
    """
    fades, corrects = "gated" in rule, "delta" in rule
    gates = [("decay", "g")] * fades + [("beta", "b")] * corrects
    scanned = ["queries", "keys", "values", *(f"{long}s" for long, _ in gates)]
    tokens = ["q", "k", "v", *(short for _, short in gates)]
    ready = "".join(_by_token(long, f"{long}s", "kv_shape") for long, _ in gates)
    text = f"""
<domain: "{CONTRIB}", opset_import: ["": 23]>
{NAME} <q_num_heads, kv_num_heads, update_rule, scale>
    (query, key, value, past_state, decay, beta) => (output, present_state)
{{
    last = Constant <value_ints = [-1]> ()
    second_last = Constant <value_ints = [-2]> ()
    factor = Constant <value_float: float = @scale> ()
    kv_heads = Shape <start = 1, end = 2> (past_state)
    d_k = Shape <start = 2, end = 3> (past_state)
    q_width = Shape <start = 2, end = 3> (query)
    heads = Div(q_width, d_k)
    groups = Div(heads, kv_heads)
    batch_time = Shape <start = 0, end = 2> (query)
    q_shape = Concat <axis = 0> (batch_time, kv_heads, groups, last)
    kv_shape = Concat <axis = 0> (batch_time, kv_heads, last)
    out_shape = Concat <axis = 0> (batch_time, last)
    q_parts = Reshape(query, q_shape)
    queries = Transpose <perm = [1, 0, 2, 3, 4]> (q_parts)
    {_by_token("key", "keys", "kv_shape")}
    {_by_token("value", "values", "kv_shape")}
    {ready}
    present_state, read = Scan <num_scan_inputs = {len(tokens)}, body = token (
        float[B, H, K, V] state, float[B, H, G, K] q, {
        ", ".join(
            f"float[B, H, {s}] {t}" for t, s in zip(tokens[1:], ("K", "V", "D", "E"), strict=False)
        )
    }
    ) => (float[B, H, K, V] after, float[B, H, G, V] shown) {{
        {_FADE if fades else _KEEP}
        {_DELTA if corrects else _WRITE}
        k_column = Unsqueeze(k, last)
        row = Unsqueeze(written, second_last)
        write = Mul(k_column, row)
        after = Add(before, write)
        seen = MatMul(q, after)
        shown = Mul(seen, factor)
    }}> (past_state, {", ".join(scanned)})
    by_batch = Transpose <perm = [1, 0, 2, 3, 4]> (read)
    output = Reshape(by_batch, out_shape)
}}"""
    return onnx.parser.parse_function(text)


def _by_token(name: str, result: str, shape: str) -> str:
    """Return the text that reshapes [batch, time, kv_heads * d] to [time, batch, kv_heads, d]."""
    return f"""
    {name}_parts = Reshape({name}, {shape})
    {result} = Transpose <perm = [1, 0, 2, 3]> ({name}_parts)"""
