"""The plots of an evaluation: what is drawn, and what is written because it is one number."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from reroll.evaluate import plots, report
from tests.evaluate import browser


def cells(*values: float, length: int = 128) -> list[dict[str, Any]]:
    return [{"length": length, "depth": n / 2, "accuracy": v} for n, v in enumerate(values)]


def result(*points: tuple[int, float]) -> dict[str, Any]:
    return {"contexts": [{"context": x, "perplexity": y} for x, y in points]}


def areas(svg: str) -> list[tuple[str, float]]:
    """Fill and area of the closed paths of a plot, those of its cells among them."""
    found = []
    for path, style in re.findall(r'<path d="([^"]+)"[^>]*style="([^"]+)"', svg, re.DOTALL):
        numbers = [float(n) for n in re.findall(r"-?\d+\.?\d*", path)]
        x, y = numbers[::2], numbers[1::2]
        fill = re.search(r"fill: (#\w+)", style)
        if fill is not None and len(x) >= 4:
            found.append((fill[1], (max(x) - min(x)) * (max(y) - min(y))))
    return found


@pytest.mark.parametrize("values", [(1.0,), (1.0, 0.0), (0.5, 0.25, 1.0)])
def test_every_cell_of_a_heat_map_is_filled_and_numbered(values: tuple[float, ...]) -> None:
    svg = plots.heat_maps([("needle", cells(*values))])
    for value in values:
        assert f"{value:.2f}" in svg
    dark = [area for fill, area in areas(svg) if fill == "#08306b"]
    # the darkest blue is that of 1, and its number is white
    assert len(dark) == 1
    assert dark[0] > 1000


def test_a_single_point_is_written_and_not_drawn() -> None:
    drawn = plots.curves([("perplexity", {"model": [(512, 17.69)]})], "context", [0.25])
    assert "<svg" not in drawn
    assert "17.69" in drawn
    assert "512" in drawn
    assert "0.25" in drawn


def test_lines_are_drawn_and_single_points_beside_them_written() -> None:
    lines = {"model": [(256, 20.0), (512, 18.0)], "original": [(256, 19.0)]}
    drawn = plots.curves([("a", lines), ("<b>", {"model": [(1, 4.5)]})], "context")
    assert drawn.count("<svg") == 1
    table = drawn[drawn.index("<table") :]
    assert "&lt;b&gt;" in table
    assert "4.5" in table
    assert "20" not in table


def test_recall_at_one_place_is_written() -> None:
    one, several = {"needle": {"cells": cells(1.0)}}, {"needle": {"cells": cells(1.0, 0.5)}}
    measured = {"recall": {"status": "done", "result": {"model": one, "original": several}}}
    (_, table), (_, svg) = plots.figures({"measures": measured, "passes": []})
    assert "needle, model" in table
    assert "<svg" not in table
    assert "needle, original" in svg


def test_nothing_measured_is_nothing_drawn() -> None:
    assert plots.curves([("a", {})], "context") == ""


def found() -> dict[str, Any]:
    """What an evaluation of two models may have found."""
    sides = {s: result((256, 20.0), (512, 18.5)) for s in ("model", "original")}
    recall = {s: {"needle": {"cells": cells(1.0, 0.5)}} for s in ("model", "original")}
    done = {"status": "done", "seconds": 1.0, "options": {}}
    long = "perplexity at a context of very many tokens, " * 3
    headline = {s: {"perplexity": 17.69, long: 3} for s in ("model", "original")}
    pair = {"before": 100, "after": 60}
    step = {"pass": "tie(blocks=2)", "seconds": 1.0, "measured": {"parameters": pair}}
    return {
        "model": "a/" + 80 * "x", "original": "<script>", "suite": "quick", "seed": 0,
        "text": "sample", "threads": 1, "dtype": {"model": "float32"}, "seconds": 3.0,
        "passes": [step],
        "measures": {
            "perplexity": {**done, "result": sides, "headline": headline},
            "recall": {**done, "result": recall},
            "speed": {"status": "failed", "seconds": 0.0, "error": "no " * 60},
        },
    }  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("width", [1280, 390])
def test_the_report_fits_its_window_and_loads_nothing(width: int, tmp_path: Path) -> None:
    seen = browser.look(report.page(found()), width, tmp_path)
    assert seen["width"] == width
    assert seen["scrolls"] <= width
    assert seen["wide"] == []
    assert seen["loaded"] == []
    assert seen["console"] == []
