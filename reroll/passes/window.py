"""Window: attention sees the last tokens and the first ones, so that its state stops growing."""

from __future__ import annotations

from reroll.errors import PassError, UsageError
from reroll.rewrite.layers import attention_layers
from reroll.rewrite.passes.base import Context, Pass, option
from reroll.rewrite.passes.selection import Keep, Layers, choose, measured_part, ranges
from reroll.rewrite.program import Program


class Window(Pass):
    """Let every attention see the last `size` tokens and the first `sinks` tokens only.

    The state of a causal model becomes a ring of size + sinks keys and values per layer, however
    long the context is. No training is needed: the weights stay, and so do the positions that the
    keys have. It is exact for prompts of up to `size` tokens, and what every linearization has to
    be better than. Sinks: Xiao et al., 2023 (arXiv 2309.17453); with left padding they are the
    first tokens that are not padding. Without them (sinks=0) quality falls as soon as the first
    tokens leave the window.

    Layers that see no further already stay as they are. Full attention in a few layers and windows
    in the others (`keep`) is MASFormer (arXiv 2310.12442).

    In a model that is not causal, a window reaches `size` tokens to both sides.
    """

    name = "window"
    contract = "approximate"

    size: int = option(64, help="how many of the last tokens are seen, the token's own included")
    sinks: int = option(4, help="how many of the first tokens are seen beside them")
    layers: Layers = option("all", help="numbers of the layers to change")
    keep: Keep = option(None, help="layers that stay: their numbers, or a period such as 7")

    def check(self) -> None:
        if self.size < 1 or self.sinks < 0:
            which = "size" if self.size < 1 else "sinks"
            least = 1 if which == "size" else 0
            raise UsageError(f"{which} is {least} or more", f"pass window, option {which}")
        if measured_part(self.keep, self.name) is not None:
            raise UsageError("window cannot measure what to keep", "pass window, option keep")

    def run(self, program: Program, context: Context) -> Program:
        found = attention_layers(program)
        if not found:
            raise PassError("there is no attention in the program")
        count = 1 + max(max(layer.numbers) for layer in found)
        chosen = choose(count, self.layers, self.keep, self.name)
        changed: list[int] = []
        for layer in found:
            windows, prefixes = {}, {}
            rows = zip(layer.numbers, layer.values("window"), layer.values("chunk"), strict=True)
            for number, window, chunk in rows:
                near = window is not None and (not isinstance(window, int) or window <= self.size)
                if number in chosen and not near and chunk is None:
                    windows[number], prefixes[number] = self.size, self.sinks or None
            layer.set("window", windows)
            layer.set("prefix", prefixes)
            changed += windows
        if not changed:
            raise PassError(
                f"no attention of the chosen layers sees further than {self.size} tokens",
                hint="reroll inspect shows the layers; try a smaller size",
            )
        sinks = f" and the first {self.sinks}" if self.sinks else ""
        context.remark(f"layers {ranges(changed)} see the last {self.size} tokens{sinks}")
        return program
