"""Low-rank residuals of tied weights: what they are made of, and how much they leave."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from reroll.rewrite.passes.context import Context
from reroll.rewrite.program import Program
from reroll.rewrite.weights import Weight
from reroll.rewrite.weights.expressions import Expr
from reroll.rewrite.weights.store import WeightStore

# an exact decomposition to compare with stays affordable up to this side
CHECKED_SIDE = 2048


@dataclass(frozen=True)
class Factors:
    """The residuals of one weight: for each trip that has one, it and its factors up and down."""

    kind: str
    rank: int
    method: str
    residuals: tuple[tuple[Expr, Expr, Expr], ...]
    down_name: str
    down: Weight  # [rank, in]
    up_name: str
    up: Weight  # [out, rank]


def residuals_left(program: Program, factors: Sequence[Factors], context: Context) -> Iterator[str]:
    """Say for each kind of weight how much of its residuals the factors leave.

    Looks at all of them, or at one of each kind where the context asks to be sparing; that of a
    randomized decomposition is compared with the least possible once for each shape.
    """
    kinds: dict[tuple[str, int, str], list[Factors]] = {}
    for each in factors:
        kinds.setdefault((each.kind, each.rank, each.method), []).append(each)
    total = sum(len(f.residuals) for f in factors)
    done = 0
    checked: set[tuple[int, ...]] = set()
    for (kind, rank, method), group in kinds.items():
        parts = [residual for each in group for residual in each.residuals]
        left = []
        excess: float | None = None
        for residual, up, down in (
            parts[len(parts) // 2 :][:1] if context.sparing(program) else parts
        ):
            (tensor,) = WeightStore().values([residual], program.source)
            rows, _ = context.compute(program, [up, down])
            left.append(_left(tensor, rows))
            shape = residual.meta.shape
            if method == "randomized" and shape not in checked and min(shape) <= CHECKED_SIDE:
                checked.add(shape)
                excess = left[-1] / max(_best(tensor, rank), 1e-12) - 1
            context.progress(done + len(left), total, "factors")
        done += len(parts)
        if not parts:
            continue
        tables = (program.weights[name] for f in group for name in (f.down_name, f.up_name))
        size = sum(weight.elements() for weight in tables)
        spread = "" if len(left) == 1 else f" ({min(left):.3f} to {max(left):.3f})"
        text = (
            f"{kind}: rank {rank}, {size:,} parameters; relative residual left "
            f"{sum(left) / len(left):.3f}{spread} in {len(left)} of {len(parts)}"
        )
        if method == "randomized":
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
