"""Which states of a model belong to the layers of a draft that has fewer of them."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from operator import attrgetter
from typing import Any

from torch import Tensor, fx

from reroll.rewrite.analysis.state_plan import plan_states
from reroll.rewrite.ir.program import Program


def shared_states(model: Any, draft: Any) -> list[int] | None:
    """Return the number of a model's state for each state of a draft; None if they do not match.

    Both are lowered. As many states match one by one. Fewer ones match those whose keys and values
    come from the same tensors in memory, in the same order. Where layers that share all their
    weights leave a choice, the draft's first layers are the model's first, and the others its last.
    """
    known, wanted = (len(each._assembly.layers) for each in (model, draft))
    if known == wanted:
        return list(range(known))
    if wanted > known:
        return None
    # tied layers may still differ in the weights before those that they share, such as norms
    for steps in (2, 1):
        places = aligned(_origins(model, steps), _origins(draft, steps))
        if places is not None:
            return places
    return None


def aligned(known: Sequence[Hashable], wanted: Sequence[Hashable]) -> list[int] | None:
    """Return places of `known` that hold `wanted`, in ascending order; None if there are none."""
    first = 0
    while first < min(len(known), len(wanted)) and known[first] == wanted[first]:
        first += 1
    rest, place = [], len(known)
    for each in reversed(wanted[first:]):
        place = next((n for n in range(place - 1, first - 1, -1) if known[n] == each), -1)
        if place < 0:
            return None
        rest.append(place)
    return [*range(first), *reversed(rest)]


def _origins(module: Any, steps: int) -> list[Hashable]:
    """Return, for each state of a lowered model, the tensors that what it keeps comes from.

    `steps` is how many operations with weights are looked at, from the state backwards.
    """
    program: Program = module.program
    readings, plan = module._assembly.tree.readings, plan_states(program)
    owners: dict[fx.Graph, tuple[str, Sequence[Any]]] = {program.graph: ("main", [module])}
    for loop in program.loops:
        owners[loop.body.graph] = loop.name, module._assembly.loops[loop.name].modules
    origins: list[Hashable] = [None] * len(plan.layers)
    for node, numbers in plan.numbers.items():
        name, modules = owners[node.graph]
        paths = [readings[name][weight].weight for weight in _nearest_weights(node, steps)]
        for number, owner in zip(numbers, modules, strict=True):
            tensors: list[Tensor] = [attrgetter(path)(owner) for path in paths]
            origins[number] = tuple((t.data_ptr(), t.shape) for t in tensors)
    return origins


def _nearest_weights(node: fx.Node, steps: int) -> list[str]:
    """Return the names of the weights of the last `steps` operations on each path to a node."""
    names: dict[str, None] = {}
    stack, seen = [(node, steps)], {(node, steps)}
    while stack:
        current, left = stack.pop()
        inputs = current.all_input_nodes
        weights = [str(each.target) for each in inputs if each.op == "get_attr"]
        names |= dict.fromkeys(weights)
        left -= bool(weights)
        for each in inputs if left else ():
            if (each, left) not in seen:
                seen.add((each, left))
                stack.append((each, left))
    return list(names)
