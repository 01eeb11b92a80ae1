"""Writes to tensors become ops that return the result, where this changes no value."""

import pytest
import torch
from torch import fx, nn

from reroll.rewrite.capture.functional import functionalise, mutates


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


def to_a_column(x):
    y = x * 2
    y[:, 1] = 7.0
    return y


def to_columns_of_a_row(x):
    y = x * 2
    row = y[1]
    row[1:3] += 5
    row[::2].mul_(3)
    return y + row + y[1, 2]


def to_a_view_that_is_read_before_and_after(x):
    y = x * 2
    view = y[:, :2]
    before = view.sum()
    view.copy_(x[:, 2:])
    y += 1
    return view + before


def two_tensors(x):
    y, z = x * 2, x + 1
    y[0] = z[1]
    z[1] = y[2]
    return y * z


def of_a_result_of_two(x):
    values, places = x.topk(2)
    values /= values.sum(-1, keepdim=True)
    return values + places


def in_a_view_that_is_read_no_more(x):
    y = x * 2
    total = y.view(12).sum()
    y += x
    return y.view(12) + total


def in_a_view_of_another_kind(x):
    y = x * 2
    y.t()[0] = 1.0
    return y


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
        (to_a_column, False),
        (to_columns_of_a_row, False),
        (to_a_view_that_is_read_before_and_after, False),
        (two_tensors, False),
        (of_a_result_of_two, False),
        (in_a_view_that_is_read_no_more, False),
        (in_a_view_of_another_kind, True),
        (seen_in_a_view, True),
        (given, True),
        (of_a_wider_dtype, True),
        (one_of_two, True),
    ],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_writes_are_replaced_where_they_are_understood(function, stays):
    x = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    exported = torch.export.export(Module(function), (x.clone(),), strict=False)
    assert mutates(exported.graph)
    functionalise(exported.graph)
    assert mutates(exported.graph) == stays
    constants = exported.constants.values()
    outputs = fx.Interpreter(exported.graph_module).run(*constants, x.clone())
    assert torch.equal(outputs[0], function(x.clone()))
