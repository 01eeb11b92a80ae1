from __future__ import annotations

from reroll.rewrite.ir.patterns import Match, Miss, nearest


def test_a_match_is_true_and_a_miss_is_not():
    assert Match("p", {"x": 1})["x"] == 1
    assert Match("p")
    assert not Miss("because")


def test_the_nearest_miss_is_the_one_where_most_held():
    misses = [Miss("a", depth=1), Miss("b", ("n", "m"), "norm", depth=3), Miss("c", depth=3)]
    assert str(nearest(misses)) == "norm: b (at n, m)"
    assert nearest([]) is None
