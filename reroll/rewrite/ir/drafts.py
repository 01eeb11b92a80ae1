"""Drafts of a Program: rewritings of it that propose tokens, and which weights both have."""

from __future__ import annotations

from collections.abc import Hashable
from typing import TYPE_CHECKING

import torch

from reroll.errors import UsageError
from reroll.rewrite.ir.weights.expressions import Expr, Source, walk

if TYPE_CHECKING:
    from reroll.rewrite.ir.program import Program


def check_draft(program: Program, draft: Program) -> None:
    """Raise UsageError unless `draft` was made from `program` by passes, and both give logits.

    One weight that both read is compared, because other checkpoints have the same names.
    """
    ran, after = program.origin.steps, draft.origin.steps
    same = draft.origin.model == program.origin.model
    if not same or [s.text for s in after[: len(ran)]] != [s.text for s in ran]:
        raise _foreign(program, f"it is made from {_name(draft)}, and not from {_name(program)}")
    kinds = [_logits(each) for each in (program, draft)]
    if None in kinds:
        raise UsageError(
            "a draft proposes tokens, and so it and its program give logits",
            where=_name(program if kinds[0] is None else draft),
            hint="leave out the draft",
        )
    unknown = {i.name for i in draft.inputs} - {i.name for i in program.inputs}
    if kinds[0] != kinds[1] or unknown:
        raise _foreign(program, "it takes other inputs, or has another vocabulary")
    if program.source is not draft.source and (expr := _compared(program, draft)) is not None:
        ours, theirs = (each.source.load(expr.name) for each in (program, draft))
        if not torch.equal(ours.to(expr.meta.dtype), theirs.to(expr.meta.dtype)):
            raise _foreign(program, f"the tensor {expr.name!r} has other values")


def shared(program: Program, draft: Program) -> dict[tuple[str, int], tuple[str, int]]:
    """Return what a draft reads of its Program: (weight name, entry) there, by those of the draft.

    Weights are the same if their expressions are; constants, if they have the same name as well.
    """
    known: dict[Hashable, tuple[str, int]] = program.weights.distinct()
    found: dict[tuple[str, int], tuple[str, int]] = {}
    for name, weight in draft.weights.items():
        for entry, expr in enumerate(weight.entries):
            place = known.get(draft.weights.identity(name, entry))
            if place is not None and program.weights[place[0]].entries[place[1]] == expr:
                found[name, entry] = place
    return found


def added_bytes(program: Program, draft: Program) -> int:
    """Return the bytes of the weights that a draft has beside its Program's."""
    both = shared(program, draft)
    places = draft.weights.distinct().values()
    return sum(draft.weights[place[0]].meta.bytes for place in places if place not in both)


def _logits(program: Program) -> tuple[object, ...] | None:
    """Return the last dimension and the dtype of a Program's logits; None without logits."""
    if "logits" not in program.outputs:
        return None
    returned = program.graph.output_node().args[0]
    values = returned if isinstance(returned, tuple | list) else (returned,)
    node = values[program.outputs.index("logits")]
    return (node.meta["type"].shape[-1],)  # type: ignore[union-attr]


def _compared(program: Program, draft: Program) -> Source | None:
    """Return the smallest matrix of the checkpoint that both read."""
    sources: list[set[Source]] = []
    for each in (program, draft):
        roots: list[Expr] = [e for w in each.weights.values() for e in w.entries]
        sources.append({e for e in walk(roots) if isinstance(e, Source)})
    both = [e for e in sources[0] & sources[1] if len(e.meta.shape) > 1]
    return min(both, key=lambda e: (e.meta.elements, e.name), default=None)


def _name(program: Program) -> str:
    steps = ", ".join(step.text for step in program.origin.steps)
    return f"{program.origin.model} after {steps}" if steps else program.origin.model


def _foreign(program: Program, reason: str) -> UsageError:
    return UsageError(
        f"the draft is that of another program: {reason}",
        where=_name(program),
        hint="make one of this program: program.twin(passes)",
    )
