"""Write typed nodes into a graph: calls of ops and Python functions, weights, wrappers of nodes.

Every node gets the type of its value: see `reroll.rewrite.ir.types`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._pytree import tree_leaves

from reroll.errors import ProgramError
from reroll.rewrite.ir.dtypes import HALVES, widen_node
from reroll.rewrite.ir.ops import WIDEN
from reroll.rewrite.ir.program import Loop
from reroll.rewrite.ir.records import TensorType
from reroll.rewrite.ir.text.op_names import op_name
from reroll.rewrite.ir.types import Sizes, infer, set_type, type_of
from reroll.rewrite.ir.weights import Weight


class Builder:
    """Writer of typed nodes into a graph, at its insertion point.

    `loop` is the loop whose body the graph is, if any; its inputs give the values of placeholders
    that are numbers.
    """

    def __init__(self, graph: fx.Graph, loop: Loop | None = None) -> None:
        self.graph, self.loop = graph, loop

    def before(self, node: fx.Node) -> AbstractContextManager[Any]:
        """Set the insertion point before a node."""
        return self.graph.inserting_before(node)

    def after(self, node: fx.Node) -> AbstractContextManager[Any]:
        """Set the insertion point after a node; nodes keep the order in which they are written."""
        return self.graph.inserting_before(node.next)

    def call(self, op: Any, *args: Any, **kwargs: Any) -> fx.Node:
        """Write a call of an op. Raises ProgramError if the op does not accept these types."""
        node = self.graph.call_function(op, args, kwargs)
        infer(node, self.loop)
        return node

    def placeholder(self, name: str, type_: TensorType | None = None) -> fx.Node:
        """Write a placeholder of a tensor type, or of a number."""
        node = self.graph.placeholder(name)
        set_type(node, type_)
        return node

    def weight(self, name: str, weight: Weight) -> fx.Node:
        """Write a node that reads a weight."""
        node = self.graph.get_attr(name)
        set_type(node, TensorType(weight.meta.dtype, weight.meta.shape))
        return node

    def wide(self, node: fx.Node) -> fx.Node:
        """Convert a value to fp32, also if the Program is converted to half precision later."""
        type_ = type_of(node)
        assert type_ is not None
        if type_.dtype != torch.float32:
            return self.call(torch.ops.aten.to.dtype, node, torch.float32)
        return node if node.target is WIDEN else self.call(WIDEN, node)

    def wrap(self, node: fx.Node, write: Callable[[fx.Node], fx.Node]) -> fx.Node:
        """Replace a node, for all its present users, by what `write` computes from it."""
        users = list(node.users)
        with self.after(node):
            new = write(node)
        for user in users:
            user.replace_input_with(node, new)
        return new

    def trace(self, function: Callable[..., Tensor], *inputs: fx.Node) -> fx.Node:
        """Trace a Python function of tensors into ATen nodes; return the node of its result.

        Raises ProgramError if the function needs a size that is known only at run time, or an op
        that a Program cannot hold.
        """
        sizes = Sizes()
        examples = [_example(node, sizes) for node in inputs]
        # only a trace in half precision shows where the function asks for fp32 itself
        widens = all(e.dtype not in HALVES for e in examples)
        if widens:
            examples = [e.to(torch.bfloat16) if e.dtype == torch.float32 else e for e in examples]

        def called(*tensors: Tensor) -> Tensor:
            # make_fx would treat optional arguments of the function as inputs
            return function(*tensors)

        traced = make_fx(called, tracing_mode="fake", pre_dispatch=True)(*examples)
        nodes: dict[fx.Node, Any] = {}
        arguments = iter(inputs)
        for node in traced.graph.nodes:
            if node.op == "placeholder":
                nodes[node] = next(arguments)
            elif node.op == "output":
                return nodes[node.args[0]]  # type: ignore[no-any-return]
            else:
                nodes[node] = self._copy(node, nodes, sizes.names())
                if widens:
                    widen_node(nodes[node], torch.bfloat16)
        raise ProgramError("the function returns nothing")

    def _copy(
        self, node: fx.Node, nodes: Mapping[fx.Node, Any], names: Mapping[int, str]
    ) -> fx.Node:
        if node.op != "call_function" or op_name(node.target) is None:
            raise ProgramError(f"a program cannot hold {node.target}", where=node.name)
        leaves = tree_leaves((node.args, node.kwargs))
        fixed = [a for a in leaves if isinstance(a, int) and a in names]
        if fixed:
            raise ProgramError(f"it needs the size {names[fixed[0]]}", where=node.name)
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: nodes[n])
        new = self.graph.call_function(node.target, args, kwargs)  # type: ignore[arg-type]
        value = node.meta.get("val")
        if isinstance(value, Tensor):
            set_type(new, TensorType(value.dtype, tuple(names.get(d, d) for d in value.shape)))
        return new


def _example(node: fx.Node, sizes: Sizes) -> Tensor:
    type_ = type_of(node)
    if type_ is None:
        raise ProgramError("the type of an input is not known", where=node.name)
    return sizes.empty(type_)
