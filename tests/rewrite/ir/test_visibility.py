"""Which keys a query sees, beside its definition written out for one query and one key."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from reroll.rewrite.ir.ops import ATTENTION, MASK
from reroll.rewrite.ir.visibility import NAMES, Visibility

KEYS = 7


def sees(limits: Visibility, row: int, q: int, k: int) -> bool:
    """The definition, with nothing but numbers."""
    valid = [True] * KEYS if limits.padding is None else limits.padding[row].bool().tolist()
    first = valid.index(True) if True in valid else KEYS
    seen = k <= q or not limits.causal
    if limits.window is not None:
        seen &= q - k < limits.window if limits.causal else 0 <= abs(q - k) <= limits.window != 0
    if limits.chunk is not None:
        seen &= (k - first) // limits.chunk == (q - first) // limits.chunk
    if limits.prefix is not None:
        seen |= sum(valid[: k + 1]) <= limits.prefix and (k <= q or not limits.causal)
    if limits.blocks is not None:
        numbers = limits.blocks[row].tolist()
        seen |= numbers[q] == numbers[k] >= 0
    return bool(seen and valid[k])


@st.composite
def visibilities(draw: st.DrawFn) -> Visibility:
    def tensor(low: int, high: int) -> torch.Tensor:
        numbers = st.lists(st.integers(low, high), min_size=KEYS, max_size=KEYS)
        return torch.tensor([draw(numbers), draw(numbers)])

    return Visibility(
        causal=draw(st.booleans()),
        window=draw(st.none() | st.integers(0, KEYS + 1)),
        chunk=draw(st.none() | st.integers(1, KEYS + 1)),
        padding=tensor(0, 1) if draw(st.booleans()) else None,
        blocks=tensor(-1, 2) if draw(st.booleans()) else None,
        prefix=draw(st.none() | st.integers(0, KEYS)),
    )


@settings(max_examples=200, deadline=None)
@given(limits=visibilities(), start=st.integers(0, 3), queries=st.integers(1, KEYS))
def test_seen_is_the_definition(limits: Visibility, start: int, queries: int) -> None:
    at = range(KEYS - queries, KEYS)
    seen = limits.visible(torch.tensor(list(at)), KEYS - start, start).expand(2, 1, -1, -1)
    wanted = [
        [[[sees(limits, row, q, k) for k in range(start, KEYS)] for q in at]] for row in range(2)
    ]
    assert seen.tolist() == wanted
    # a bound holds for every query, but for the blocks, which it does not count
    if limits.blocks is None and start == 0:
        assert seen.sum(-1).max() <= limits.most_keys(KEYS)
    if limits.is_empty and limits.blocks is None and limits.chunk is None:
        assert not seen.any()


@settings(max_examples=50, deadline=None)
@given(limits=visibilities(), queries=st.integers(1, KEYS))
def test_the_mask_op_adds_nothing_where_a_key_is_seen(limits: Visibility, queries: int) -> None:
    named = dict(zip(NAMES, limits.values(), strict=True))
    offset = KEYS - queries
    mask = MASK(
        batch=2, q_length=queries, kv_length=KEYS, q_offset=offset, dtype=torch.float16, **named
    )
    seen = limits.visible(torch.arange(queries) + offset, KEYS).expand(2, 1, -1, -1)
    assert mask.dtype == torch.float16
    assert torch.equal(mask == 0, seen)
    assert (mask[~seen] == torch.finfo(torch.float16).min).all()


def test_it_is_read_off_a_node() -> None:
    graph = torch.fx.Graph()
    q, pad = graph.placeholder("q"), graph.placeholder("pad")
    node = graph.call_function(ATTENTION, (q, q, q, 1.0, True, 4), {"padding": pad})
    assert Visibility.of(node) == Visibility(causal=True, window=4, padding=pad)


@pytest.mark.parametrize(
    ("limits", "by_key", "limited"),
    [
        ({}, True, False),
        ({"padding": 1}, True, True),
        ({"causal": True}, False, False),
        ({"causal": True, "prefix": 4}, False, False),
        ({"window": 3}, False, True),
        ({"blocks": 1}, False, True),
    ],
)
def test_questions_without_positions(limits: dict[str, Any], by_key: bool, limited: bool) -> None:
    visibility = Visibility(**limits)
    assert visibility.is_by_key == by_key
    assert visibility.is_limited == limited


def test_what_it_has_are_arguments_of_the_ops() -> None:
    for op in (ATTENTION, torch.ops.reroll.attention_mass.default, MASK):
        assert set(NAMES) <= {a.name for a in op._schema.arguments}
