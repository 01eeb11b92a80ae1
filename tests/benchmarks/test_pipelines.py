"""Pipelines and recoveries of a file of cases: templates, what is chosen, what is trained."""

from __future__ import annotations

from argparse import Namespace
from typing import Any

from benchmarks import pipelines
from benchmarks.__main__ import loaded

TEMPLATES = {
    "{blocks} blocks, rank {rank}": "tie(blocks={blocks}), relax(rank={rank})",
    "{layers} layers left": "loop_core(prelude=0, core={layers}, coda=0, trips=1)",
}


def chosen(**changes: Any) -> Namespace:
    base = {"name": ["relaxed"], "passes": "", "only": "", "pipelines": TEMPLATES}
    return Namespace(**{**base, "blocks": (2, 5), "rank": ("4",), "layers": ("3",), **changes})


def test_templates_take_every_choice_of_values():
    found = dict(pipelines.expanded(chosen(rank=("4", "full"))))
    assert list(found)[:3] == ["2 blocks, rank 4", "2 blocks, rank full", "5 blocks, rank 4"]
    assert found["5 blocks, rank full"] == "tie(blocks=5), relax(rank=full)"
    assert found["3 layers left"].startswith("loop_core(prelude=0, core=3")


def test_a_text_is_one_value():
    options = chosen(pipelines={"{at}": "insert_exits(at=[{at}])"}, at="12,18")
    assert list(pipelines.expanded(options)) == [("12,18", "insert_exits(at=[12,18])")]


def test_pipelines_are_chosen_by_their_names_or_given():
    options = chosen(rank=("4",), only="5 blocks;left")
    assert list(dict(pipelines.expanded(options))) == ["5 blocks, rank 4", "3 layers left"]
    given = "window(size=4);fold_norms"
    assert list(dict(pipelines.expanded(chosen(passes=given)))) == ["window(size=4)", "fold_norms"]


def test_recoveries_are_of_the_pipelines_that_their_text_names():
    file = loaded("relaxed_recovery")
    options = Namespace(**{**file, **file["options"], "name": ["relaxed_recovery"]})
    found = pipelines.recoveries(options)
    assert {title for name, title in found if "left" in name} == {"", "distilled"}
    fitted = found["15 blocks, rank 64", "fitted, distilled"][1]
    assert fitted is not None
    assert [(stage.name, stage.share) for stage in fitted.stages] == [("align", 0), ("distil", 1)]
    assert fitted.settings.length == 512


def test_recipes_are_measured_before_and_after_their_recovery():
    options = chosen(name=["recovery", "linearize", "window64-sinks4"], pipelines={})
    assert list(pipelines.recoveries(options)) == [
        ("linearize", ""),
        ("linearize", "recovered"),
        ("window64-sinks4", ""),
    ]
