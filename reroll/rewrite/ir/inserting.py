"""Putting what a Python function of tensors computes into a graph, as ATen nodes with types."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx

from reroll.errors import ProgramError
from reroll.rewrite.ir.dtypes import HALVES, widen_node
from reroll.rewrite.ir.program import Dim, TensorType
from reroll.rewrite.ir.text.op_names import op_name

# sizes that stand for dimensions known only at run time: primes that no model has
_PRIMES = (100003, 100019, 100043, 100049)


def insert(graph: fx.Graph, function: Callable[..., Tensor], inputs: Sequence[fx.Node]) -> fx.Node:
    """The node of `function(*inputs)`, at the graph's insertion point.

    The inputs have types. Raises ProgramError if the function needs a size that is known only at
    run time, or an op that a program cannot hold.
    """
    names: dict[str, int] = {}
    examples = [_example(node, names) for node in inputs]
    # in half precision it is to be seen where the function asks for fp32 itself
    widens = all(e.dtype not in HALVES for e in examples)
    if widens:
        examples = [e.to(torch.bfloat16) if e.dtype == torch.float32 else e for e in examples]

    def called(*tensors: Tensor) -> Tensor:
        # tracing would take optional arguments of the function itself for inputs
        return function(*tensors)

    traced = make_fx(called, tracing_mode="fake", pre_dispatch=True)(*examples)
    sizes = {prime: name for name, prime in names.items()}
    made: dict[fx.Node, Any] = {}
    given = iter(inputs)
    for node in traced.graph.nodes:
        if node.op == "placeholder":
            made[node] = next(given)
        elif node.op == "output":
            return made[node.args[0]]  # type: ignore[no-any-return]
        else:
            made[node] = _copy(graph, node, made, sizes)
            if widens:
                widen_node(made[node], torch.bfloat16)
    raise ProgramError("the function returns nothing")


def _example(node: fx.Node, names: dict[str, int]) -> Tensor:
    kind = node.meta["type"]
    shape = [
        d if isinstance(d, int) else names.setdefault(d, _PRIMES[len(names)]) for d in kind.shape
    ]
    return torch.empty(shape, dtype=kind.dtype, device="meta")


def _copy(
    graph: fx.Graph, node: fx.Node, made: Mapping[fx.Node, Any], sizes: Mapping[int, str]
) -> fx.Node:
    if node.op != "call_function" or op_name(node.target) is None:
        raise ProgramError(f"a program cannot hold {node.target}", where=node.name)
    fixed = [a for a in _numbers((node.args, node.kwargs)) if a in sizes]
    if fixed:
        raise ProgramError(f"it needs the size {sizes[fixed[0]]}", where=node.name)
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: made[n])
    new = graph.call_function(node.target, args, kwargs)  # type: ignore[arg-type]
    value = node.meta.get("val")
    if isinstance(value, Tensor):
        shape: tuple[Dim, ...] = tuple(sizes.get(d, d) for d in value.shape)
        new.meta["type"] = TensorType(value.dtype, shape)
    return new


def _numbers(value: Any) -> list[int]:
    if isinstance(value, Mapping):
        return _numbers(list(value.values()))
    if isinstance(value, list | tuple):
        return [n for v in value for n in _numbers(v)]
    return [value] if isinstance(value, int) else []
