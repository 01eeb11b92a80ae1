"""From a lowered model back to a Program: the same graphs over the present weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from reroll.errors import ProgramError
from reroll.rewrite.checkpoint.sources import MemorySource
from reroll.rewrite.program import Program
from reroll.rewrite.weights import Weight, WeightTable, stored_name
from reroll.rewrite.weights.expressions import Meta, Source, meta_of
from reroll.runtime.placement import Place, places


def program_of(model: Any) -> Program:
    """The Program of a lowered model with its present weights.

    Trips whose weight is one Parameter share an entry; trips that were untied since have their own.
    """
    table, tensors = stored_tensors(model)
    source = MemorySource(tensors)
    return replace(model.program, weights=table, source=source, reference=WeightTable())


def stored_tensors(model: Any) -> tuple[WeightTable, dict[str, Tensor]]:
    """The weight table of a lowered model as it is now, and its tensors as a file names them."""
    found = places(model.program)
    table: dict[str, Weight] = {}
    tensors: dict[str, Tensor] = {}
    sources: dict[int, Source] = {}
    for name, weight in model.program.weights.items():
        trips = 1 if weight.index is None else len(weight.index)
        entries: list[Source] = []
        index = []
        for trip in range(trips):
            tensor = _tensor(model, found[name].at(trip), weight.meta)
            source = sources.get(id(tensor))
            if source is None:
                stored = stored_name(name, len(entries))
                source = sources[id(tensor)] = Source(stored, weight.meta)
                tensors[stored] = tensor
            if source not in entries:
                entries.append(source)
            index.append(entries.index(source))
        own_index = None if weight.index is None else tuple(index)
        table[name] = Weight(tuple(entries), own_index, weight.trainable)
    return WeightTable(table), tensors


def from_stored(model: Any, state: Mapping[str, Any]) -> Mapping[str, Any]:
    """A state dict under the model's names, given one under the names of a saved file.

    A file names a shared weight by the number of its entry, a module by the number of its trip. A
    state dict that does not have exactly the names of a file is returned as it is.
    """
    _, tensors = stored_tensors(model)
    if set(tensors) != set(state):
        return state
    names: dict[int, list[str]] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        names.setdefault(id(tensor), []).append(name)
    return {n: state[stored] for stored, tensor in tensors.items() for n in names[id(tensor)]}


def untie(model: Any) -> None:
    """Give every trip its own copy of weights that trips share, so that they change apart.

    An adapter that is merged changes the weight below it; merging the adapters of several trips
    into one shared weight would add them all up. So this comes before a merge: weights with an
    adapter are untied, or all weights if there is none.
    """
    found = places(model.program)
    held = {
        name: [_holder(model, found[name].at(trip)) for trip in range(len(weight.index or ()))]
        for name, weight in model.program.weights.items()
    }
    adapted = {n for n, holders in held.items() if any(is_adapted for *_, is_adapted in holders)}
    for name in adapted or held:
        seen: set[int] = set()
        for module, leaf, _ in held[name]:
            parameter = getattr(module, leaf)
            if id(parameter) in seen and isinstance(parameter, nn.Parameter):
                copy = parameter.detach().clone()
                setattr(module, leaf, nn.Parameter(copy, parameter.requires_grad))
            seen.add(id(parameter))


def _holder(model: nn.Module, place: Place) -> tuple[nn.Module, str, bool]:
    """The module that has a weight, its name there, and whether an adapter is around the module."""
    paths = [p.path for p in (place.linear, place.lookup) if p is not None] or [place.owner]
    module = model.get_submodule(".".join(paths[0]))
    inner = getattr(module, "base_layer", None)
    return (module, place.leaf, False) if inner is None else (inner, place.leaf, True)


def _tensor(model: nn.Module, place: Place, meta: Meta) -> Tensor:
    module, leaf, _ = _holder(model, place)
    tensor = getattr(module, leaf)
    if tensor.device.type == "meta":
        raise ProgramError("the model's weights have no data", where=".".join(place.owner))
    if tuple(tensor.shape) != meta.shape:
        raise ProgramError(
            f"the weight is {meta_of(tensor)} now, and the program was made for {meta}",
            where=".".join(place.owner),
        )
    return tensor  # type: ignore[no-any-return]
