"""Numbers that users give: out of range, they are refused before any work, in our own words."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

import numpy as np
import pytest
import typer

import reroll
from reroll.bounds import COUNT, LARGEST, SHARE, Range, check_number
from reroll.cli.app import app
from reroll.errors import UsageError
from reroll.evaluate.classifiers import fit_exits
from reroll.evaluate.compare import compare
from reroll.evaluate.exits import calibrate
from reroll.evaluate.generation import generate
from reroll.evaluate.harness import Harness
from reroll.evaluate.measure import measures
from reroll.evaluate.serving import compare_serving
from reroll.evaluate.suite import evaluate
from reroll.export.targets import registered as targets
from reroll.mixers.registry import registered as mixers
from reroll.recover import recover
from reroll.recover.recipe import Settings
from reroll.recover.sampling import sampled_texts
from reroll.recover.stage import stages
from reroll.rewrite.pipeline.base import PASSES
from reroll.rewrite.pipeline.declared import Declared
from reroll.rewrite.pipeline.options import REQUIRED, Option
from reroll.runtime.depthwise import DepthScheduler
from reroll.runtime.functions.trips import sample_trips
from tests import tiny
from tests.test_cli import refused, run

NAN, INF, HUGE = float("nan"), float("inf"), 10**30
COUNTS = (0, -1, 1.5, NAN, HUGE, "many", None, True)


# ---- ranges


@pytest.mark.parametrize(
    ("within", "inside", "outside"),
    [
        (COUNT, (1, LARGEST, np.int64(3)), (0, -1, LARGEST + 1, 10**400)),
        (SHARE, (0, 1, 0.5, np.float32(0.5)), (-0.1, 1.1, NAN, INF, -INF)),
        (Range(above=0, below=1), (0.5,), (0, 1, NAN)),
        (Range(), (1e300, -5, 10**400), (NAN, INF)),
    ],
)
def test_a_range_holds_its_numbers(within: Range, inside: Any, outside: Any) -> None:
    for number in inside:
        check_number("x", number, within, integer=within is COUNT)
    for number in outside:
        with pytest.raises(UsageError, match=r"^x must be "):
            check_number("x", number, within, integer=within is COUNT)


def test_a_refusal_says_what_would_be_right() -> None:
    for number, words in (
        (0, "an integer, 1 or more, not 0"),
        (HUGE, f"at most {LARGEST}, not 1000"),
    ):
        with pytest.raises(UsageError, match=f"here: size must be {words}"):
            check_number("size", number, COUNT, "here")
    with pytest.raises(UsageError, match="not one of thousands of digits"):
        check_number("size", 10**5000, COUNT)


# ---- whatever is declared by its options: passes, mixers, targets, stages, measures

DECLARED: list[type[Declared]] = [
    *PASSES.all().values(), *mixers().values(), *targets().values(), *stages().values(),
    *measures().values(), Harness, Settings,
]  # fmt: skip
# infinite thresholds let nobody leave; a `keep` is several things, and checked by `check_keep`
FREE = {"threshold", "keep"}


def _leaves(annotation: Any) -> set[Any]:
    args = get_args(annotation)
    return {annotation} if not args else set().union(*map(_leaves, args))


NUMBERS = [
    pytest.param(cls, option, id=f"{cls.category}-{cls.name}-{option.name}")
    for cls in DECLARED
    for option in cls.options().values()
    if {int, float} & _leaves(option.type) and option.name not in FREE | {"mixer_options"}
]


@pytest.mark.parametrize(("cls", "option"), NUMBERS)
def test_options_out_of_range_are_refused(cls: type[Declared], option: Option) -> None:
    within = option.within
    assert within is not None, "a number has a range"
    whole = float not in _leaves(option.type)
    wrong: list[Any] = [NAN, INF, -INF, "many", [], [NAN]]
    for bound, off in ((within.least, -1), (within.above, 0), (within.most, 1), (within.below, 0)):
        if bound is not None:
            wrong.append(bound + off if whole else float(bound + off))
    if not _is_list(option.type):
        wrong.append([1])
    needed = {o.name: _fitting(o) for o in cls.options().values() if _is_required(o)}
    for value in wrong:
        with pytest.raises(UsageError) as error:
            cls.make({**needed, option.name: value})
        assert f"option {option.name}" in str(error.value.where)
        assert cls.name in str(error.value.where)


def _is_list(annotation: Any) -> bool:
    origin, args = get_origin(annotation), get_args(annotation)
    return origin is list or (origin in (Union, UnionType) and any(map(_is_list, args)))


def _is_required(option: Option) -> bool:
    return option.default is REQUIRED


def _fitting(option: Option) -> Any:
    return next((v for v in (1, [1], ["a"], "a") if _fits(option, v)), None)


def _fits(option: Option, value: Any) -> bool:
    try:
        option.convert(value, "test")
    except UsageError:
        return False
    return True


@pytest.mark.parametrize("keep", [0, -7, 1.5, 0.0, NAN, [-1], "auto:2", "auto:nan", "most"])
@pytest.mark.parametrize("name", ["window", "linearize"])
def test_what_stays_is_checked_before_there_is_a_model(name: str, keep: Any) -> None:
    with pytest.raises(UsageError) as error:
        PASSES.all()[name].make({"keep": keep})
    assert error.value.where == f"pass {name}, option keep"


def test_options_of_mixers_are_checked_with_the_pass() -> None:
    for options in ({"slots": 0}, {"slots": HUGE}, {"slot": 4}):
        with pytest.raises(UsageError, match="slot"):
            PASSES.all()["linearize"].make({"mixer": "gsa", "mixer_options": options})


# ---- functions

PROGRAM = reroll.capture(tiny.llama())


def _generate(**options: Any) -> None:
    generate(None, None, ["a"], **options)


CALLS: list[tuple[Callable[..., Any], str, tuple[Any, ...]]] = [
    *((_generate, name, COUNTS[:-2]) for name in ("max_new_tokens", "beams", "top_k")),
    (_generate, "temperature", (0, -1, NAN, INF, "hot")),
    (_generate, "top_p", (0, 1.1, NAN, "all")),
    (_generate, "seed", (-1, HUGE, 0.5)),
    *(
        (lambda **options: compare("a", "b", **options), name, COUNTS[:-2])
        for name in ("length", "max_tokens", "batch")
    ),
    (lambda **options: compare("a", "b", **options), "length", (7,)),
    (lambda **options: compare("a", "b", **options), "seed", (-1,)),
    (lambda **options: evaluate("a", **options), "seed", (-1, HUGE, 0.5)),
    (lambda **options: evaluate("a", **options), "limit", COUNTS[:-2]),
    (lambda **options: calibrate(PROGRAM, [1], **options), "risk", (0, 1, -1, NAN, "low")),
    (lambda **options: calibrate(PROGRAM, [1], **options), "confidence", (0, 1, NAN)),
    (lambda **options: fit_exits(None, [1], **options), "steps", COUNTS),
    (lambda **options: fit_exits(None, [1], **options), "decay", (-1, NAN, INF)),
    (lambda **options: DepthScheduler(None, **options), "slots", COUNTS),
    (lambda **options: DepthScheduler(None, **options), "length", COUNTS),
    (lambda **options: DepthScheduler(None, **options), "mode", ("deep", 1)),
    *(
        (lambda **options: compare_serving(None, [[1]], **options), name, COUNTS)
        for name in ("slots", "tokens", "rounds")
    ),
    (lambda **options: sample_trips(**{"mean": 2.0, **options}), "mean", (0, -1, NAN, INF, "two")),
    (lambda **options: sample_trips(2.0, **options), "backprop", COUNTS),
    (lambda **options: sample_trips(2.0, **options), "spread", (-1, NAN, INF)),
    (lambda **options: reroll.run_passes(PROGRAM, [], **options), "seed", (-1, HUGE, 0.5, "x")),
    (lambda **options: reroll.run_passes(PROGRAM, [], **options), "measure", ("maybe", 3)),
    (lambda **options: reroll.run_passes(PROGRAM, [], **options), "text", (3, b"text")),
    (
        lambda **options: reroll.run_passes(PROGRAM, [], **options),
        "stop_after",
        (-1, 3, 0.5, "x", True),
    ),
    (
        lambda **options: recover("a", "b", data=[], recipe="c", **options),
        "tokens",
        (0, -5, NAN, INF, "1M"),
    ),
    *(
        (
            lambda **options: next(
                sampled_texts(None, None, **{"tokens": 1, "length": 1, "batch": 1, **options})
            ),
            name,
            COUNTS,
        )
        for name in ("tokens", "length", "batch")
    ),
]


@pytest.mark.parametrize(
    ("call", "name", "values"), CALLS, ids=lambda v: v if type(v) is str else ""
)
def test_arguments_out_of_range_are_refused(
    call: Callable[..., Any], name: str, values: tuple[Any, ...]
) -> None:
    words = name.replace("_", "[_ ]")
    for value in values:
        with pytest.raises(UsageError, match=words):
            call(**{name: value})


# ---- commands

NUMERIC = {
    "compare a b": {"length": 8, "max-tokens": 0, "batch": 1},
    "generate a --prompt b": {"max-new-tokens": 1, "top-k": 1, "beams": 1, "seed": 0},
    "calibrate a --text b": {"max-tokens": 1},
    "convert a b": {"seed": 0},
    "diff a b": {"context": 0},
    "evaluate a": {"limit": 1, "seed": 0},
    "sample a b.jsonl --tokens 5": {"length": 1, "batch": 1, "seed": 0},
    "serve-bench a --text b": {
        "slots": 1, "queue": 1, "prompt-tokens": 1, "max-new-tokens": 2, "rounds": 1, "threads": 1,
    },
}  # fmt: skip
REAL = {
    "generate a --prompt b": ("temperature", "top-p"),
    "calibrate a --text b": ("risk", "confidence"),
}


@pytest.mark.parametrize("words", NUMERIC)
def test_commands_refuse_numbers_out_of_range(
    words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In three lines, with status 2, before any model is looked for, and with nothing written."""
    monkeypatch.chdir(tmp_path)
    cases = [
        (name, value)
        for name, least in NUMERIC[words].items()
        for value in (least - 1, "nan", HUGE)
    ]
    cases += [(name, value) for name in REAL.get(words, ()) for value in ("0", "nan", "inf", "x")]
    for name, value in cases:
        told = refused(*words.split(), f"--{name}", value)
        lines = told.splitlines()
        assert lines[0].startswith(f"error: Invalid value for '--{name}'"), told
        assert "must be " in lines[0]
        assert lines[1] == f"where: reroll {words.split()[0]}"
        assert lines[2].startswith("hint: ")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("value", ["1.5", "many", "", "9" * 5000, "True", "0x8"])
def test_what_is_no_integer_is_refused(value: str) -> None:
    assert "must be an integer" in refused("compare", "a", "b", f"--batch={value}")


@pytest.mark.parametrize("tokens", ["0", "-5", "nan", "1e3", "0.0001k", "9" * 400, "5G", ""])
def test_tokens_are_a_number(tokens: str) -> None:
    for words in (
        ["recover", "a", "b", "--data", "c", "--recipe", "d"],
        ["sample", "a", "b.jsonl"],
    ):
        assert "is not a number of tokens" in refused(*words, f"--tokens={tokens}")


def test_what_cannot_be_read_is_told_alike() -> None:
    for words in (["convert"], ["convert", "a", "b", "--no-such"], ["no-such"], ["generate", "a"]):
        lines = refused(*words).splitlines()
        assert [line.split(":")[0] for line in lines] == ["error", "where", "hint"], lines


def test_help_says_the_range() -> None:
    assert "8 or more" in run("compare", "--help").stdout
    assert "an integer (1 or more)" in run("passes", "window").stdout


def test_every_number_of_every_command_is_tried() -> None:
    """An option that is added is tried too."""
    tried = {w.split()[0]: {*names, *REAL.get(w, ())} for w, names in NUMERIC.items()}
    for name, each in typer.main.get_command(app).commands.items():  # type: ignore[attr-defined]
        found = {p.opts[0][2:] for p in each.params if p.metavar in ("INTEGER", "NUMBER")}
        assert found == tried.get(name, set())
        numbers = [k for k, v in get_type_hints(each.callback).items() if {int, float} & _leaves(v)]
        assert {n.replace("_", "-") for n in numbers} == found, (
            "reroll.cli.options declares numbers"
        )
