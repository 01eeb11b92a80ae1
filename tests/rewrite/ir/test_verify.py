"""What a well-formed Program is: each rule, broken in one Program."""

from __future__ import annotations

import operator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import fx

from reroll.errors import ProgramError
from reroll.rewrite.ir import ops
from reroll.rewrite.ir.program import Program
from reroll.rewrite.ir.records import Body, Input, TensorType
from reroll.rewrite.ir.verify import problems, verify
from reroll.rewrite.ir.verify_nodes import accepts, call_problem, fitting
from reroll.rewrite.ir.weights import WeightTable
from tests.programs import F32, aten, call, reroll, stack, tiny, typed


def find(program: Program, target: Any, graph: str = "main") -> fx.Node:
    return next(n for n in dict(program.graphs())[graph].nodes if n.target is target)


def test_a_good_program_passes():
    verify(tiny())
    assert list(problems(tiny())) == []


def swap_order(program: Program) -> None:
    find(program, aten.linear.default).append(find(program, operator.getitem))


def foreign_node(program: Program) -> None:
    other = next(iter(program.bodies["layers"].graph.nodes))
    node = find(program, aten.linear.default)
    node.args = (other, node.args[1])


def same_name(program: Program) -> None:
    find(program, aten.linear.default).name = "getitem"


def late_placeholder(program: Program) -> None:
    graph = program.bodies["layers"].graph
    with graph.inserting_before(graph.output_node()):
        graph.placeholder("late")


def no_output(program: Program) -> None:
    program.graph.erase_node(program.graph.output_node())


def returns_one_value(program: Program) -> None:
    output = program.graph.output_node()
    output.args = (output.args[0][0],)


def python_function(program: Program) -> None:
    find(program, aten.linear.default).target = torch.nn.functional.linear


def packet(program: Program) -> None:
    find(program, aten.linear.default).target = aten.linear


def method(program: Program) -> None:
    graph = program.graph
    with graph.inserting_before(graph.output_node()):
        graph.call_method("relu", (find(program, operator.getitem),))


def in_place(program: Program) -> None:
    node = find(program, aten.add.Tensor, "layers")
    node.target = aten.add_.Tensor


def slice_argument(program: Program) -> None:
    node = find(program, operator.getitem)
    node.args = (node.args[0], slice(0, 1))


def big_integer(program: Program) -> None:
    node = find(program, aten.clamp.default, "layers")
    node.kwargs = {"max": 2**64}


def wrong_meta(program: Program) -> None:
    find(program, operator.getitem).meta["type"] = "f32[1]"


def unknown_keyword(program: Program) -> None:
    node = find(program, aten.clamp.default, "layers")
    node.kwargs = {"maximum": 1.0}


def unknown_weight(program: Program) -> None:
    program.graph.find_nodes(op="get_attr")[0].target = "embedding.weight"


def wrong_weight_type(program: Program) -> None:
    typed(program.graph.find_nodes(op="get_attr")[0], 2, 2)


def loop_in_body(program: Program) -> None:
    graph = program.bodies["layers"].graph
    with graph.inserting_before(graph.output_node()):
        call(graph, ops.loop, "layers", (), (), 2)


def loop_as_value(program: Program) -> None:
    program.graph.output_node().args = ((find(program, ops.loop),),)


def loop_args(position: int, value: Any) -> Any:
    def change(program: Program) -> None:
        node = find(program, ops.loop)
        args = list(node.args)
        args[position] = value(node) if callable(value) else value
        node.args = tuple(args)

    return change


def carry_type(program: Program) -> None:
    typed(find(program, aten.embedding.default), "b", "s", 9)


def next_carry_type(program: Program) -> None:
    typed(find(program, aten.add.Tensor, "layers"), "b", "s", 8, dtype=torch.bfloat16)


BROKEN = {
    "order": (swap_order, "main: %linear_default", "later in this graph"),
    "foreign node": (foreign_node, "main: %linear_default", "not in this graph"),
    "same name": (same_name, "main: %getitem", "two nodes have this name"),
    "late placeholder": (late_placeholder, "layers: %late", "come before everything else"),
    "no output": (no_output, "main", "returns nothing"),
    "one value": (returns_one_value, "main: %output", "returns a tuple"),
    "python function": (python_function, "main: %linear_default", "linear is not an op"),
    "op without overload": (packet, "main: %linear_default", "not an op"),
    "method": (method, "main: %relu", "no call_method nodes"),
    "in place": (in_place, "layers: %add_tensor", "not an op"),
    "slice": (slice_argument, "main: %getitem", "holds a slice"),
    "big integer": (big_integer, "layers: %clamp_default", "64 bits"),
    "meta": (wrong_meta, "main: %getitem", "is not a TensorType"),
    "keyword": (unknown_keyword, "layers: %clamp_default", "nearest is 'max'"),
    "weight": (unknown_weight, "main: %embed_weight", "no weight @embedding.weight"),
    "weight type": (wrong_weight_type, "main: %embed_weight", "is f32[16, 8], not f32[2, 2]"),
    "loop in body": (loop_in_body, "layers: %loop", "cannot stand in the body"),
    "loop as value": (loop_as_value, "main: %output", "one by one"),
    "no body": (loop_args(0, "layer"), "main: %loop", "no body 'layer'"),
    "no carry": (loop_args(1, ()), "main: %loop", "carries 0"),
    "carry list": (loop_args(1, lambda n: list(n.args[1])), "main: %loop", "a tuple of carry"),
    "inputs": (loop_args(2, ()), "main: %loop", "takes 2 values"),
    "input tuple": (loop_args(2, ((1.0,),)), "main: %loop", "1 values for 3 trips"),
    "trips": (loop_args(3, 0), "main: %loop", "not 0"),
    "trips of weights": (loop_args(2, (1.0,)), None, None),
    "carry type": (carry_type, "main: %loop", "%h of the body has another type"),
    "next carry type": (next_carry_type, "layers: %output", "the next trip's %h"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_graph_is_named(name):
    change, where, words = BROKEN[name]
    program = tiny().edit()
    change(program)
    if where is None:
        verify(program)
        return
    with pytest.raises(ProgramError) as error:
        verify(program)
    assert error.value.where == where
    assert words in str(error.value)


INPUT = tiny().inputs[0]
FIELDS = {
    "no inputs": ({"inputs": ()}, "it takes 1 inputs; 0 are declared"),
    "input name": ({"inputs": (replace(INPUT, name="x"),)}, "stands for 'input_ids'"),
    "input type": (
        {"inputs": (Input("input_ids", TensorType(F32, ("b",))),)},
        "the input is declared f32[b]",
    ),
    "outputs": ({"outputs": ()}, "0 outputs are declared"),
    "bodies": ({"bodies": {}}, "there is no body 'layers' (bodies: there are none)"),
    "spare body": (
        {"bodies": {**tiny().bodies, "spare": tiny().bodies["layers"]}},
        "no loop runs the body 'spare'",
    ),
    "period": ({"bodies": {"layers": Body(tiny().bodies["layers"].graph, 0)}}, "1 or more"),
    "no weights": ({"weights": WeightTable()}, "there is no weight @embed.weight"),
    "trips of weights": (
        {"weights": tiny().weights.with_weight("layers.*.norm.weight", stack("n.*", 2, 8))},
        "stacked for 2 trips, and used for 3 trips",
    ),
}


@pytest.mark.parametrize("name", FIELDS)
def test_a_broken_program_is_refused(name):
    fields, words = FIELDS[name]
    with pytest.raises(ProgramError) as error:
        verify(replace(tiny(), **fields))
    assert words in str(error.value)


def test_two_outputs_of_one_name_are_refused():
    program = tiny().edit()
    output = program.graph.output_node()
    output.args = (output.args[0] * 2,)
    with pytest.raises(ProgramError, match="two outputs are called 'logits'"):
        verify(replace(program, outputs=("logits", "logits")))


def test_problems_goes_on_after_the_first():
    program = tiny().edit()
    unknown_keyword(program)
    wrong_weight_type(program)
    assert len(list(problems(program))) == 2


# ---- single nodes


@pytest.mark.parametrize(
    ("op", "args", "kwargs", "words"),
    [
        (aten.add.Tensor, (1, 2), {"alpha": 1}, None),
        (aten.add.Tensor, (1,), {"other": 2}, None),
        (aten.add.Tensor, (1, 2, 3), {}, "takes 2 arguments without a name"),
        (aten.add.Tensor, (1, 2), {"other": 2}, "given 'other' twice"),
        (aten.add.Tensor, (1, 2), {"alhpa": 2}, "nearest is 'alpha'"),
        (aten.add.Tensor, (1,), {}, "needs the argument 'other'"),
        (aten.sum.dim_IntList, (1, [0, 1], True), {"dtype": F32}, None),
        (aten.sum.dim_IntList, (1, [0.5]), {}, "takes Optional[List[int]] for 'dim'"),
        (reroll.rms_norm.default, (1, None, 1e-5), {}, None),
        (reroll.rms_norm.default, (1, None, "x"), {}, "takes float for 'eps'"),
    ],
)
def test_calls_follow_the_schema(op, args, kwargs, words):
    problem = call_problem(op, args, kwargs)
    assert problem is None if words is None else words in problem


@pytest.mark.parametrize(
    ("kind", "value", "accepted"),
    [
        ("int", 1, True),
        ("int", 1.0, False),
        ("float", 1, True),
        ("Optional[int]", None, True),
        ("int", None, False),
        ("List[int]", [1, 2], True),
        ("List[int]", 1, True),
        ("List[Tensor]", 1, False),
        ("List[Optional[Tensor]]", [None], True),
        ("ScalarType", F32, True),
        ("ScalarType", 6, False),
        ("Optional[Device]", torch.device("cpu"), True),
        ("Optional[Generator]", None, True),
        ("Storage", 1, False),
    ],
)
def test_constants_fit_parameters(kind, value, accepted):
    assert accepts(kind, value) == accepted


def test_types_fit_unless_they_cannot():
    node = typed(fx.Graph().placeholder("x"), "b", 4)
    assert fitting(node, TensorType(F32, ("n", 4)))
    assert fitting(node, TensorType(F32, (2, 4)))
    assert fitting(node, None)
    assert fitting(1.0, TensorType(F32, ()))
    assert not fitting(node, TensorType(F32, ("b", 5)))
    assert not fitting(node, TensorType(F32, ("b",)))
    assert not fitting(node, TensorType(torch.int64, ("b", 4)))
