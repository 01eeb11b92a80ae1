"""Random weight expressions and tables for hypothesis, over a few small source tensors."""

from __future__ import annotations

import torch
from hypothesis import strategies as st

from reroll.rewrite.ir import weights as w

_GENERATOR = torch.Generator().manual_seed(0)
SOURCES = {
    f"layers.{i}.{name}": torch.randn(shape, generator=_GENERATOR).to(dtype)
    for i in range(4)
    for name, shape, dtype in [
        ("w", (3, 4), torch.float32),
        ("half", (3, 4), torch.bfloat16),
        ("t", (4, 3), torch.float32),
        ("b", (4,), torch.float32),
    ]
}
LEAVES = [w.Source(name, w.meta_of(tensor)) for name, tensor in SOURCES.items()]
CONSTANTS = st.floats(-2, 2, width=32)


@st.composite
def pools(draw: st.DrawFn, steps: int = 8) -> list[w.Expr]:
    """Expressions of which later ones may use earlier ones, several times."""
    pool: list[w.Expr] = list(LEAVES)
    for _ in range(draw(st.integers(0, steps))):
        # recent expressions are likelier, so that trees get deep
        x = draw(st.sampled_from(pool[-6:] + pool[:4]))
        alike = [y for y in pool if y.meta.shape == x.meta.shape]
        pool.append(draw(_step(x, alike)))
    return pool


@st.composite
def _step(draw: st.DrawFn, x: w.Expr, alike: list[w.Expr]) -> w.Expr:
    y = draw(st.sampled_from(alike))
    dim = draw(st.integers(0, len(x.meta.shape) - 1))
    choices = [
        lambda: w.mean(draw(st.lists(st.sampled_from(alike), min_size=1, max_size=4))),
        lambda: w.add(x, y),
        lambda: w.sub(x, y),
        lambda: w.mul(x, y),
        lambda: w.scale(x, draw(CONSTANTS)),
        lambda: w.offset(x, draw(CONSTANTS)),
        lambda: w.centre(x, dim),
        lambda: w.cast(x, draw(st.sampled_from([torch.float32, torch.bfloat16]))),
        lambda: w.slice_(
            w.concat(dim, [x, w.cast(y, x.meta.dtype)]), dim, 1, 1 + x.meta.shape[dim]
        ),
        lambda: (
            w.transpose(x)
            if len(x.meta.shape) == 2
            else w.add(LEAVES[0], x)
            if x.meta.shape == (4,)
            else w.scale(x, 2)
        ),
        lambda: w.matvec(x, LEAVES[3]) if x.meta.shape == (3, 4) else w.sub(y, x),
    ]
    return draw(st.sampled_from(choices))()


@st.composite
def expressions(draw: st.DrawFn) -> w.Expr:
    """One expression."""
    return draw(pools())[-1]


@st.composite
def tables(draw: st.DrawFn) -> w.WeightTable:
    """A table of plain and stacked weights over one pool, so that they share subtrees."""
    pool = draw(pools())
    names = st.sampled_from(["head", "a.b", "1.x", "with space", 'quo"te', "{0..3}", "<1>", "é"])
    weights: dict[str, w.Weight] = {}
    for name in draw(st.lists(names, unique=True, max_size=4)):
        weights[name] = w.Weight((draw(st.sampled_from(pool)),), trainable=draw(st.booleans()))
    for number in range(draw(st.integers(0, 3))):
        first = draw(st.sampled_from(pool))
        alike = [e for e in pool if e.meta == first.meta]
        entries = draw(st.lists(st.sampled_from(alike), min_size=1, max_size=5))
        order = draw(st.permutations(range(len(entries))))
        more = draw(st.lists(st.integers(0, len(entries) - 1), max_size=5))
        weights[f"loop{number}.*.w"] = w.Weight(
            tuple(entries), (*order, *more), draw(st.booleans())
        )
    return w.WeightTable(weights)
