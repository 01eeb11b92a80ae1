"""Window: let attention read only the last tokens and the first ones, so that state is bounded."""

from __future__ import annotations

from collections.abc import Collection

from reroll.bounds import COUNT, COUNT_OR_NONE
from reroll.errors import PassError
from reroll.rewrite.analysis.layers import AttentionLayer, attention_layers
from reroll.rewrite.ir.program import Program
from reroll.rewrite.pipeline.base import Context, option
from reroll.rewrite.pipeline.layerwise import LayerPass
from reroll.rewrite.pipeline.selection import ranges


class Window(LayerPass):
    """Let every attention see the last `size` tokens and the first `sinks` tokens only.

    The state of a causal model becomes a ring of size + sinks keys and values per layer, however
    long the context is. No training is needed: weights and the positions of keys stay. The result
    is exact for prompts of up to `size` tokens. It is the baseline that every linearization has to
    beat.

    Sinks: Xiao et al., 2023 (arXiv 2309.17453); with left padding they are the first tokens that
    are not padding. Without them (sinks=0) quality falls as soon as the first tokens leave the
    window.

    Layers with a window of `size` or less already stay as they are. Full attention in a few layers
    and windows in the others (`keep`) is MASFormer (arXiv 2310.12442). In a model that is not
    causal, a window reaches `size` tokens to both sides.
    """

    name = "window"
    contract = "approximate"

    size: int = option(
        64, within=COUNT, help="how many of the last tokens are seen, the token's own included"
    )
    sinks: int = option(
        4, within=COUNT_OR_NONE, help="how many of the first tokens are seen beside them"
    )

    def run(self, program: Program, context: Context) -> Program:
        layers, chosen = self.chosen(program)

        def rewritten(numbers: Collection[int]) -> Program:
            copy = program.edit()
            self._narrow(attention_layers(copy), numbers)
            return copy

        far = sorted(chosen & self._far(layers))
        eligible = sorted(self.measured(program, far, rewritten, context))
        if not eligible:
            raise PassError(
                f"no attention of the chosen layers sees further than {self.size} tokens",
                hint="choose a smaller size; reroll inspect shows the layers",
            )
        self._narrow(layers, eligible)
        sinks = f" and the first {self.sinks}" if self.sinks else ""
        context.remark(f"layers {ranges(eligible)} see the last {self.size} tokens{sinks}")
        return program

    def _far(self, layers: list[AttentionLayer]) -> set[int]:
        """Return the layers whose attention reaches further than the window."""
        far = set()
        for layer in layers:
            rows = zip(layer.numbers, layer.values("window"), layer.values("chunk"), strict=True)
            for number, window, chunk in rows:
                if chunk is None and (window is None or self._wider(window)):
                    far.add(number)
        return far

    def _wider(self, window: object) -> bool:
        return isinstance(window, int) and window > self.size

    def _narrow(self, layers: list[AttentionLayer], numbers: Collection[int]) -> None:
        for layer in layers:
            narrowed = [n for n in layer.numbers if n in numbers]
            layer.set("window", dict.fromkeys(narrowed, self.size))
            layer.set("prefix", dict.fromkeys(narrowed, self.sinks or None))
