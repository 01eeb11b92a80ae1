from __future__ import annotations

import pytest

from reroll.rewrite.analysis import cache_fit
from reroll.rewrite.pipeline.manager import run_passes
from tests.captured import captured


@pytest.mark.parametrize(
    ("index", "expected"),
    [
        ((0, 1, 2, 3), None),
        ((0, 0, 1, 1), 1),
        ((0, 1, 0, 1), 2),
        ((0, 1, 2, 0, 1, 2), 3),
        ((0, 1, 2, 1, 2, 3), 2),
        ((0, 0, 0), 1),
    ],
)
def test_the_distance_from_one_use_of_a_block_to_the_next(index, expected):
    assert cache_fit.distance(index) == expected


def remark(tie, size, monkeypatch):
    monkeypatch.setattr(cache_fit, "last_level_cache", lambda: size)
    program = run_passes(captured("llama"), f"tie({tie})", measure=False)
    return next((r for r in program.origin.steps[-1].remarks if "head" in r), None)


def test_the_remark_says_in_which_precision_a_block_fits(monkeypatch):
    # a block of `captured("llama")`: q, k, v, o, three of the MLP, two norms
    block = 2 * 32 * 32 + 2 * 16 * 32 + 3 * 32 * 48 + 2 * 32
    text = remark("blocks=2, layout=sequence", 2 * block, monkeypatch)
    assert f"only the block is read, {4 * block / 1e6:.3g} MB in fp32" in text
    assert "which fits" in text
    assert "MB in bf16 and int8;" in text
    text = remark("blocks=2", 2 * block, monkeypatch)
    assert f"2 blocks are read, {8 * block / 1e6:.3g} MB in fp32" in text
    assert "MB in int8;" in text
    text = remark("blocks=2", block, monkeypatch)
    assert "decoding is no faster here" in text
    assert text.endswith("head besides (0.00819 MB in fp32, 0.0041 MB in bf16, 0.00205 MB in int8)")


def test_without_a_cache_or_shared_blocks_nothing_is_said(monkeypatch):
    assert remark("blocks=2", None, monkeypatch) is None
    assert remark("blocks=4", 2**20, monkeypatch) is None


def test_the_size_of_this_machines_cache_is_plausible():
    size = cache_fit.last_level_cache()
    assert size is None or 2**18 <= size <= 2**34
