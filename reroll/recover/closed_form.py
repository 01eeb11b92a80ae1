"""Fit shared weights and low-rank residuals by least squares, in closed form, before training.

X_t [tokens, in] is the input of the original's linear layer t, W_t [out, in] its weight, and C_t =
X_t^T X_t. The best shared weight W' and the best residual B_t A_t of rank r minimise

    sum_t |X_t (W_t - W' - B_t A_t)^T|^2.

Each has a closed form while the other is fixed:

    W' = (sum_t (W_t - B_t A_t) C_t) (sum_t C_t)^-1
    B_t A_t = U U^T R_t,   R_t = W_t - W',   U [out, r] the largest eigenvectors of R_t C_t R_t^T

The second is reduced-rank regression (Izenman, Journal of Multivariate Analysis 5, 1975). With C_t
= 1, which takes all inputs as equally likely, they are the mean of the weights and their truncated
SVD.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from reroll.recover.hooks import removing_hooks
from reroll.recover.stage import Batch, Models
from reroll.rewrite.analysis.low_rank import factor_names
from reroll.rewrite.ir.program import Program, weight_nodes
from reroll.rewrite.ir.weights.factors import low_rank_factors
from reroll.runtime.lowering.placement import placements

# how often the shared weight and the residuals are fitted in turn
ROUNDS = 2
# bytes for the matrices C; layers beyond it are fitted in another run over the text
BYTES = 2**31
# ridge penalty that keeps a shared weight unchanged along inputs that the text does not have
RIDGE = 1e-3


@dataclass(frozen=True)
class FittedLinear:
    """Linear layer of the student, the original's of the same name, and the student's factors.

    A factor is a pair (A [rank, in], B [out, rank]), whose product B A is added to the weight.
    """

    name: str
    student: nn.Linear
    teacher: nn.Linear
    factors: tuple[tuple[nn.Parameter, nn.Parameter], ...]

    def product(self) -> Tensor:
        """Compute B A, the residual of the factors: [out, in]."""
        start = torch.zeros_like(self.student.weight)
        return sum((up @ down for down, up in self.factors), start)


@torch.no_grad()
def fit_linear_layers(models: Models, batches: Sequence[Batch]) -> dict[str, float]:
    """Fit the trainable shared weights and residuals on the original's inputs.

    Returns the squared error of the layers' outputs relative to their size, before and after. The
    result is empty if no trainable layer differs from the original's.
    """
    before = after = size = 0.0
    for group in _groups(models):
        products = _outer_products(models, [layer for part in group for layer in part], batches)
        for part in group:
            size += sum(_size(each.teacher.weight, products[each.name]) for each in part)
            before += _error(part, products)
            for _ in range(ROUNDS):
                _fit_shared(part, products)
                for layer in part:
                    if layer.factors:
                        lost = layer.teacher.weight - layer.student.weight
                        set_factors(layer, lost, products[layer.name])
            after += _error(part, products)
    return {"error_before": before / size, "error_after": after / size} if size else {}


def layers_to_fit(models: Models) -> list[FittedLinear]:
    """Return the student's trainable linear layers that share a weight or have residuals."""
    assert models.teacher is not None
    teacher_modules = dict(models.teacher.named_modules(remove_duplicate=False))
    student_modules = dict(models.module.named_modules(remove_duplicate=False))
    factors_of = _factors(models.module.program)
    parameters = dict(models.module.named_parameters(remove_duplicate=False))
    factor_uses = Counter(
        id(parameters[name]) for pairs in factors_of.values() for pair in pairs for name in pair
    )
    uses = Counter(id(m.weight) for m in student_modules.values() if isinstance(m, nn.Linear))
    layers: list[FittedLinear] = []
    for name, module in student_modules.items():
        other = teacher_modules.get(name)
        if not isinstance(module, nn.Linear) or not isinstance(other, nn.Linear):
            continue
        pairs = [(parameters[down], parameters[up]) for down, up in factors_of.get(name, ())]
        factors = [
            (down, up)
            for down, up in pairs
            if factor_uses[id(up)] == 1 and up.requires_grad and down.requires_grad
        ]
        if module.weight.shape == other.weight.shape and (
            factors or (uses[id(module.weight)] > 1 and module.weight.requires_grad)
        ):
            layers.append(FittedLinear(name, module, other, tuple(factors)))
    return layers


def _factors(program: Program) -> dict[str, list[tuple[str, str]]]:
    """Map the name of a linear module to the parameters' names (down, up) of its residuals."""
    placed, factors = placements(program), dict[str, list[tuple[str, str]]]()
    trips = {name: loop.trips for loop in program.loops for name in weight_nodes(loop.body.graph)}
    for weight, pairs in factor_names(program).items():
        for trip in range(trips.get(weight, 1)):
            for pair in pairs:
                base = placed[weight].at(trip).linear
                if base is not None:
                    at = (placed[name].at(trip) for name in pair)
                    down, up = (".".join((*place.owner, place.leaf)) for place in at)
                    factors.setdefault(".".join(base.path), []).append((down, up))
    return factors


def _groups(models: Models) -> Iterator[list[list[FittedLinear]]]:
    """Group the layers to fit by shared weight, and yield as many groups as memory has room for."""
    shared: dict[int, list[FittedLinear]] = defaultdict(list)
    for layer in layers_to_fit(models):
        shared[id(layer.student.weight)].append(layer)
    group: list[list[FittedLinear]] = []
    taken = 0
    for part in shared.values():
        need = sum(4 * layer.student.in_features**2 for layer in part)
        if group and taken + need > BYTES:
            yield group
            group, taken = [], 0
        group.append(part)
        taken += need
    if group:
        yield group


def _outer_products(
    models: Models, layers: Sequence[FittedLinear], batches: Sequence[Batch]
) -> dict[str, Tensor]:
    """Compute C = X^T X [in, in] for each layer of the original, averaged over tokens."""
    assert models.teacher is not None
    sums = {
        each.name: each.teacher.weight.new_zeros(each.teacher.in_features, each.teacher.in_features)
        for each in layers
    }
    tokens = sum(batch.tokens() for batch in batches)
    for batch in batches:
        keep = batch.mask.bool()

        def note(name: str, keep: Tensor = keep) -> object:
            def hook(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
                x = args[0][keep].float()
                sums[name].addmm_(x.T, x)

            return hook

        handles = [
            each.teacher.register_forward_pre_hook(note(each.name))  # type: ignore[arg-type]
            for each in layers
        ]
        with removing_hooks(handles):
            models.run_teacher_for_hooks(batch)
    return {name: total / tokens for name, total in sums.items()}


def _fit_shared(part: Sequence[FittedLinear], products: Mapping[str, Tensor]) -> None:
    weight = part[0].student.weight
    if len(part) == 1 or not weight.requires_grad:
        return
    total = torch.stack([products[layer.name] for layer in part]).sum(0).double()
    stay = RIDGE * total.diagonal().mean()
    wanted = stay * weight.double()
    for layer in part:
        rest = layer.teacher.weight - layer.product()
        wanted += rest.double() @ products[layer.name].double()
    total.diagonal().add_(stay)
    weight.copy_(torch.linalg.solve(total, wanted, left=False))


def set_factors(layer: FittedLinear, wanted: Tensor, product: Tensor) -> None:
    """Set a layer's residual nearest to `wanted` [out, in] for inputs with this X^T X."""
    ranks = [down.shape[0] for down, _ in layer.factors]
    # a symmetric matrix: its eigenvectors are its singular vectors
    vectors, _ = low_rank_factors(wanted @ product @ wanted.T, sum(ranks), "randomized")
    vectors = F.normalize(vectors, dim=0)
    for (down, up), basis in zip(layer.factors, vectors.split(ranks, 1), strict=True):
        rows = basis.T @ wanted
        # both factors get the same size, so that one learning rate fits both
        root = rows.norm(dim=1).clamp(min=1e-12).sqrt()
        up.copy_(basis * root)
        down.copy_(rows / root[:, None])


def _error(part: Sequence[FittedLinear], products: Mapping[str, Tensor]) -> float:
    return sum(
        _size(layer.teacher.weight - layer.student.weight - layer.product(), products[layer.name])
        for layer in part
    )


def _size(weight: Tensor, product: Tensor) -> float:
    """Compute the mean of |W x|^2 over the inputs."""
    return ((weight.float() @ product) * weight.float()).sum().item()
