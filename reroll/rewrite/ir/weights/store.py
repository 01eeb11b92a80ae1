"""Cache of computed weights by expression, so that programs compute shared weights once."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import Tensor

from reroll.rewrite.ir.program import Program
from reroll.rewrite.ir.weights import Weight, WeightTable, evaluate
from reroll.rewrite.ir.weights.expressions import Expr, TensorSource


class WeightStore:
    """Cache of the tensors of evaluated expressions."""

    def __init__(self) -> None:
        self._tensors: dict[Expr, Tensor] = {}
        self._source: TensorSource | None = None

    def __len__(self) -> int:
        return len(self._tensors)

    def values(self, expressions: Sequence[Expr], source: TensorSource) -> list[Tensor]:
        """Compute the tensors of expressions over `source`, in order."""
        # in another source, the same names may be other tensors
        if source is not self._source:
            self._tensors.clear()
            self._source = source
        missing = [e for e in dict.fromkeys(expressions) if e not in self._tensors]
        table = WeightTable({str(i): Weight((e,)) for i, e in enumerate(missing)})
        for name, _, tensor in evaluate(table, source):
            self._tensors[missing[int(name)]] = tensor
        return [self._tensors[e] for e in expressions]

    def weights(self, program: Program) -> dict[tuple[str, int], Tensor]:
        """Compute every weight of a Program by (name, entry), as `interpret.run` takes them."""
        keys = [(n, i) for n, w in program.weights.items() for i in range(len(w.entries))]
        expressions = [program.weights[name].entries[entry] for name, entry in keys]
        return dict(zip(keys, self.values(expressions, program.source), strict=True))

    def keep(self, programs: Iterable[Program]) -> None:
        """Drop the tensors that none of these programs uses."""
        used = {e for p in programs for w in p.weights.values() for e in w.entries}
        self._tensors = {e: t for e, t in self._tensors.items() if e in used}
