"""Sameness, fingerprints and diffs of Programs."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings

from reroll.rewrite.ir.program import Program
from reroll.rewrite.ir.records import Body, Origin
from reroll.rewrite.ir.text.compare import diff, fingerprint, same
from reroll.rewrite.ir.weights import Weight, scale
from tests.programs import aten, replaced, tiny
from tests.rewrite.ir.program_strategies import programs


def renamed(program: Program) -> Program:
    """The same program with other names for all nodes, and one `get_attr` node per use."""
    program = program.edit()
    for _, graph in program.graphs():
        for node in list(graph.nodes):
            if node.op == "get_attr":
                for user in list(node.users):
                    with graph.inserting_before(user):
                        user.replace_input_with(node, graph.get_attr(str(node.target)))
                graph.erase_node(node)
            elif node.op != "output":
                node.name = f"other_{node.name}"
    return program


def first_call(program: Program, target: object) -> torch.fx.Node:
    return next(n for _, g in program.graphs() for n in g.nodes if n.target is target)


@settings(deadline=None, max_examples=40, suppress_health_check=list(HealthCheck))
@given(programs())
def test_names_and_history_do_not_count(program):
    other = replace(renamed(program), origin=Origin("another"))
    assert same(program, other)
    assert fingerprint(program) == fingerprint(other)
    assert "@@" not in diff(program, other).partition("--- steps")[0]


def test_the_order_of_tables_does_not_count():
    program = tiny()
    weights = type(program.weights)(list(program.weights.items())[::-1])
    assert same(program, replace(program, weights=weights))


def changed_argument() -> Program:
    program = tiny().edit()
    node = first_call(program, torch.ops.reroll.rms_norm.default)
    node.args = (*node.args[:2], 1e-6)
    return program


def changed_op() -> Program:
    program = tiny().edit()
    first_call(program, aten.add.Tensor).target = aten.sub.Tensor
    return program


def changed_weight(weight: Weight) -> Program:
    program = tiny()
    return replace(program, weights=program.weights.with_weight("embed.weight", weight))


def integer_for_float() -> Program:
    program = tiny().edit()
    node = first_call(program, torch.ops.reroll.rms_norm.default)
    node.args = (*node.args, 1)
    other = program.edit()
    node = first_call(other, torch.ops.reroll.rms_norm.default)
    node.args = (*node.args[:3], 1.0)
    assert not same(program, other)
    return other


EMBED = tiny().weights["embed.weight"]
CHANGES = {
    "argument": (changed_argument, "1e-06"),
    "op": (changed_op, "+%add_tensor = aten.sub.Tensor(%h, %clamp_default)"),
    "kind of number": (integer_for_float, "1.0"),
    "trips": (lambda: tiny(4), "trips=4"),
    "dtype": (lambda: replaced(tiny(), dtype=torch.bfloat16), "+dtype bf16"),
    "output": (lambda: replaced(tiny(), outputs=("scores",)), "+output scores"),
    "input": (lambda: replaced(tiny(), inputs=(replace(tiny().inputs[0], name="x"),)), "+input x"),
    "period": (
        lambda: replaced(tiny(), bodies={"layers": Body(tiny().bodies["layers"].graph, 2)}),
        "+body layers period=2",
    ),
    "weight": (
        lambda: changed_weight(Weight((scale(EMBED.entries[0], 2.0),))),
        "!@embed.weight : 1 of 1 computed otherwise",
    ),
    "trainable": (
        lambda: changed_weight(replace(EMBED, trainable=False)),
        "!@embed.weight : trainable true -> false",
    ),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_counts_and_shows(name):
    make, shown = CHANGES[name]
    assert not same(tiny(), make())
    assert fingerprint(tiny()) != fingerprint(make())
    assert shown in diff(tiny(), make())


def test_a_fingerprint_is_a_hash_that_is_equal_in_every_process():
    assert fingerprint(tiny()) == fingerprint(tiny())
    assert len(bytes.fromhex(fingerprint(tiny()))) == 32


# ---- diff


def test_equal_programs_have_no_diff():
    assert diff(tiny(), renamed(tiny())) == ""


def test_an_inserted_node_shows_alone():
    program = tiny().edit()
    node = first_call(program, aten.embedding.default)
    with program.graph.inserting_after(node):
        new = program.graph.call_function(aten.relu.default, (node,))
    node.replace_all_uses_with(new, delete_user_cb=lambda user: user is not new)
    changed = [line for line in diff(tiny(), program).splitlines() if line[0] in "+-"]
    assert changed == [
        "--- main",
        "-%loop = loop layers(%embedding_default) inputs((none, 0.5, 1.0)) trips=3",
        "+%relu_default = aten.relu(%embedding_default)",
        "+%loop = loop layers(%relu_default) inputs((none, 0.5, 1.0)) trips=3",
    ]


def test_tied_weights_show_their_trips():
    program = tiny()
    weight = program.weights["layers.*.proj.weight"]
    tied = Weight(weight.entries[:1], (0, 0, 0))
    after = replace(program, weights=program.weights.with_weight("layers.*.proj.weight", tied))
    assert diff(program, after) == (
        "--- weights\n!@layers.*.proj.weight : entries 3 -> 1, trips [0..2] -> [0 x3]\n"
    )


def test_new_and_lost_weights_show():
    program = tiny()
    after = replace(program, weights=program.weights.without("embed.weight"))
    assert diff(program, after) == "--- weights\n-@embed.weight : f32[16, 8] x 1\n"
    assert diff(after, program) == "--- weights\n+@embed.weight : f32[16, 8] x 1\n"


def test_steps_show():
    program = tiny()
    after = replace(program, origin=replace(program.origin, steps=()))
    assert diff(program, after) == "--- steps\n@@ -1 +0,0 @@\n-tie(blocks=1)\n"
