"""A Program as JSON: round trips, versions, and what is refused."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from hypothesis import HealthCheck, given, settings

from reroll.errors import ProgramError
from reroll.rewrite.ir.records import Origin
from reroll.rewrite.ir.text.compare import same
from reroll.rewrite.ir.text.origin_json import origin_from_json, origin_to_json
from reroll.rewrite.ir.text.serialize import program_from_json, program_to_json
from tests.programs import tiny
from tests.rewrite.ir.program_strategies import programs


def through_json(program):
    return json.loads(json.dumps(program_to_json(program)))


def test_a_program_comes_back():
    program = replace(tiny(), reference=tiny(4).weights)
    back = program_from_json(through_json(program), program.source)
    assert str(back) == str(program)
    assert back.origin == program.origin
    assert back.reference == program.reference


@settings(deadline=None, max_examples=40, suppress_health_check=list(HealthCheck))
@given(programs())
def test_random_programs_come_back(program):
    back = program_from_json(through_json(program))
    assert str(back) == str(program)
    assert same(back, program)


def test_a_newer_format_says_what_to_do():
    data = {**program_to_json(tiny()), "format": 2}
    with pytest.raises(ProgramError, match=r"has format 2.*up to 1(.|\n)*newer reroll"):
        program_from_json(data)


def test_the_places_of_errors_are_named():
    data = program_to_json(tiny())
    data["graphs"][5] = "  %x = aten.nothing(%input_ids)"
    with pytest.raises(ProgramError) as error:
        program_from_json(data)
    assert error.value.where == "graphs: line 6"


@pytest.mark.parametrize(
    "change",
    [
        {"format": None},
        {"format": "1"},
        {"format": True},
        {"format": 0},
        {"dtype": "f33"},
        {"dtype": ["f32"]},
        {"dtype": "none"},
        {"graphs": "graph main() {"},
        {"graphs": [1]},
        {"graphs": []},
        {"weights": None},
        {"weights": {"nodes": [], "weights": []}},
        {"weights": {"nodes": [{"op": "os.system", "args": ["true"]}], "weights": []}},
        {"reference": []},
        {"origin": None},
        {"origin": {}},
        {"code": "import os"},
    ],
    ids=str,
)
def test_wrong_json_is_refused(change):
    with pytest.raises(ProgramError):
        program_from_json({**through_json(tiny()), **change})


@pytest.mark.parametrize("key", ["format", "dtype", "graphs", "weights", "reference", "origin"])
def test_a_missing_key_is_refused(key):
    data = program_to_json(tiny())
    del data[key]
    with pytest.raises(ProgramError):
        program_from_json(data)


@pytest.mark.parametrize("data", [None, [], "x", 1])
def test_other_json_is_refused(data):
    with pytest.raises(ProgramError, match="a program is a JSON object"):
        program_from_json(data)


def test_a_broken_program_is_not_written():
    program = replace(tiny(), outputs=("logits", "loss"))
    with pytest.raises(ProgramError, match="2 outputs are declared"):
        program_to_json(program)


# ---- origin


def test_an_origin_becomes_plain_data():
    origin = Origin("m", config={"id2label": {0: "no"}, "sizes": (1, 2)})
    data = origin_to_json(origin)
    assert data["config"] == {"id2label": {"0": "no"}, "sizes": [1, 2]}
    assert origin_to_json(origin_from_json(data)) == data


def test_what_a_capture_left_out_is_kept_and_older_files_lack_it():
    origin = Origin("m", remarks=("the input pixel_values is left out",))
    assert origin_from_json(origin_to_json(origin)) == origin
    assert "remarks" not in origin_to_json(Origin("m"))


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("model", 1, "model"),
        ("revision", 1, "revision"),
        ("auto_class", "Auto Model", "auto_class"),
        ("auto_class", "torch.load", "auto_class"),
        ("config", [], "config"),
        ("files", {"/etc/passwd": "x"}, "inside the model's directory"),
        ("files", {"a/../../b": "x"}, "inside the model's directory"),
        ("files", {"a\\b": "x"}, "inside the model's directory"),
        ("files", {"": "x"}, "inside the model's directory"),
        ("files", {"a": 1}, "files"),
        ("steps", [{}], r"steps\[0\]"),
        ("steps", [{"text": "", "seconds": "1", "remarks": [], "measured": {}}], "seconds"),
        ("steps", [{"text": "", "seconds": 1, "remarks": [1], "measured": {}}], "remarks"),
        ("remarks", [1], "remarks"),
        ("extra", 1, "unknown key 'extra'"),
    ],
)
def test_a_wrong_origin_is_refused(key, value, words):
    data = {**origin_to_json(tiny().origin), key: value}
    with pytest.raises(ProgramError, match=words):
        origin_from_json(data)


def test_an_origin_holds_json_data_only():
    with pytest.raises(ProgramError, match=r"config\.a: a object is not JSON data"):
        origin_to_json(Origin("m", config={"a": object()}))
    nested: dict[str, object] = {}
    nested["a"] = nested
    with pytest.raises(ProgramError, match="nest deeper"):
        origin_to_json(Origin("m", config=nested))
