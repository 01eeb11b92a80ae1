"""The text of a Program: what it looks like, that it parses back, and what it refuses."""

from __future__ import annotations

import subprocess
import sys
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM

from reroll.errors import ProgramError
from reroll.rewrite.capture.export import capture
from reroll.rewrite.checkpoint import MemorySource
from reroll.rewrite.ir.text import op_names
from reroll.rewrite.ir.text.compare import same
from reroll.rewrite.ir.text.parser import parse
from reroll.rewrite.ir.text.printer import to_text
from reroll.rewrite.ir.verify import verify
from tests.programs import tiny
from tests.rewrite.ir.program_strategies import programs

CORPUS = Path(__file__).parents[2] / "corpus" / "programs"
GOLDEN = """\
program dtype=f32 model="tiny"
input input_ids : i64[b, s] role=data
output logits

graph main(%input_ids) {
  %embedding_default = aten.embedding(@embed.weight, %input_ids) : f32[b, s, 8]
  %loop = loop layers(%embedding_default) inputs((none, 0.5)) trips=2
  %getitem = getitem(%loop, 0) : f32[b, s, 8]
  %linear_default = aten.linear(%getitem, @embed.weight) : f32[b, s, 16]
  return %linear_default
}

body layers(%h : f32[b, s, 8], %bound) period=1 {
  %rms_norm_default = reroll.rms_norm(%h, @layers.*.norm.weight, 1e-05) : f32[b, s, 8]
  %linear_default = aten.linear(%rms_norm_default, @layers.*.proj.weight) : f32[b, s, 8]
  %clamp_default = aten.clamp(%linear_default, max=%bound) : f32[b, s, 8]
  %add_tensor = aten.add.Tensor(%h, %clamp_default) : f32[b, s, 8]
  return %add_tensor
}

weights {
"""


def test_a_program_prints_as_expected():
    assert str(tiny(2)).startswith(GOLDEN)


def test_a_program_parses_back():
    program = tiny()
    parsed = parse(str(program), program.source)
    assert str(parsed) == str(program)
    assert same(parsed, program)
    assert parsed.origin == program.origin
    assert parsed.weights == program.weights
    assert parsed.inputs == program.inputs


def test_reference_weights_parse_back():
    program = replace(tiny(), reference=tiny(5).weights)
    parsed = parse(str(program))
    assert parsed.reference == program.reference
    assert str(parsed) == str(program)


@settings(deadline=None, suppress_health_check=list(HealthCheck))
@given(programs())
def test_random_programs_parse_back(program):
    verify(program)
    text = to_text(program)
    parsed = parse(text)
    assert to_text(parsed) == text
    assert same(parsed, program)


@pytest.mark.parametrize("roll", [False, True])
def test_a_captured_model_parses_back(roll):
    config = LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=32,
    )  # fmt: skip
    program = capture(LlamaForCausalLM(config).eval(), roll=roll)
    verify(program)
    text = to_text(program)
    parsed = parse(text, program.source)
    assert to_text(parsed) == text
    assert same(parsed, program)
    assert parsed.origin == program.origin
    assert [loop.trips for loop in parsed.loops] == [3] * roll


def test_comments_and_blank_lines_are_skipped():
    text = str(tiny()).replace("  return %add", "\n  # the residual\n  return %add")
    assert same(parse(f"# a model\n{text}"), tiny())


def test_names_that_python_reserves_are_renamed():
    text = str(tiny()).replace("%getitem", "%slice").replace("%loop", "%if")
    assert same(parse(text), tiny())


def test_a_weight_cannot_take_the_name_of_a_later_node():
    text = str(tiny()).replace("%linear_default", "%embed_weight")
    assert str(parse(text)) == text


# ---- what is refused


def hostile() -> list[Path]:
    return sorted(CORPUS.glob("*.txt"))


@pytest.mark.parametrize("path", hostile(), ids=lambda path: path.stem)
def test_hostile_text_is_refused_with_its_line(path):
    # the first line of each file says which line is at fault, and words of the error
    heading, _, _ = path.read_text().partition("\n")
    line, _, words = heading.removeprefix("# line ").partition(": ")
    with pytest.raises(ProgramError) as error:
        parse(path.read_text())
    assert (error.value.where or "").split(":")[0] == f"line {line}"
    assert words in str(error.value)


CHANGES = [
    ("aten.linear(", "aten.liner(", "nearest name is 'aten.linear'"),
    ("aten.linear(", "aten.add(", "write the overload: aten.add.Scalar, aten.add.Tensor"),
    ("aten.linear(", "os.system(", "unknown op 'os.system'"),
    ("aten.linear(", "builtins.eval(", "unknown op"),
    ("aten.linear(", "aten.__init__(", "private"),
    ("aten.linear(", "aten.linear.__call__(", "unknown op"),
    ("aten.linear(", "aten.save(", "unknown op"),
    ("aten.linear(", "aten.from_file(", "reaches beyond tensors"),
    ("aten.linear(", "aten.relu_(", "in place"),
    ("aten.linear(", "torch.ops.aten.linear(", "unknown op"),
    ("aten.linear(", "reroll.loop(", "unknown op"),
    ("aten.linear(%getitem", "aten.linear(%embeding_default", "nearest name is %embedding_default"),
    ("aten.linear(%getitem", "aten.linear(%linear_default", "used before it is defined"),
    ("aten.linear(%getitem", "aten.linear(%h", "is not defined"),
    ("aten.linear(%getitem, @embed.weight)", "aten.linear(%getitem)", "needs the argument"),
    ("aten.linear(%getitem", 'aten.linear("x"', "takes Tensor for 'input'"),
    ("%getitem = ", "%loop = ", "defined twice"),
    ("%getitem = ", "getitem = ", "the name of a node"),
    ("getitem(%loop, 0)", "getitem(%loop, 1)", "takes result 1"),
    ("@embed.weight)", "@lm_head.weight)", "there is no weight @lm_head.weight"),
    ("@embed.weight)", "@layers.*.norm.weight)", "is stacked for 3 trips, and used outside loops"),
    ("loop layers", "loop layer", "there is no body 'layer'"),
    ("trips=3", "trips=4", "3 values for 4 trips"),
    ("trips=3", "trips=0", "from 1 to 65,536 trips"),
    ("trips=3", "trips=1e9", "an integer is needed"),
    (" inputs((none, 0.5, 1.0))", "", "takes 2 values"),
    (" inputs((none, 0.5, 1.0))", " inputs(1.0)", None),
    ("  return %linear_default\n", "", "must end with a return"),
    ("  return %linear_default\n", "  return\n", "0 values; 1 outputs"),
    ("output logits\n", "", "1 values; 0 outputs"),
    ("input input_ids : i64[b, s] role=data\n", "", "takes 1 inputs"),
    ("role=data", "role=data 1", "the end of the line"),
    ("f32[b, s, 16]", "f33[b, s, 16]", "a dtype is needed"),
    ("graph main(%input_ids) {", "graph main(%input_ids) ", "'{' is needed"),
    ("period=1", "period=0", "period"),
    ("1e-05", "1e-05" + "0" * 99, "too many digits"),
    ("1e-05", "1e999", "beyond a float"),
    ("0.5, 1.0", f"0.5, {2**64}", "64 bits"),
    ("0.5, 1.0", "0.5, (1.0)", "needs a comma"),
    ("0.5, 1.0", "0.5, " + "[" * 1000 + "]" * 1000, "nest deeper"),
    ("0.5, 1.0", '0.5, "\\x"', "is not a string"),
    ("0.5, 1.0", '0.5, device("warp")', "not a device"),
    ('source("embed.weight"', 'rm("embed.weight"', "line 22"),
    ('"config": {', '"config": {,', "not JSON"),
    ('"config": {', '"confg": {', "missing"),
    ('"AutoModelForCausalLM"', '"os.system"', "auto class"),
    ('"files": {}', '"files": {"../x": "/etc/passwd"}', "inside the model's directory"),
    ('"files": {}', '"files": ' + '{"a":' * 99999 + "1" + "}" * 99999, "nests too deep"),
    ("origin {", "origin {\n}\norigin {", "missing"),
    ("weights {", "weights {\n}\nweights {", "twice"),
    ("weight layers.*.norm.weight", "weight layers.norm.weight", "line 21: 'layers.norm.weight'"),
    ("body layers(", "body main(", "no body 'layers'"),
    ("program dtype", "programme dtype", "no line starts with 'programme'"),
]


@pytest.mark.parametrize(("old", "new", "words"), CHANGES, ids=range(len(CHANGES)))
def test_a_wrong_program_is_refused(old, new, words):
    text = str(tiny())
    assert old in text
    text = text.replace(old, new, 1)
    if words is None:
        assert str(parse(text)) == text
        return
    with pytest.raises(ProgramError) as error:
        parse(text)
    assert words in str(error.value)
    assert (error.value.where or "").startswith(("line ", "at the last line"))


@settings(deadline=None, max_examples=300)
@given(st.data())
def test_damaged_text_parses_or_is_a_program_error(data):
    text = str(tiny())
    start = data.draw(st.integers(0, len(text)))
    stop = data.draw(st.integers(start, min(start + 20, len(text))))
    junk = data.draw(st.text('%@"()[]{},:=\n aten.add0e9-\\', max_size=8))
    with suppress(ProgramError):
        verify(parse(text[:start] + junk + text[stop:]))


def test_sizes_are_limited():
    for text in ("\n" * 2**20, "x" * (2**27 + 1), "program " + " " * 2**20):
        with pytest.raises(ProgramError, match="more than"):
            parse(text)


def test_weights_must_fit_the_source():
    program = tiny()
    with pytest.raises(ProgramError, match=r"there is no tensor 'embed\.weight'"):
        parse(str(program), MemorySource({}))
    tensors = {name: program.source.load(name) for name in program.source.names()}
    tensors["embed.weight"] = torch.zeros(2, 2)
    with pytest.raises(ProgramError, match=r"is f32\[2, 2\] in the checkpoint"):
        parse(str(program), MemorySource(tensors))


def test_what_no_program_holds_prints_and_is_refused():
    program = tiny().edit()
    node = next(n for n in program.graph.nodes if n.op == "call_function")
    node.target = torch.nn.functional.embedding
    assert "?<function embedding" in str(program)
    with pytest.raises(ProgramError):
        parse(str(program))


# ---- namespaces


def test_a_registered_namespace_is_found():
    torch.library.define("reroll_test_ns::double", "(Tensor x) -> Tensor")
    text = str(tiny()).replace(
        "aten.linear(%getitem, @embed.weight)", "reroll_test_ns.double(%getitem)"
    )
    with pytest.raises(ProgramError, match="unknown op"):
        parse(text)
    op_names.register_namespace("reroll_test_ns")
    try:
        assert "reroll_test_ns.double(%getitem)" in str(parse(text))
    finally:
        op_names._namespaces.discard("reroll_test_ns")
        op_names.resolve.cache_clear()


@pytest.mark.parametrize("name", ["os.path", "_private", "", "a b"])
def test_a_namespace_has_a_plain_name(name):
    with pytest.raises(ProgramError):
        op_names.register_namespace(name)


def test_every_name_resolves_to_its_function():
    for name, function in op_names.FUNCTIONS.items():
        assert op_names.op_name(function) == name
        assert op_names.resolve(name) is function


def test_operators_of_transformers_are_there_in_a_fresh_process():
    name = "transformers.grouped_mm_fallback"
    code = (
        f"from reroll.rewrite.ir.text import op_names as o; print(o.op_name(o.resolve({name!r})))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == name
