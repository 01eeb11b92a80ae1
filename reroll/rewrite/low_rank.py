"""Low-rank residuals of tied weights: what they are made of, and how much they leave."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from reroll.rewrite.context import Context
from reroll.rewrite.expressions import Expr
from reroll.rewrite.program import Program
from reroll.rewrite.weight_store import WeightStore
from reroll.rewrite.weights import Weight

# an exact decomposition to compare with stays affordable up to this side
CHECKED_SIDE = 2048


@dataclass(frozen=True)
class Factors:
    """The residuals of one weight: per trip the residual and its factors up and down."""

    kind: str
    rank: int
    method: str
    residuals: dict[int, tuple[Expr, Expr, Expr]]
    down_name: str
    down: Weight  # [rank, in]
    up_name: str
    up: Weight  # [out, rank]


def residuals_left(program: Program, factors: Sequence[Factors], context: Context) -> Iterator[str]:
    """Say for each weight how much of its residuals the factors leave.

    Looks at all trips, or at one of each weight where the context asks to be sparing; that of a
    randomized decomposition is compared with the least possible once for each shape.
    """
    sparing = context.sparing(program)
    total = sum(1 if sparing else len(f.residuals) for f in factors)
    done = 0
    checked: set[tuple[int, ...]] = set()
    for each in factors:
        trips = list(each.residuals)
        if not trips:
            continue
        left = []
        excess: float | None = None
        for trip in trips[len(trips) // 2 :][:1] if sparing else trips:
            residual, up, down = each.residuals[trip]
            (tensor,) = WeightStore().values([residual], program.source)
            rows, _ = context.compute(program, [up, down])
            left.append(_left(tensor, rows))
            shape = residual.meta.shape
            if each.method == "randomized" and shape not in checked and min(shape) <= CHECKED_SIDE:
                checked.add(shape)
                excess = left[-1] / max(_best(tensor, each.rank), 1e-12) - 1
            done += 1
            context.progress(done, total, "factors")
        size = program.weights[each.down_name].elements() + program.weights[each.up_name].elements()
        spread = "" if len(left) == 1 else f" ({min(left):.3f} to {max(left):.3f})"
        text = (
            f"{each.kind}: rank {each.rank}, {size:,} parameters; relative residual left "
            f"{sum(left) / len(left):.3f}{spread} in {len(left)} of {len(trips)} trips"
        )
        if each.method == "randomized":
            text += ", randomized SVD"
        if excess is not None:
            text += f" ({100 * max(excess, 0.0):.2g}% above the least possible)"
        yield text


def _left(residual: Tensor, up: Tensor) -> float:
    """|R - B A| / |R|: B A is a projection of R, so the squares of the norms subtract."""
    whole = residual.double().square().sum().item()
    kept = up.double().square().sum().item()
    return max(1 - kept / whole, 0.0) ** 0.5 if whole else 0.0


def _best(residual: Tensor, rank: int) -> float:
    """The least |R - B A| / |R| at a rank, from the eigenvalues of the smaller Gram matrix."""
    wide = residual.double()
    gram = wide @ wide.T if wide.shape[0] <= wide.shape[1] else wide.T @ wide
    values = torch.linalg.eigvalsh(gram).clamp_min(0)
    total = values.sum().item()
    return (values[: values.numel() - rank].sum().item() / total) ** 0.5 if total else 0.0
