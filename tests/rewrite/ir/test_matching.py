from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import fx

from reroll.rewrite.ir.matching import (
    ANY,
    Number,
    Op,
    Var,
    all_arguments,
    argument,
    cast,
    dtype,
    either,
    is_weight,
    match,
    shape,
)
from reroll.rewrite.ir.patterns import Match, Miss
from tests.programs import F32, aten, call, typed

ADD, MUL, SUB, NEG = "aten.add.Tensor", "aten.mul.Tensor", "aten.sub.Tensor", "aten.neg.default"


@pytest.fixture
def graph():
    return fx.Graph()


def test_variables_bind_nodes_and_the_region_is_named(graph):
    x, y = graph.placeholder("x"), graph.placeholder("y")
    product = call(graph, aten.mul.Tensor, x, y)
    total = call(graph, aten.add.Tensor, product, y)
    found = match(Op(ADD, Op(MUL, Var("a"), Var("b")), Var("b")), total, "fused")
    assert isinstance(found, Match)
    assert found.bound == {"a": x, "b": y}
    assert found.nodes == (total.name, product.name)
    assert found.pattern == "fused"


def test_one_variable_is_one_node(graph):
    x, y = graph.placeholder("x"), graph.placeholder("y")
    square = Op(MUL, Var("x"), Var("x"))
    assert match(square, call(graph, aten.mul.Tensor, x, x))
    found = match(square, call(graph, aten.mul.Tensor, x, y))
    assert isinstance(found, Miss)
    assert found.reason == "x is two different tensors"
    assert found.nodes == ("y",)


def test_one_number_is_one_constant(graph):
    x = graph.placeholder("x")
    pattern = Op(ADD, Op(MUL, Var("x"), Number("n")), Number("n"))
    same = call(graph, aten.add.Tensor, call(graph, aten.mul.Tensor, x, 3), 3)
    assert match(pattern, same)["n"] == 3
    other = call(graph, aten.add.Tensor, call(graph, aten.mul.Tensor, x, 3), 4)
    assert "two different numbers" in str(match(pattern, other))
    assert "not a constant" in str(match(Op(ADD, Var("x"), Number("n")), fx_add(graph, x, x)))


def fx_add(graph, a, b):
    return call(graph, aten.add.Tensor, a, b)


def test_a_variable_may_refuse_a_node(graph):
    x, w = graph.placeholder("x"), graph.get_attr("w")
    pattern = Op(ADD, Var("x"), Var("w", is_weight))
    assert match(pattern, fx_add(graph, x, w))
    assert "x cannot be w" in str(match(pattern, fx_add(graph, w, x)))
    assert match(Op(ADD, Var("x"), Var("w", is_weight), commutes=True), fx_add(graph, w, x))


def test_constants_are_compared_with_their_type_of_truth(graph):
    x = graph.placeholder("x")
    node = call(graph, aten.mean.dim, x, [-1], True)
    assert match(Op("aten.mean.dim", Var("x"), [-1], True), node)
    assert match(Op("aten.mean.dim", Var("x"), ANY, ANY), node)
    for other in ([-2], [-1, -2], []):
        assert not match(Op("aten.mean.dim", Var("x"), other, True), node)
    assert not match(Op("aten.mean.dim", Var("x"), [-1], False), node)
    # True is not the number 1
    assert not match(Op("aten.mean.dim", Var("x"), [-1], 1), node)


def test_trailing_arguments_must_be_absent_or_default(graph):
    x, y = graph.placeholder("x"), graph.placeholder("y")
    pattern = Op(ADD, Var("x"), Var("y"))
    assert match(pattern, call(graph, aten.add.Tensor, x, y))
    assert match(pattern, call(graph, aten.add.Tensor, x, y, alpha=1))
    found = match(pattern, call(graph, aten.add.Tensor, x, y, alpha=2))
    assert "has 3 arguments" in str(found)
    linear = Op("aten.linear.default", Var("x"), Var("w"))
    assert match(linear, call(graph, aten.linear.default, x, y, None))
    assert not match(linear, call(graph, aten.linear.default, x, y, y))


def test_a_choice_that_fails_later_is_taken_back(graph):
    """`x` may be either factor: only one of them fits what comes after."""
    a, b = graph.placeholder("a"), graph.placeholder("b")
    product = call(graph, aten.mul.Tensor, a, b)
    pattern = Op(SUB, Op(MUL, Var("x"), Var("y"), commutes=True), Var("x"))
    assert match(pattern, call(graph, aten.sub.Tensor, product, a)).bound == {"x": a, "y": b}
    assert match(pattern, call(graph, aten.sub.Tensor, product, b)).bound == {"x": b, "y": a}
    negated = call(graph, aten.neg.default, a)
    pattern = Op(SUB, either(Op(NEG, Var("x")), Var("x")), Var("x"))
    assert match(pattern, call(graph, aten.sub.Tensor, negated, a))["x"] is a
    assert match(pattern, call(graph, aten.sub.Tensor, negated, negated))["x"] is negated


def test_a_cast_may_be_there(graph):
    x = graph.placeholder("x")
    wide = call(graph, aten.to.dtype, x, torch.float32)
    pattern = Op(NEG, cast(Var("x")))
    assert match(pattern, call(graph, aten.neg.default, wide))["x"] is x
    assert match(pattern, call(graph, aten.neg.default, x))["x"] is x


def test_lists_of_tensors_match_one_by_one(graph):
    x, y = graph.placeholder("x"), graph.placeholder("y")
    cat = call(graph, aten.cat.default, [x, y], -1)
    found = match(Op("aten.cat.default", [Var("a"), Var("b")], Number("dim")), cat)
    assert (found["a"], found["b"], found["dim"]) == (x, y, -1)
    assert "expected 1 values" in str(match(Op("aten.cat.default", [Var("a")], ANY), cat))


def test_a_miss_tells_of_the_attempt_that_came_furthest(graph):
    x = graph.placeholder("x")
    deep = call(graph, aten.exp.default, call(graph, aten.neg.default, fx_add(graph, x, 1)))
    near = Op("aten.exp.default", Op(NEG, Op(MUL, Var("x"), Var("y"))))
    far = Op("aten.exp.default", Op("aten.abs.default", Var("x")))
    for pattern in (either(near, far), either(far, near)):
        found = match(pattern, deep, "gate")
        assert isinstance(found, Miss)
        assert not found
        assert found.depth == 2
        assert str(found) == "gate: expected aten.mul.Tensor, found aten.add.Tensor (at add_tensor)"
    assert match(far, x).depth == 0
    assert match(near, deep).depth > match(far, deep).depth


def test_arguments_by_name_and_in_order(graph):
    x = graph.placeholder("x")
    node = call(graph, aten.gelu.default, x, approximate="tanh")
    assert all_arguments(node) == (x, "tanh")
    assert argument(node, "approximate") == "tanh"
    plain = call(graph, aten.gelu.default, x)
    assert all_arguments(plain) == (x, "none")
    assert argument(plain, "approximate") == "none"
    assert match(Op("aten.gelu.default", Var("x"), "tanh"), node)
    assert not match(Op("aten.gelu.default", Var("x"), "tanh"), plain)


def test_types_are_read_where_there_are_any(graph):
    x = typed(graph.placeholder("x"), "b", 4)
    y = graph.placeholder("y")
    assert (shape(x), dtype(x)) == (("b", 4), F32)
    assert (shape(y), dtype(y)) == ((), None)


# ---- random expressions

UNARY = {"aten.neg.default": aten.neg.default, "aten.exp.default": aten.exp.default}
BINARY = {
    ADD: aten.add.Tensor,
    MUL: aten.mul.Tensor,
    SUB: aten.sub.Tensor,
}
LEAVES = st.sampled_from(["x", "y", "z"]) | st.integers(2, 9)
TREES = st.recursive(
    st.sampled_from(["x", "y", "z"]),
    lambda inner: (
        st.tuples(st.sampled_from(sorted(UNARY)), inner)
        | st.tuples(st.sampled_from(sorted(BINARY)), inner, inner | LEAVES)
    ),
    max_leaves=8,
).filter(lambda tree: isinstance(tree, tuple))


def build(graph, leaves, tree):
    if isinstance(tree, tuple):
        target = {**UNARY, **BINARY}[tree[0]]
        return call(graph, target, *(build(graph, leaves, t) for t in tree[1:]))
    return leaves[tree] if isinstance(tree, str) else tree


def pattern_of(tree, commutes=False):
    if isinstance(tree, tuple):
        inner = [pattern_of(t, commutes) for t in tree[1:]]
        return Op(tree[0], *inner, commutes=commutes and tree[0] in (ADD, MUL))
    return Var(tree) if isinstance(tree, str) else tree


def exchanged(tree, choose):
    """The tree with the arguments of some sums and products exchanged."""
    if not isinstance(tree, tuple):
        return tree
    name, *inner = tree[0], *(exchanged(t, choose) for t in tree[1:])
    if name in (ADD, MUL) and isinstance(inner[1], tuple | str) and choose():
        inner.reverse()
    return (name, *inner)


def changed(tree, path):
    """The tree with another op at the end of a path through it."""
    if len(path) == 0 or not any(isinstance(t, tuple) for t in tree[1:]):
        table = sorted(UNARY if tree[0] in UNARY else BINARY)
        return (table[(table.index(tree[0]) + 1) % len(table)], *tree[1:])
    inner = [i for i, t in enumerate(tree[1:], 1) if isinstance(t, tuple)]
    at = inner[path[0] % len(inner)]
    return (*tree[:at], changed(tree[at], path[1:]), *tree[at + 1 :])


def planted(tree):
    graph = fx.Graph()
    return build(graph, {name: graph.placeholder(name) for name in "xyz"}, tree)


@given(TREES)
def test_an_expression_matches_itself(tree):
    node = planted(tree)
    found = match(pattern_of(tree), node)
    assert found
    assert all(bound.name == name for name, bound in found.bound.items())
    assert found.nodes[0] == node.name
    assert set(found.nodes) == {n.name for n in node.graph.nodes if n.op == "call_function"}


@given(TREES, st.data())
def test_an_expression_matches_itself_with_its_arguments_exchanged(tree, data):
    other = exchanged(tree, lambda: data.draw(st.booleans()))
    assert match(pattern_of(tree, commutes=True), planted(other))


@given(TREES, st.lists(st.integers(0, 3), max_size=4))
def test_an_expression_with_another_op_does_not_match(tree, path):
    found = match(pattern_of(tree), planted(changed(tree, path)), "tree")
    assert isinstance(found, Miss)
    assert "expected" in found.reason
    assert found.nodes
