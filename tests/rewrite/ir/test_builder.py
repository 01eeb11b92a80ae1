"""Functions of tensors as nodes of a graph."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, fx

from reroll.errors import ProgramError
from reroll.rewrite.ir.builder import Builder
from reroll.rewrite.ir.records import TensorType


def graph(*shapes: tuple[int | str, ...]) -> tuple[fx.Graph, list[fx.Node]]:
    made = fx.Graph()
    nodes = [made.placeholder(f"x{n}") for n in range(len(shapes))]
    for node, shape in zip(nodes, shapes, strict=True):
        node.meta["type"] = TensorType(torch.float32, shape)
    return made, nodes


def scaled(x: Tensor, factor: float = 2.0) -> Tensor:
    return (x * factor).softmax(-1)


def test_it_computes_what_the_function_does() -> None:
    made, (x, w) = graph(("b", 3, "s", 4), (3, 4, 5))
    out = Builder(made).trace(lambda x, w: torch.matmul(scaled(x), w).transpose(1, 2), x, w)
    made.output(out)
    assert out.meta["type"] == TensorType(torch.float32, ("b", "s", 3, 5))
    a, b = torch.randn(2, 3, 7, 4), torch.randn(3, 4, 5)
    module = fx.GraphModule({}, made)
    torch.testing.assert_close(module(a, b), ((a * 2).softmax(-1) @ b).transpose(1, 2))


def test_optional_arguments_keep_their_defaults() -> None:
    made, (x,) = graph(("b", 4))
    made.output(Builder(made).trace(scaled, x))
    a = torch.randn(2, 4)
    torch.testing.assert_close(fx.GraphModule({}, made)(a), (2 * a).softmax(-1))


def test_a_size_of_the_run_is_refused() -> None:
    made, (x,) = graph(("b", 4))
    with pytest.raises(ProgramError, match="needs the size b"):
        Builder(made).trace(lambda x: x.expand(3, x.shape[0], 4) / x.shape[0], x)
