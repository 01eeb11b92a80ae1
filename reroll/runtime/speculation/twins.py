"""Twins: a rewritten Program in memory beside its original, with the weights that both have."""

from __future__ import annotations

from typing import Any

from reroll.rewrite.ir.program import Program
from reroll.runtime.lowering.lower import lower


def twin(model: Any, present: Program, program: Program) -> Any:
    """Lower a rewriting of a lowered model; it shares the tensors that no pass has changed.

    `present` is `model.to_program()`, and `program` is made from it. Weights that passes have added
    or changed are computed as by `lower`. Both read the same tensors until one of them is moved or
    converted.
    """
    other = lower(program, dtype=model.program.dtype, meta=True)
    table, slots = present.weights, model._assembly.tree.slots
    known = {}
    for key, (name, entry) in table.distinct().items():
        slot = slots.get(model.program.weights.identity(name, entry))
        if slot is not None:
            known[key] = table[name].entries[entry], slot
    own = other.program.weights
    shared = set()
    for key, (name, entry) in own.distinct().items():
        expression, slot = known.get(key, (None, None))
        if slot is not None and expression == own[name].entries[entry]:
            module, leaf = slot.holders[0]
            other._assembly.tree.slots[key].fill(getattr(module, leaf).detach())
            shared.add(id(other._assembly.tree.slots[key]))
    other.load_weights(model.device, only=lambda slot: id(slot) not in shared)
    other._has_weights = True
    return other.eval()
