"""Selection of layers that stay unchanged: those whose rewriting changes the output most.

The measurement runs on a text followed by the same text again. A window or a recurrent state first
loses distant tokens, and plain text hardly depends on them. Its KL alone would not find the layers
that copy from far back.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence

from torch import Tensor

from reroll.errors import PassError
from reroll.rewrite.analysis.context import Context
from reroll.rewrite.analysis.distance import divergence
from reroll.rewrite.analysis.program_distance import measured_output
from reroll.rewrite.analysis.samples import token_input, token_inputs
from reroll.rewrite.ir.program import Program

# tokens of the text, which is then repeated
LENGTH = 256
# layers that the remark names
SHOWN = 8


def keep_by_measure(
    program: Program,
    layers: Sequence[int],
    part: float,
    rewritten: Callable[[Collection[int]], Program],
    context: Context,
) -> list[int]:
    """Choose the fraction `part` of the layers that should stay unchanged; remark the ranking.

    `rewritten` returns the program with only the given layers rewritten. Each layer is rewritten
    alone and ranked by the KL divergence of the output from the original's. Then all layers that do
    not stay are rewritten together. The lowest-ranked layer that stays is exchanged for the
    highest-ranked one that does not, as long as the divergence falls.
    """
    count = max(1, round(part * len(layers)))
    if count >= len(layers):
        raise PassError(f"{part:g} of {len(layers)} layers is all of them")
    if context.is_large(program):
        raise PassError(
            "the model is too large to measure which layers should stay",
            hint="name them with keep=[...], or give a period",
        )
    distance = _Distance(program, context)
    alone: dict[int, float] = {}
    for number, layer in enumerate(layers):
        context.progress(number, len(layers), "ranking layers")
        alone[layer] = distance(rewritten([layer]))
    ranking = sorted(layers, key=lambda n: -alone[n])
    kept, rest = ranking[:count], ranking[count:]
    context.remark(f"KL on {distance.text} of each layer alone: {_shown(ranking, alone)}")
    best = distance(rewritten(rest))
    exchanged = 0
    while exchanged < min(count, len(rest)):
        weakest, next_in = kept[-1 - exchanged], rest[exchanged]
        swapped = [weakest if n == next_in else n for n in rest]
        trial = distance(rewritten(swapped))
        if trial >= best:
            break
        best, rest, exchanged = trial, swapped, exchanged + 1
        kept = [next_in if n == weakest else n for n in kept]
    context.remark(
        f"layers {', '.join(map(str, sorted(kept)))} stay ({exchanged} exchanged); KL of all: "
        f"{best:.4f}"
    )
    return sorted(kept)


class _Distance:
    """Mean KL divergence per token of a program's output from the original's."""

    def __init__(self, program: Program, context: Context) -> None:
        if token_input(program) is None:
            raise PassError(
                "only a model that takes tokens can be measured", hint="name the layers"
            )
        tokens, text = context.some_tokens(program, LENGTH // 8)
        self.text = f"{text}, and the same again,"
        length = min(LENGTH, (program.origin.positions or 2 * LENGTH) // 2)
        twice = tokens[None, :length].repeat(1, 2)
        self.inputs: Mapping[str, Tensor] = token_inputs(program, twice)
        self.context = context
        self.original = self._logits(program)

    def __call__(self, program: Program) -> float:
        return divergence(self.original, self._logits(program))

    def _logits(self, program: Program) -> Tensor:
        return self.context.outputs(program, self.inputs)[measured_output(program)]


def _shown(ranking: Sequence[int], alone: Mapping[int, float]) -> str:
    first = ", ".join(f"{n}: {alone[n]:.4f}" for n in ranking[:SHOWN])
    if len(ranking) <= SHOWN:
        return first
    return f"{first}, ... {ranking[-1]}: {alone[ranking[-1]]:.4f}"
