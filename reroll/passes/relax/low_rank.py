"""Build the low-rank residuals of tied weights, and measure the error that they leave."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from reroll.errors import PassError
from reroll.passes.relax.rank_budget import Spectrum, allocate, spectrum, tiers
from reroll.rewrite.analysis.context import Context
from reroll.rewrite.ir.program import Program
from reroll.rewrite.ir.weights import Weight, cast, scale, slice_, sub, svd_down, svd_up
from reroll.rewrite.ir.weights.expressions import Expr
from reroll.rewrite.ir.weights.store import WeightStore

# the largest side for which an exact decomposition is computed for comparison
CHECKED_SIDE = 2048


@dataclass(frozen=True)
class Pair:
    """Two stacked factors of one rank; up @ down is added to a weight."""

    rank: int
    down_name: str
    down: Weight  # [rank, in]
    up_name: str
    up: Weight  # [out, rank]


@dataclass(frozen=True)
class Factors:
    """Residuals of one weight: for each trip that has one, the residual and its two factors.

    `pairs` are the factors as they are stored. Where all trips have one rank, there is one pair.
    Else ranks are cut at each rank that occurs, and each slice is a pair. In a pair, trips of a
    lower rank share zeros.
    """

    kind: str
    ranks: str
    method: str
    residuals: tuple[tuple[Expr, Expr, Expr], ...]
    pairs: tuple[Pair, ...]


def make_factors(
    name: str,
    kind: str,
    shared: Weight,
    original: Weight,
    ranks: Sequence[int],
    *,
    zero: bool,
    method: str,
) -> Factors:
    """Factorize the differences of original weights from a shared one, with a rank for each trip.

    A trip that shares its block with no other has no difference; all such trips share a pair of
    zeros. With `zero`, factors up are zero, so that products start as zero; factors down stay as
    they are.
    """
    assert shared.index is not None
    uses = Counter(shared.index)
    wanted = [r if uses[b] > 1 else 0 for r, b in zip(ranks, shared.index, strict=True)]
    residuals: dict[int, tuple[Expr, Expr, Expr]] = {}
    for trip, (rank, block) in enumerate(zip(wanted, shared.index, strict=True)):
        if rank:
            lost = residual(original.for_trip(trip), shared.entries[block])
            residuals[trip] = lost, svd_up(lost, rank, method), svd_down(lost, rank, method)
    bounds = [0, *sorted(set(wanted) - {0})] if any(wanted) else [0, max(ranks)]
    stem, pairs = name.removesuffix(".weight"), []
    for number, (start, stop) in enumerate(pairwise(bounds)):
        downs: list[Expr] = []
        ups: list[Expr] = []
        index: list[int] = []
        empty: int | None = None
        for trip, block in enumerate(shared.index):
            if wanted[trip] < stop and empty is not None:
                index.append(empty)
                continue
            index.append(len(ups))
            if wanted[trip] < stop:
                # distinct expressions for distinct weights, or they would be taken for tied
                empty = len(ups)
                up, down = (
                    scale(slice_(shared.entries[block], d, start, stop), 0.0) for d in (1, 0)
                )
            else:
                _, up, down = residuals[trip]
                if len(bounds) > 2:
                    up, down = slice_(up, 1, start, stop), slice_(down, 0, start, stop)
                up, down = (cast(e, shared.meta.dtype) for e in (up, down))
                up = scale(up, 0.0) if zero else up
            ups.append(up)
            downs.append(down)
        tail = f"_{number}.weight" if number else ".weight"
        pairs.append(
            Pair(
                stop - start,
                f"{stem}.lora_down{tail}",
                Weight(tuple(downs), tuple(index), shared.trainable),
                f"{stem}.lora_up{tail}",
                Weight(tuple(ups), tuple(index), shared.trainable),
            )
        )
    same = [rank for rank, block in zip(ranks, shared.index, strict=True) if uses[block] > 1]
    label = f"rank {ranks[0]}" if len(set(ranks)) == 1 else _spread(same)
    return Factors(kind, label, method, tuple(residuals.values()), tuple(pairs))


def spend(
    program: Program, names: Mapping[str, Weight], budget: int, step: int, context: Context
) -> dict[str, list[int]]:
    """Choose the rank of each trip of some tied weights, such that all factors fit a budget.

    Raises PassError if the budget is below the cost of the lowest rank of a single trip.
    """
    spectra: dict[tuple[str, int], Spectrum] = {}
    for number, (name, shared) in enumerate(names.items()):
        context.progress(number, len(names), "singular values")
        assert shared.index is not None
        uses = Counter(shared.index)
        for trip, block in enumerate(shared.index):
            if uses[block] > 1:
                original = program.reference[name].for_trip(trip)
                lost = residual(original, shared.entries[block])
                tensors = WeightStore().values([lost, original], program.source)
                spectra[name, trip] = spectrum(*tensors)
    choices = {key: tiers(program.weights[key[0]].meta.shape, step) for key in spectra}
    left = budget
    while True:
        allocated = allocate(spectra, choices, left)
        ranks = {
            name: [allocated.get((name, trip), 0) for trip in range(len(shared.index or ()))]
            for name, shared in names.items()
        }
        spent = sum(_cost(names[name], each) for name, each in ranks.items())
        if spent <= budget:
            break
        # pairs of zeros cost parameters too, and are known only after allocation
        left -= spent - budget
    if not any(any(each) for each in ranks.values()):
        least = min((spectra[k].cost * choices[k][1] for k in spectra if choices[k][1:]), default=0)
        raise PassError(
            f"a budget of {budget:,} parameters does not pay for one rank of {least:,}",
            hint="give a larger budget or a smaller step",
        )
    context.remark(f"the budget is {budget:,} parameters, of which {spent:,} are spent")
    return ranks


def _cost(weight: Weight, ranks: Sequence[int]) -> int:
    """Count the parameters of the factors of `make_factors`, with pairs of zeros."""
    bounds = [0, *sorted(set(ranks) - {0})]
    pairs = 0
    for start, stop in pairwise(bounds):
        having = sum(rank >= stop for rank in ranks)
        pairs += (having + (having < len(ranks))) * (stop - start)
    return pairs * sum(weight.meta.shape)


def residual(original: Expr, shared: Expr) -> Expr:
    """Subtract the shared weight from a trip's original one, in fp32 at least."""
    # the difference of two close numbers loses bits
    dtype = torch.promote_types(original.meta.dtype, torch.float32)
    return sub(cast(original, dtype), cast(shared, dtype))


def _spread(ranks: Sequence[int]) -> str:
    return f"ranks {min(ranks)} to {max(ranks)}, {sum(ranks) / len(ranks):.3g} on average"


def residuals_left(program: Program, factors: Sequence[Factors], context: Context) -> Iterator[str]:
    """Report for each kind of weight the relative residual that the factors leave.

    Measures all of them, or one of each kind where the context is sparing. A randomized
    decomposition is compared with the optimum, once for each shape.
    """
    kinds: dict[tuple[str, str, str], list[Factors]] = {}
    for each in factors:
        ranks = each.ranks if each.ranks.startswith("rank ") else ""
        kinds.setdefault((each.kind, ranks, each.method), []).append(each)
    total = sum(len(f.residuals) for f in factors)
    done = 0
    checked: set[tuple[int, ...]] = set()
    for (kind, ranks, method), group in kinds.items():
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
                excess = left[-1] / max(_best(tensor, up.meta.shape[1]), 1e-12) - 1
            context.progress(done + len(left), total, "factors")
        done += len(parts)
        if not parts:
            continue
        size = sum(w.elements() for f in group for p in f.pairs for w in (p.down, p.up))
        spread = "" if len(left) == 1 else f" ({min(left):.3f} to {max(left):.3f})"
        text = (
            f"{kind}: {ranks or group[0].ranks}, {size:,} parameters; relative residual left "
            f"{sum(left) / len(left):.3f}{spread} in {len(left)} of {len(parts)}"
        )
        if method == "randomized":
            text += ", randomized SVD"
        if excess is not None:
            text += f" ({100 * max(excess, 0.0):.2g}% above the least possible)"
        yield text


def _left(residual: Tensor, up: Tensor) -> float:
    """Compute |R - B A| / |R|.

    B A is a projection of R, so the squares of the norms subtract; `up` has the norm of B A.
    """
    whole = residual.double().square().sum().item()
    kept = up.double().square().sum().item()
    return max(1 - kept / whole, 0.0) ** 0.5 if whole else 0.0


def _best(residual: Tensor, rank: int) -> float:
    """Compute the least |R - B A| / |R| at a rank, by eigenvalues of the smaller Gram matrix."""
    wide = residual.double()
    gram = wide @ wide.T if wide.shape[0] <= wide.shape[1] else wide.T @ wide
    values = torch.linalg.eigvalsh(gram).clamp_min(0)
    total = values.sum().item()
    return (values[: values.numel() - rank].sum().item() / total) ** 0.5 if total else 0.0
