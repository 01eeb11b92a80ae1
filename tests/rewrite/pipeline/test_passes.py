from __future__ import annotations

import dataclasses
import json
from typing import Literal

import pytest

from reroll.errors import UsageError
from reroll.rewrite.ir import lowerings
from reroll.rewrite.pipeline import registry
from reroll.rewrite.pipeline.base import PASSES, Pass, option
from tests.rewrite.pipeline.example_passes import Colour, Everything, Plain


def test_fields_are_options_with_their_documentation():
    options = Everything.options()
    assert list(options)[:3] == ["count", "ratio", "on"]
    assert options["ratio"].help == "a fraction"
    assert options["ratio"].kind == "a number"
    assert options["choice"].kind == "one of up, down, 3"
    assert options["colour"].kind == "one of red, green"
    assert options["ranks"].kind == "a mapping of strings to integers"
    assert options["limit"].kind == "an integer or a number or one of full or none"


def test_the_declaration_is_json_data():
    data = json.loads(json.dumps(Everything.describe()))
    assert (data["name"], data["contract"], data["requires"]) == ("everything", "exact", [])
    assert data["summary"] == "Has an option of every kind."
    assert "second paragraph" in data["documentation"]
    assert data["options"][0] == {
        "name": "count",
        "kind": "an integer",
        "required": True,
        "default": None,
        "help": "a number that has to be given",
    }
    assert {"name": "colour", "default": "red"}.items() <= data["options"][5].items()


def test_passes_are_values():
    assert Everything(count=1) == Everything(count=1, ratio=0.5)
    assert Everything(count=1) != Everything(count=2)
    with pytest.raises(dataclasses.FrozenInstanceError):
        Everything(count=1).count = 2


def test_values_are_taken_in_their_declared_type():
    made = Everything(count=1, ratio=2, pair=[1, 2], colour="green", limit=3, choice=3)
    assert type(made.ratio) is float
    assert made.pair == (1.0, 2.0)
    assert made.colour is Colour.GREEN
    assert type(made.limit) is int
    assert made.choice == 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"count": 1.0}, "option count: count must be an integer, not 1.0"),
        ({"count": True}, "must be an integer, not true"),
        ({"count": "10"}, "must be an integer, not '10'"),
        ({"count": 1, "on": 1}, "on must be true or false, not 1"),
        ({"count": 1, "ratio": float("nan")}, "ratio must be a number"),
        ({"count": 1, "word": 3}, "word must be a string, not 3"),
        (
            {"count": 1, "choice": "dwon"},
            "one of up, down, 3, not dwon\n  hint: did you mean down?",
        ),
        ({"count": 1, "choice": 3.0}, "one of up, down, 3"),
        ({"count": 1, "colour": "gren"}, "did you mean green"),
        ({"count": 1, "layers": [1, "a"]}, "a list of integers"),
        ({"count": 1, "layers": 1}, "a list of integers"),
        ({"count": 1, "ranks": {"a": 1.5}}, "a mapping of strings to integers"),
        ({"count": 1, "ranks": {1: 1}}, "a mapping of strings to integers"),
        ({"count": 1, "limit": "ful"}, "did you mean full"),
        ({"count": 1, "limit": False}, "not false"),
        ({}, "count has to be given: an integer"),
        ({"count": 1, "ratoi": 1}, "no option 'ratoi'\n  hint: did you mean ratio"),
    ],
)
def test_wrong_options_are_named_with_what_is_allowed(options, message):
    with pytest.raises(UsageError) as caught:
        Everything.make(options)
    assert message in str(caught.value)
    assert str(caught.value).startswith("pass everything")


def test_a_pass_without_options_says_so():
    with pytest.raises(UsageError, match="this pass has no options"):
        Plain.make({"rank": 3})


def test_a_pass_may_check_its_options_together():
    class Bounded(Plain):
        low: int = option(0)
        high: int = option(1)

        def check(self) -> None:
            if self.low > self.high:
                raise UsageError("low is above high")

    with pytest.raises(UsageError, match="low is above high"):
        Bounded(low=3)


def test_only_options_that_differ_from_their_defaults_are_given():
    made = Everything(count=1, colour="green", ratio=0.5, pair=(1,))
    assert made.changed_options() == {"count": 1, "colour": "green", "pair": [1.0]}


def test_every_pass_of_the_folder_is_found():
    assert {"tie", "relax", "fold_norms"} <= set(PASSES.all())
    assert PASSES.find("tie").__module__ == "reroll.passes.tie.tie"


def test_an_unknown_pass_is_an_error_with_the_nearest_name():
    with pytest.raises(UsageError, match="no pass 'relaxx'\n  hint: did you mean relax"):
        PASSES.find("relaxx")


def test_two_passes_of_one_name_are_an_error(passes):
    class Other(Plain):
        name = "tie"

    with pytest.raises(UsageError, match="two passes called 'tie'"):
        passes(Other)


def test_an_odd_name_is_an_error(passes):
    class Odd(Plain):
        name = "odd name"

    with pytest.raises(UsageError, match="not a name for a pass"):
        passes(Odd)


SOURCE = '''
from __future__ import annotations
from reroll.rewrite.pipeline.base import Context, Pass, option
from reroll.rewrite.ir.program import Program

class Mine(Pass):
    """Mine."""

    name = "mine"
    amount: {kind} = option(1, help="how much")

    def run(self, program: Program, context: Context) -> Program:
        return program
'''


@pytest.fixture
def my_file(passes, tmp_path):
    file = tmp_path / "my_passes.py"
    file.write_text(SOURCE.format(kind="int"))
    return file


def test_a_file_of_the_users_is_loaded(my_file):
    (mine,) = registry.load_file(my_file)
    assert PASSES.find("mine") is mine
    assert mine.make({"amount": 2}).amount == 2


def test_loading_a_file_again_takes_its_new_contents(my_file):
    registry.load_file(my_file)
    my_file.write_text(SOURCE.format(kind="float"))
    (mine,) = registry.load_file(str(my_file))
    assert PASSES.find("mine").options()["amount"].kind == "a number"
    assert mine is PASSES.find("mine")


def test_files_of_one_name_do_not_replace_each_other(my_file, tmp_path):
    registry.load_file(my_file)
    (tmp_path / "other").mkdir()
    other = tmp_path / "other" / "my_passes.py"
    other.write_text(SOURCE.format(kind="int"))
    with pytest.raises(UsageError, match="two passes called 'mine'") as caught:
        registry.load_file(other)
    assert str(other) in str(caught.value)
    assert str(my_file) in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x = 1", "defines no pass"),
        ("from reroll.passes.tie.tie import Tie", "defines no pass"),
        ("1/0", "ZeroDivisionError"),
        ("def f(:", "SyntaxError"),
        (SOURCE.format(kind="nothing"), "name 'nothing' is not defined"),
        (SOURCE.format(kind="set[int]"), "type set.int., which text cannot hold"),
    ],
)
def test_a_file_that_is_no_good_is_named(passes, tmp_path, text, message):
    file = tmp_path / "bad.py"
    file.write_text(text)
    with pytest.raises(UsageError, match=message) as caught:
        registry.load_file(file)
    assert str(file) in str(caught.value)


def test_a_file_may_only_give_lowerings(tmp_path, monkeypatch):
    monkeypatch.setattr(lowerings, "_lowerings", dict(lowerings._lowerings))
    file = tmp_path / "lowerings.py"
    file.write_text(
        "from reroll.rewrite.ir.lowerings import lowering\n"
        '@lowering("onnx", "my::op.default")\ndef op(g, node, x):\n    return x\n'
    )
    assert registry.load_file(file) == ()
    assert lowerings.from_file(str(file)) == ["my::op.default"]


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(UsageError, match="no such file"):
        registry.load_file(tmp_path / "none.py")


class Point:
    """Stands for an entry point of another distribution."""

    def __init__(self, name, loaded):
        self.name, self.value, self.loaded = name, f"other:{name}", loaded

    def load(self):
        if isinstance(self.loaded, Exception):
            raise self.loaded
        return self.loaded


@pytest.fixture
def entry_points(monkeypatch):
    def install(*points):
        monkeypatch.setattr(PASSES, "classes", {})
        monkeypatch.setattr(PASSES, "failures", [])
        monkeypatch.setattr(PASSES, "_discovered", False)
        monkeypatch.setattr(registry, "entry_points", lambda group: points)

    PASSES.all()
    return install


def test_entry_points_are_modules_or_classes(entry_points):
    from tests.rewrite.pipeline import example_passes

    entry_points(Point("a", example_passes))
    assert PASSES.find("everything") is Everything
    entry_points(Point("b", Plain))
    assert PASSES.find("plain") is Plain
    assert PASSES.find("tie")


def test_a_broken_entry_point_leaves_the_others_alone_and_is_named(entry_points, caplog):
    entry_points(Point("broken", ImportError("no module named x")), Point("b", Plain))
    assert PASSES.find("plain") is Plain
    assert "broken" in caplog.text
    with pytest.raises(UsageError, match=r"other:broken\) failed: no module named x"):
        PASSES.find("theirs")


def test_the_summary_and_kind_of_an_undocumented_pass_are_empty():
    class Silent(Pass):
        name = "silent"
        mode: Literal["a"] = option("a")

        def run(self, program, context):
            return program

    assert Silent.summary() == ""
    assert Silent.options()["mode"].help == ""


def test_a_loaded_file_that_is_no_good_registers_nothing(passes, tmp_path):
    file = tmp_path / "bad.py"
    file.write_text(SOURCE.format(kind="set[int]"))
    with pytest.raises(UsageError):
        registry.load_file(file)
    assert "mine" not in PASSES.all()
