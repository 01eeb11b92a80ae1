"""A pass of one's own: `reroll convert MODEL OUT --load FILE --passes 'prune(keep=0.9)'`."""

from dataclasses import replace

import torch
from torch import Tensor

from reroll.rewrite.ir.program import Program
from reroll.rewrite.ir.weights import build, weight_function
from reroll.rewrite.ir.weights.expressions import Expr
from reroll.rewrite.pipeline import Context, Pass, option


@weight_function(lambda x, keep: x)
def prune_by_magnitude(x: Tensor, keep: float) -> Tensor:
    """All but the largest elements set to zero; the result has the shape of x (the lambda)."""
    dropped = round((1 - keep) * x.numel())
    bound = x.abs().flatten().sort().values[dropped - 1] if dropped else -1.0
    return torch.where(x.abs() > bound, x, 0.0)


class Prune(Pass):
    """Set the smallest elements of every matrix of the layers to zero."""

    name = "prune"
    contract = "approximate"
    keep: float = option(0.5, help="the part of the elements that stays, from 0 to 1")

    def run(self, program: Program, context: Context) -> Program:
        def pruned(expr: Expr) -> Expr:
            return build("prune_by_magnitude", expr, self.keep)

        changed = {}
        for name, weight in program.weights.items():
            if weight.index is not None and len(weight.meta.shape) == 2:
                changed[name] = replace(weight, entries=tuple(map(pruned, weight.entries)))
        context.remark(f"{len(changed)} matrices keep {self.keep:.0%} of their elements")
        return program.with_weights(program.weights.with_weights(changed))
