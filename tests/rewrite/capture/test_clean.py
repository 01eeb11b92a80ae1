"""Writes to tensors become ops that return the result, where this changes no value."""

import pytest
import torch
from torch import nn

from reroll.rewrite.capture.clean import make_functional, mutates


def once(x):
    y = x * 2
    y += x
    return y


def twice(x):
    y = x * 2
    y += x
    y *= 3
    return y


def read_before(x):
    y = x * 2
    z = y + 1
    y += x
    return z + y


def seen_in_a_view(x):
    y = x * 2
    view = y.view(12)
    y += x
    return view + 1


def given(x):
    x += 1
    return x


def of_a_wider_dtype(x):
    y = (x * 2).half()
    y += x
    return y


def one_of_two(x):
    y = x * 2
    y += x
    x += 1
    return x + y


class Module(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


@pytest.mark.parametrize(
    ("function", "stays"),
    [
        (once, False),
        (twice, False),
        (read_before, False),
        (seen_in_a_view, True),
        (given, True),
        (of_a_wider_dtype, True),
        (one_of_two, True),
    ],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_a_write_is_replaced_where_nothing_else_reads_it(function, stays):
    x = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    exported = torch.export.export(Module(function), (x.clone(),), strict=False)
    assert mutates(exported.graph)
    make_functional(exported.graph)
    assert mutates(exported.graph) == stays
    exported.graph_module.recompile()
    assert torch.equal(exported.module()(x.clone()), function(x.clone()))
