"""Find the nodes of a graph that are sizes, before and after code is generated for it."""

from __future__ import annotations

import torch
from torch import fx
from torch._ops import OpOverload


def is_size(node: fx.Node) -> bool:
    """Whether a node is a size of a tensor or its device, or arithmetic on sizes.

    Another tensor of the same size can provide it. A tensor that is made of sizes is none.
    """
    if node.op == "call_method":
        return node.target == "size"
    if node.target is getattr:
        return node.args[1] == "device"
    if node.target is torch.ops.aten.sym_size.int:
        return True
    inputs = node.all_input_nodes
    python = node.op == "call_function" and not isinstance(node.target, OpOverload)
    return python and bool(inputs) and all(map(is_size, inputs))
