from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from reroll.errors import UsageError
from reroll.passes.relax.relax import Relax
from reroll.passes.tie.tie import Tie
from reroll.rewrite.pipeline.base import PASSES
from reroll.rewrite.pipeline.call_text import value_to_text
from reroll.rewrite.pipeline.pipeline import (
    load_recipe,
    parse_pipeline,
    parse_recipe,
    resolve,
    to_recipe,
    to_text,
)
from reroll.rewrite.pipeline.pipeline_parser import RESERVED, WORD, parse_calls
from tests.rewrite.pipeline.example_passes import Colour, Everything, Plain

WORDS = st.from_regex(WORD, fullmatch=True)
SCALARS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.text()
    | WORDS
    | st.sampled_from([*RESERVED, "10", "1e5", "-", "a b", "", "'", '"', "\\", "\n", "é"])
)
VALUES = st.recursive(
    SCALARS,
    lambda v: st.lists(v, max_size=4) | st.dictionaries(st.text() | st.integers(), v, max_size=4),
    max_leaves=12,
)


def value(text: str):
    (call,) = parse_calls(f"p(x={text})")
    return call.options["x"]


@given(VALUES)
def test_values_survive_text(original):
    read = value(value_to_text(original))
    assert read == original
    assert type(read) is type(original)
    assert value_to_text(read) == value_to_text(original)


EVERYTHING = st.builds(
    Everything,
    count=st.integers(),
    ratio=st.floats(allow_nan=False),
    on=st.booleans(),
    word=st.text(),
    choice=st.sampled_from(["up", "down", 3]),
    colour=st.sampled_from(Colour),
    layers=st.lists(st.integers()),
    pair=st.lists(st.floats(allow_nan=False)).map(tuple),
    ranks=st.dictionaries(st.text(), st.integers()),
    nested=st.dictionaries(st.text(), st.lists(st.text())),
    limit=st.none() | st.integers() | st.floats(allow_nan=False) | st.just("full"),
    anything=VALUES,
)


@pytest.fixture(scope="module", autouse=True)
def registered():
    patch = pytest.MonkeyPatch()
    patch.setattr(PASSES, "classes", PASSES.all())
    PASSES.add(Everything)
    PASSES.add(Plain)
    yield
    patch.undo()


@given(st.lists(EVERYTHING | st.builds(Plain), max_size=4))
def test_pipelines_survive_text(original):
    text = to_text(original)
    assert list(parse_pipeline(text)) == original
    assert to_text(parse_pipeline(text)) == text


@given(st.lists(EVERYTHING | st.builds(Plain), max_size=4))
def test_pipelines_survive_recipes(tmp_path_factory, original):
    file = tmp_path_factory.getbasetemp() / "recipe.yaml"
    file.write_text(to_recipe(original), encoding="utf-8")
    assert list(load_recipe(file)) == original


def refusal(text: str) -> UsageError | None:
    try:
        parse_calls(text)
    except UsageError as error:
        return error
    return None


@given(st.text() | st.text(alphabet="ab(){}[]=:,'\"\\ 1.-e\n", max_size=40))
def test_any_text_is_read_or_refused_at_a_place(text):
    error = refusal(text)
    assert error is None or ("column" in str(error.where) and "^" in error.message)


def test_one_declaration_has_three_spellings(tmp_path):
    file = tmp_path / "recipe.yaml"
    file.write_text(
        "passes:\n"
        "  - tie: {blocks: 10, init: average}\n"
        "  - relax: {rank: 64, ranks: {q_proj: 32}}\n"
    )
    expected = (Tie(blocks=10), Relax(ranks={"q_proj": 32}))
    text = "tie(blocks=10, init=average), relax(rank=64, ranks={q_proj: 32})"
    assert resolve(text) == expected
    assert resolve(file) == expected
    assert resolve(str(file)) == expected
    assert resolve(list(expected)) == expected
    assert resolve(["tie(blocks=10)", {"relax": {"ranks": {"q_proj": 32}}}]) == expected
    assert resolve({"tie": {"blocks": 10}}) == expected[:1]
    assert to_text(expected) == "tie(blocks=10), relax(ranks={q_proj: 32})"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("10", 10), ("-3", -3), ("1_000", 1000), ("1e-3", 0.001), (".5", 0.5), ("2.", 2.0),
        ("true", True), ("False", False), ("none", None), ("null", None),
        ("inf", math.inf), ("-inf", -math.inf), ("average", "average"), ("q_proj", "q_proj"),
        ("model.layers.*", "model.layers.*"), ("a-b", "a-b"), ("'a b'", "a b"), ('"a\\n"', "a\n"),
        ("'it\\'s'", "it's"), ("'\"'", '"'), ("[1, [2.5, x], ]", [1, [2.5, "x"]]), ("[]", []),
        ("{}", {}), ("{a: 1, 'b c': [2], 3: x,}", {"a": 1, "b c": [2], 3: "x"}),
        (" [ 1\n,2 ] ", [1, 2]),
    ],
)  # fmt: skip
def test_the_spellings_of_values(text, expected):
    assert value(text) == expected
    assert type(value(text)) is type(expected)


def test_an_empty_pipeline_has_no_passes():
    assert resolve("") == resolve("  \n") == resolve([]) == ()
    assert parse_pipeline("plain, plain(),") == (Plain(), Plain())


@pytest.mark.parametrize(
    ("text", "message", "caret"),
    [
        ("tie(blocks=10) relax", "expected ',' between two passes", "relax"),
        ("tie(blocks 10)", "expected '=' after blocks, found 1", "10"),
        ("tie(blocks=10", "expected ',' or ')' after an option", ""),
        ("tie(blocks=)", "expected a value", ")"),
        ("tie(blocks=10, blocks=3)", "blocks is given twice", "blocks=3"),
        ("tie(10)", "expected the name of an option", "10"),
        ("tie(blocks=[1, 2)", "expected ',' or ']' in a list", ")"),
        ("tie(blocks={a 1})", "expected ':' after a, found 1", "1}"),
        ("tie(blocks={a: 1, a: 2})", "a is given twice", "a: 2"),
        ("tie(blocks={[1]: 1})", "expected a value", "[1]"),
        ("tie(blocks={none: 1})", "a key is a word", "none"),
        ("tie(blocks='abc)", "this string has no end", "'abc"),
        ("tie(blocks='\\q')", "this is not a string", "'\\q"),
        ("tie(blocks=10x)", "expected a value", "10x"),
        ("ite(blocks=10)", "there is no pass 'ite'", "ite"),
        ("tie(blocks=10), relax(rnak=64)", "relax: there is no option 'rnak'", "rnak"),
        ("tie(blocks=ten)", "tie: blocks must be an integer", "blocks"),
        ("relax, tie", "tie: blocks has to be given", "tie"),
        ("tie(blocks=0)", "tie: blocks must be an integer, 1 or more, not 0", "blocks"),
        ("plain, !", "expected the name of a pass", "!"),
    ],
)
def test_errors_point_at_the_place(text, message, caret):
    with pytest.raises(UsageError) as caught:
        parse_pipeline(text)
    first, line, mark = caught.value.message.split("\n")
    assert message in first
    assert line == f"  {text}"
    column = len(text) if not caret else text.rindex(caret) if caret != "tie" else 7
    assert mark.index("^") - 2 == column
    assert caught.value.where == f"pipeline, column {column + 1}"


def test_errors_in_long_and_in_many_lines_show_the_line():
    with pytest.raises(UsageError) as caught:
        parse_pipeline("plain,\nplain,\n" + "plain, " * 40 + "oops")
    assert caught.value.where == f"pipeline, line 3, column {40 * 7 + 1}"
    _, line, mark = caught.value.message.split("\n")
    assert len(line) < 110
    assert line[mark.index("^") :] == "oops"


def test_absurd_input_is_refused_quickly():
    for text in ("p(x=" + "[" * 10**5, "p(x=" + "9" * 10**5 + ")", "p(x=" + "{a:" * 10**5):
        with pytest.raises(UsageError):
            parse_calls(text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[1, 2]", "no list of passes"),
        ("passes: 3", "no list of passes"),
        ("passes: [3]", "recipe.yaml, pass 1: 3 is not a pass"),
        ("passes: [{tie: {blocks: 3}, relax: {}}]", "one pass is a mapping"),
        ("passes: [{tie: 3}]", "the options of tie are a mapping"),
        ("passes: [plain, {tie: {blocks: ten}}]", "pass 2, pass tie, option blocks"),
        ("passes: [{tei: {}}]", "did you mean tie"),
        ("passes: [plain(x=1)]", "no option 'x'"),
        ("passes: [{{", "the recipe is not YAML"),
        ("passes: [!!python/object/apply:os.system [ls]]", "the recipe is not YAML"),
        ("passes: " + "[" * 5000, "the recipe is not YAML"),
    ],
)
def test_wrong_recipes_say_where(tmp_path, text, message):
    file = tmp_path / "recipe.yaml"
    file.write_text(text)
    with pytest.raises(UsageError) as caught:
        load_recipe(file)
    assert message in str(caught.value)


def test_recipes_may_hold_pipeline_text_and_passes_without_options(tmp_path):
    data = {"passes": ["plain", "tie(blocks=2), relax", {"plain": None}]}
    assert parse_recipe(data) == (Plain(), Tie(blocks=2), Relax(), Plain())
    with pytest.raises(UsageError, match="cannot be read"):
        load_recipe(tmp_path / "none.yaml")
