"""Base of passes that change single layers: which layers to change, and which to keep."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

from reroll.bounds import COUNT_OR_NONE
from reroll.errors import PassError
from reroll.rewrite.analysis.keeping import keep_by_measure
from reroll.rewrite.analysis.layers import AttentionLayer, attention_layers
from reroll.rewrite.ir.program import Program
from reroll.rewrite.pipeline.base import Context, Pass, option
from reroll.rewrite.pipeline.selection import Keep, Layers, check_keep, choose, measured_part


class LayerPass(Pass):
    """Base of passes over the attention layers of a program."""

    layers: Layers = option("all", within=COUNT_OR_NONE, help="numbers of the layers to change")
    keep: Keep = option(
        None,
        help='layers that stay: numbers, a period such as 7, or a part by measurement, "auto:0.25"',
    )

    def check(self) -> None:
        check_keep(self.keep, f"pass {self.name}, option keep")

    def chosen(self, program: Program) -> tuple[list[AttentionLayer], set[int]]:
        """Return all layers, and the numbers of those that the options select.

        Raises PassError if there are no layers, and UsageError for numbers of missing layers.
        """
        layers = attention_layers(program)
        if not layers:
            raise PassError("there is no attention in the program")
        count = 1 + max(max(layer.numbers) for layer in layers)
        return layers, set(choose(count, self.layers, self.keep, self.name))

    def measured(
        self,
        program: Program,
        eligible: Sequence[int],
        rewritten: Callable[[Collection[int]], Program],
        context: Context,
    ) -> set[int]:
        """Remove from the `eligible` layers those that stay by measurement.

        `rewritten` returns the program with only the given layers changed, see `keep_by_measure`.
        """
        part = measured_part(self.keep)
        if part is None or not eligible:
            return set(eligible)
        return set(eligible) - set(keep_by_measure(program, eligible, part, rewritten, context))
