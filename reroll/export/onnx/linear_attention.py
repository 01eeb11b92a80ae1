"""The LinearAttention operator, and the function that defines it where a runtime has no kernel.

Up to opset 26 it is `com.microsoft.LinearAttention`. The model carries a function of the same name:
a runtime with a kernel uses that, any other runs the function, token by token. From opset 27 it is
a standard operator.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import onnx
import torch
from onnx import helper
from torch import fx

from reroll.errors import ExportError
from reroll.export.onnx.graph import Value

if TYPE_CHECKING:
    from reroll.export.onnx.recurrence import Tokens
    from reroll.export.onnx.translate import Translator

CONTRIB, NAME = "com.microsoft", "LinearAttention"
# where the operator is standard
STANDARD = 27
FLOAT = torch.float32


def linear_attention(
    g: Translator,
    node: fx.Node,
    x: Tokens,
    q: Value,
    k: Value,
    v: Value,
    d_k: int,
    d_v: int,
    rule: str,
    decay: Value | None = None,
    beta: Value | None = None,
) -> Value:
    """[batch, time, heads * d_v] from q, k, v [batch, heads, time, d], on the node's state."""
    numbers = g.states.of(g, node)
    part, dims = "recurrent_state", (x.kv_heads, d_k, d_v)
    past = g.states.read(g, numbers, part, dims, FLOAT)
    is_standard = g.settings.opset >= STANDARD
    attributes: dict[str, Any] = {
        "q_num_heads": x.heads,
        "kv_num_heads": x.kv_heads,
        "update_rule": rule,
        "scale": x.scale,
    }
    inputs = [_packed(g, q, x.heads * d_k), _packed(g, k, x.kv_heads * d_k)]
    inputs += [_packed(g, v, x.kv_heads * d_v), past]
    gates = [_packed_gate(g, decay, x, d_k), _packed_gate(g, beta, x, None)]
    out, state = g.graph.ops(
        NAME,
        *inputs,
        *gates,
        hints=("mixed", "state"),
        domain="" if is_standard else CONTRIB,
        **attributes,
    )
    g.states.write(g, numbers, part, state)
    if not is_standard:
        _define(g, attributes)
    return out


def _packed(g: Translator, value: Value, width: int) -> Value:
    """[batch, heads, time, d] as [batch, time, heads * d]."""
    turned = g.op("Transpose", value, perm=[0, 2, 1, 3])
    return g.op("Reshape", turned, g.ints(0, 0, width))


def _packed_gate(g: Translator, gate: Value | None, x: Tokens, d_k: int | None) -> Value | None:
    """[batch, kv_heads, time] as [batch, time, kv_heads]; with channels of the key as well."""
    if gate is None:
        return None
    if d_k is not None and x.by_channel:
        return _packed(g, gate, x.kv_heads * d_k)
    return g.op("Transpose", gate, perm=[0, 2, 1])


def _define(g: Translator, attributes: dict[str, Any]) -> None:
    """Put the function of these attributes into the model; all its recurrences share one."""
    functions = g.graph.root.functions
    known, _ = functions.setdefault(NAME, (attributes, _function(attributes)))
    if known != attributes:
        raise ExportError(
            "recurrences of different kinds in one model have no common function",
            hint=f"export with --opset {STANDARD}, where the operator is standard",
        )


def _function(attributes: dict[str, Any]) -> onnx.FunctionProto:
    """The definition of the standard operator, for these attributes, under the other name."""
    schema = onnx.defs.get_schema(NAME, STANDARD)
    rule = attributes["update_rule"]
    has_decay, has_beta = "gated" in rule, "delta" in rule
    names = ["query", "key", "value", "past_state"]
    names += ["decay" if has_decay else "", "beta" if has_beta else ""]
    while not names[-1]:
        names.pop()
    given = {**attributes, "name": NAME}
    node = helper.make_node(NAME, names, ["output", "present_state"], **given)
    kind = helper.make_tensor_type_proto(onnx.TensorProto.FLOAT, [None] * 3)
    state = helper.make_tensor_type_proto(onnx.TensorProto.FLOAT, [None] * 4)
    types = [state if name == "past_state" else kind for name in names]
    body = schema.get_context_dependent_function(
        node.SerializeToString(), [t.SerializeToString() for t in types]
    )
    function = onnx.FunctionProto()
    function.ParseFromString(body)
    function.domain = CONTRIB
    del function.opset_import[:]
    function.opset_import.append(helper.make_opsetid("", 23))
    if not list(function.attribute):
        function.attribute.extend(["q_num_heads", "kv_num_heads", "update_rule", "scale"])
    return function
