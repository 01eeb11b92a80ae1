from __future__ import annotations

import math
import operator

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import fx, nn

from reroll.rewrite.checkpoint import MemorySource
from reroll.rewrite.ir.program import Program
from reroll.rewrite.ir.records import Input, Origin, TensorType
from reroll.rewrite.ir.shapes import concrete, drop_copies, tidy_shapes
from reroll.rewrite.ir.weights import WeightTable
from tests.exported import calls, export, outputs
from tests.programs import F32, aten, call, typed

SIZES = {"b": 2, "s": 3, "t": 5}


# ---- sizes


@pytest.mark.parametrize(
    ("dim", "size"),
    [
        (7, 7),
        ("b", 2),
        ("b*s", 6),
        ("-s + t", 2),
        ("2*(s//2) + 1", 3),
        ("Mod(t, 3)", None),
        ("t % s", 2),
        ("Max(1, s - t)", 1),
        ("Min(s, t)", 3),
        ("FloorDiv(t, 2)", 2),
        ("x", None),
        ("s**9", None),
        ("s.real", None),
        ("exit()", None),
        ("__import__('os')", None),
        ("s +", None),
        ("", None),
        ("1.5", None),
        ("[s]", None),
    ],
)
def test_sizes_are_computed_from_names(dim, size):
    if size is None:
        with pytest.raises(KeyError):
            concrete(dim, SIZES)
    else:
        assert concrete(dim, SIZES) == size


EXPRESSIONS = st.recursive(
    st.sampled_from(["b", "s", "t"]) | st.integers(0, 9).map(str),
    lambda inner: (
        st.tuples(inner, st.sampled_from(["+", "-", "*"]), inner).map(lambda t: f"({' '.join(t)})")
        | st.tuples(st.sampled_from(["Max", "Min"]), inner, inner).map(
            lambda t: "{}({}, {})".format(*t)
        )
        | inner.map("(-{})".format)
    ),
    max_leaves=10,
)


@given(EXPRESSIONS)
def test_sizes_are_those_of_python(text):
    expected = eval(text, {"Max": max, "Min": min, **SIZES})
    assert concrete(text, SIZES) == expected


# ---- reshapes


class Maker:
    """Appends ops that move elements about to a graph, with the sizes written as a model does."""

    def __init__(self, data: st.DataObject) -> None:
        self.data = data
        self.graph = fx.Graph()
        self.x = self.node = typed(self.graph.placeholder("x"), "b", "s", 12)
        self.shape: list[int | str] = ["b", "s", 12]

    def pick(self, choices):
        return self.data.draw(st.sampled_from(list(choices)))

    def dim(self, *, end: int = 0) -> int:
        """A dimension, counted from either end."""
        rank = len(self.shape) + end
        at = self.data.draw(st.integers(0, rank - 1))
        return at - rank if self.data.draw(st.booleans()) else at

    def add(self, target, shape, *args) -> None:
        self.shape = list(shape)
        self.node = typed(call(self.graph, target, self.node, *args), *shape)

    def size(self, dim: int | str):
        """A size as it stands in an exported graph: a number, or a node that computes it."""
        if isinstance(dim, int):
            return dim
        names = {"b": 0, "s": 1}
        total = None
        for name in dim.split("*"):
            node = (
                int(name)
                if name.isdigit()
                else call(self.graph, aten.sym_size.int, self.x, names[name])
            )
            total = node if total is None else call(self.graph, operator.mul, total, node)
        return total

    def transpose(self) -> None:
        a, b = self.dim(), self.dim()
        shape = list(self.shape)
        shape[a], shape[b] = shape[b], shape[a]
        self.add(aten.transpose.int, shape, a, b)

    def permute(self) -> None:
        order = self.data.draw(st.permutations(range(len(self.shape))))
        order = [d - len(order) if self.data.draw(st.booleans()) else d for d in order]
        self.add(aten.permute.default, [self.shape[d] for d in order], order)

    def unsqueeze(self) -> None:
        at = self.dim(end=1)
        shape = list(self.shape)
        shape.insert(at % (len(shape) + 1), 1)
        self.add(aten.unsqueeze.default, shape, at)

    def expand(self) -> None:
        shape = [self.pick([4, "s"]) if d == 1 else d for d in self.shape]
        if self.data.draw(st.booleans()):
            shape.insert(0, self.pick([1, 2]))
        sizes = [
            -1 if i >= len(shape) - len(self.shape) and shape[i] == self.shape[i - len(shape)]
            and self.data.draw(st.booleans()) else self.size(shape[i])
            for i in range(len(shape))
        ]  # fmt: skip
        self.add(aten.expand.default, shape, sizes)

    def merge(self) -> None:
        if len(self.shape) < 2:
            return
        at = self.data.draw(st.integers(0, len(self.shape) - 2))
        shape = [*self.shape[:at], times(*self.shape[at : at + 2]), *self.shape[at + 2 :]]
        if self.data.draw(st.booleans()):
            self.add(aten.flatten.using_ints, shape, at, at + 1)
        else:
            self.reshape(shape)

    def split(self) -> None:
        places = [i for i, d in enumerate(self.shape) if isinstance(d, int) and d > 1]
        if not places:
            return
        at = self.pick(places)
        whole = self.shape[at]
        first = self.pick(d for d in range(1, whole + 1) if whole % d == 0)
        shape = [*self.shape[:at], first, whole // first, *self.shape[at + 1 :]]
        if self.data.draw(st.booleans()):
            self.add(aten.unflatten.int, shape, at, [first, whole // first])
        else:
            self.reshape(shape)

    def undo(self) -> None:
        """Back to the shape of the input."""
        if math.prod(concrete(d, SIZES) for d in self.shape) == 2 * 3 * 12:
            self.reshape(["b", "s", 12])

    def drop_ones(self) -> None:
        self.reshape([d for d in self.shape if d != 1] or [1])

    def reshape(self, shape) -> None:
        self.add(aten.reshape.default, shape, [self.size(d) for d in shape])

    def program(self) -> Program:
        # something that a layout does not change, so that no reshape is the last node
        out = typed(call(self.graph, aten.neg.default, self.node), *self.shape)
        self.graph.output((out,))
        inputs = (Input("x", TensorType(F32, ("b", "s", 12))),)
        return Program(
            self.graph, {}, WeightTable(), MemorySource({}), inputs, ("out",), F32, Origin("shapes")
        )


def times(a: int | str, b: int | str) -> int | str:
    if isinstance(a, int) and isinstance(b, int):
        return a * b
    return "*".join(str(d) for d in (a, b) if d != 1)


STEPS = "transpose permute unsqueeze expand merge split undo drop_ones".split()


@given(st.data())
def test_tidying_changes_no_element(data):
    maker = Maker(data)
    for step in data.draw(st.lists(st.sampled_from(STEPS), min_size=1, max_size=8)):
        getattr(maker, step)()
    program = maker.program()
    x = torch.arange(2 * 3 * 12, dtype=F32).reshape(2, 3, 12)
    (expected,) = outputs(program, x)
    tidy_shapes(program.graph)
    program.graph.lint()
    (actual,) = outputs(program, x)
    assert torch.equal(actual, expected)
    # and for other sizes than those of the types' names
    y = torch.randn(1, 4, 12)
    tidied = str(program.graph)
    assert outputs(program, y)[0].numel() % 48 == 0
    tidy_shapes(program.graph)
    assert str(program.graph) == tidied


class Heads(nn.Module):
    def __init__(self, form: str) -> None:
        super().__init__()
        self.form = form

    def forward(self, x):
        batch, length, _ = x.shape
        if self.form == "view":
            x = x.view(batch, length, 4, 3)
        elif self.form == "-1":
            x = x.reshape(batch, length, -1, 3)
        elif self.form == "shape":
            x = x.view(*x.shape[:-1], 4, 3)
        x = x.permute(0, 2, 1, 3)
        x = x.transpose(1, 2).contiguous()
        return x.reshape(batch, length, 12).exp()


@pytest.mark.parametrize("form", ["view", "-1", "shape"])
def test_what_a_layer_does_to_its_own_dimensions_needs_no_size(form):
    program = export(Heads(form), torch.randn(3, 5, 12), dims={"x": ("b", "s", 12)})
    drop_copies(program.graph)
    tidy_shapes(program.graph)
    # to heads and back again is nothing
    assert calls(program.graph) == ["exp"]
    x = torch.randn(2, 4, 12)
    assert torch.equal(outputs(program, x)[0], x.exp())


class Repeated(nn.Module):
    def forward(self, x):
        batch, length, width = x.shape
        x = x[:, :, None, :].expand(batch, length, 4, width)
        return x.reshape(batch, length, 4 * width).exp()


def test_sizes_that_stay_are_left_out_of_an_expand():
    program = export(Repeated(), torch.randn(3, 5, 12), dims={"x": ("b", "s", 12)})
    tidy_shapes(program.graph)
    names = calls(program.graph)
    assert "sym_size" not in names
    assert names[-3:] == ["expand", "flatten", "exp"]
    expand = next(n for n in program.graph.nodes if n.target is aten.expand.default)
    assert expand.args[1] == [-1, -1, 4, -1]
    x = torch.randn(2, 4, 12)
    assert torch.equal(outputs(program, x)[0], Repeated()(x))
