"""Inputs that are left out: what stands for them in a Program, and that text and JSON keep it."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
import transformers
from torch import fx

import reroll
from reroll.errors import ProgramError
from reroll.rewrite.analysis import tolerances
from reroll.rewrite.analysis.tolerances import relative_rms
from reroll.rewrite.ir.defaults import counts_from_zero, reads
from reroll.rewrite.ir.interpret import complete, run
from reroll.rewrite.ir.program import Program
from reroll.rewrite.ir.records import Input, TensorType
from reroll.rewrite.ir.text.compare import diff, fingerprint, same
from reroll.rewrite.ir.text.serialize import program_from_json, program_to_json
from reroll.rewrite.ir.verify import verify
from tests import captured

IDS = torch.tensor([[5, 9, 1, 7, 1, 1], [1, 3, 8, 8, 30, 2]])
MASK = torch.tensor([[1, 1, 1, 1, 0, 0], [0, 0, 1, 1, 1, 1]])


def item(program: Program, name: str) -> Input:
    return next(i for i in program.inputs if i.name == name)


@pytest.mark.parametrize(
    "name", ["llama", "gpt2", "bert", pytest.param("t5", marks=pytest.mark.slow)]
)
def test_what_the_roles_say_needs_no_graph(name):
    assert [i.name for i in captured.flat(name).inputs if i.default is not None] == []


def test_positions_count_from_behind_the_padding_token():
    program = captured.flat("xlm_roberta")
    assert reads(item(program, "position_ids")) == ("input_ids",)
    positions = complete(program, {"input_ids": IDS})["position_ids"]
    assert positions.tolist() == [[2, 3, 1, 4, 1, 1], [1, 2, 3, 4, 5, 6]]
    assert not counts_from_zero(item(program, "position_ids"))


def test_positions_count_what_the_mask_shows():
    program = captured.flat("opt")
    assert reads(item(program, "position_ids")) == ("input_ids", "attention_mask")
    given = complete(program, {"input_ids": IDS, "attention_mask": MASK})
    assert given["position_ids"].tolist() == [[0, 1, 2, 3, -1, -1], [-1, -1, 0, 1, 2, 3]]
    plain = complete(program, {"input_ids": IDS})["position_ids"]
    assert plain.tolist() == [list(range(6))] * 2
    assert counts_from_zero(item(program, "position_ids"))


def test_a_decoder_begins_with_what_the_encoder_reads():
    program = captured.flat("bart")
    model = captured.model("bart")
    given = complete(program, {"input_ids": IDS})
    assert given["decoder_input_ids"].tolist() == [[2, 5, 9, 1, 7, 1], [2, 1, 3, 8, 8, 30]]
    with torch.no_grad():
        expected = model(IDS, use_cache=False).last_hidden_state
    actual = run(program, {"input_ids": IDS})["last_hidden_state"]
    assert relative_rms(actual, expected) < tolerances.forward(torch.float32)


@pytest.mark.parametrize("name", ["xlm_roberta", "opt"])
@pytest.mark.parametrize("masked", [False, True])
def test_the_interpreter_computes_what_the_original_does_without_positions(name, masked):
    inputs = {"input_ids": IDS, **({"attention_mask": MASK} if masked else {})}
    with torch.no_grad():
        expected = captured.model(name)(**inputs, use_cache=False)[0]
    actual = next(iter(run(captured.flat(name), inputs).values()))
    seen = MASK.bool() if masked else torch.ones_like(MASK).bool()
    assert relative_rms(actual[seen], expected[seen]) < tolerances.forward(torch.float32)


def test_one_row_of_positions_stands_for_a_batch():
    row = torch.arange(3, 9)[None]
    given = complete(captured.flat("gpt2"), {"input_ids": IDS, "position_ids": row})
    assert torch.equal(given["position_ids"], row.expand(2, -1))


def test_text_and_json_keep_defaults():
    program = captured.captured("opt")
    text = str(program)
    assert "default position_ids(%input_ids : i64[b, s], %attention_mask : i64[b, t]) {" in text
    again = reroll.parse(text, source=program)
    stored = json.loads(json.dumps(program_to_json(program)))
    for other in (again, program_from_json(stored, program.source)):
        assert str(other) == text
        assert same(other, program)
        given = {"input_ids": IDS, "attention_mask": MASK}
        expected, actual = (complete(p, given)["position_ids"] for p in (program, other))
        assert torch.equal(actual, expected)


def test_programs_with_other_defaults_are_not_the_same():
    program = captured.captured("opt")
    inputs = tuple(replace(i, default=None) for i in program.inputs)
    plain = replace(program, inputs=inputs)
    assert fingerprint(plain) != fingerprint(program)
    assert "default position_ids" in diff(program, plain)


def default(*names: str, weight: bool = False) -> fx.Graph:
    graph = fx.Graph()
    first, *_ = [graph.create_node("placeholder", name, name=name) for name in names]
    value = graph.get_attr("lm_head.weight") if weight else first
    graph.output((value,))
    return graph


@pytest.mark.parametrize(
    ("graph", "reason"),
    [
        (default("position_ids"), "no input before"),
        (default("else"), "no input before"),
        (default("input_ids", weight=True), "reads no weights"),
    ],
)
def test_a_default_that_cannot_be_computed_is_refused(graph, reason):
    program = captured.captured("llama")
    inputs = tuple(
        replace(i, default=graph) if i.name == "position_ids" else i for i in program.inputs
    )
    with pytest.raises(ProgramError, match=reason):
        verify(replace(program, inputs=inputs))


def test_the_text_of_a_default_names_an_input():
    lines = str(captured.captured("opt")).replace("default position_ids(", "default nothing(")
    with pytest.raises(ProgramError, match="no input 'nothing'"):
        reroll.parse(lines)


def test_positions_that_a_default_does_not_make_are_plain():
    assert counts_from_zero(Input("p", TensorType(torch.long, ("b", "s")), "positions"))
    assert not counts_from_zero(Input("p", TensorType(torch.long, ("b", "s")), "zeros"))


class WithoutPositions(transformers.BertModel):
    """A model whose forward names an input that it does not take."""

    def forward(self, input_ids=None, attention_mask=None, position_ids=None, **options):
        if position_ids is not None:
            raise ValueError("positions are not supported")
        return super().forward(input_ids, attention_mask, **options)


def test_an_encoder_that_takes_no_positions_is_captured_without():
    config = transformers.BertConfig(
        vocab_size=64, hidden_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    program = reroll.capture(WithoutPositions(config).eval(), roll=False)
    assert [i.name for i in program.inputs] == ["input_ids", "attention_mask"]
