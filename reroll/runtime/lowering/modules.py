"""The module tree of a lowered Program: its weights under their names, one module per trip.

A weight `model.layers.*.mlp.up_proj.weight` of a loop is the parameter `weight` of an `nn.Linear`
at `model.layers.<trip>.mlp.up_proj`, one for each trip. Trips that share an entry share the
Parameter, not the module, so that an adapter can be attached to each depth.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from reroll.rewrite.ir.program import Loop, Program, weight_nodes
from reroll.rewrite.ir.weights.expressions import Meta
from reroll.runtime.functions.weights import ScaledEmbedding, Scope
from reroll.runtime.lowering.placement import Path, path_of, placements


class TripModule(GradientCheckpointingLayer):
    """One trip of a loop; each body has a subclass, whose instances share one `forward`.

    A body with several functions runs the one that `forward` gets as `function`, so that whatever
    acts on calls of modules acts on all of them.
    """

    # the generated code, set by subclasses
    source: str = ""

    def __reduce_ex__(self, protocol: Any) -> Any:
        # subclasses are made anew with the code, by `reassemble`
        _, _, *state = super().__reduce_ex__(protocol)
        return partial(TripModule.__new__, TripModule), (), *state

    def __deepcopy__(self, memo: dict[int, Any]) -> TripModule:
        new = type(self).__new__(type(self))
        memo[id(self)] = new
        new.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return new


@dataclass(frozen=True)
class Reading:
    """Paths by which a graph's code reads a weight: chains of attributes from its own module.

    `linear` and `lookup` are the modules to call for a product with the weight, which may be a
    convolution, or a lookup in it.
    `scaled` says that the module of the lookup also multiplies by a factor.
    `owned` says that the weight belongs to the graph's own module, or to another trip: it is read
    as an attribute. All others are read by calling the module that holds them.
    """

    weight: str
    owned: bool
    linear: str | None = None
    lookup: str | None = None
    scaled: bool = False


@dataclass
class Slot:
    """Modules and attribute names that hold one stored tensor."""

    meta: Meta
    trainable: bool
    holders: list[tuple[nn.Module, str]] = field(default_factory=list)

    @property
    def is_parameter(self) -> bool:
        """Whether the tensor is a Parameter; else it is a buffer."""
        return self.trainable and self.meta.dtype.is_floating_point

    def fill(self, tensor: Tensor) -> None:
        """Set the tensor in all holders, as one Parameter or as a buffer."""
        value = nn.Parameter(tensor) if self.is_parameter else tensor
        for module, leaf in self.holders:
            module._parameters.pop(leaf, None)
            module._buffers.pop(leaf, None)
            if isinstance(value, nn.Parameter):
                # inside accelerate's init_empty_weights, register_parameter makes another one
                module._parameters[leaf] = value
            else:
                # in the original, the factor of embeddings is in no state dict
                own = isinstance(module, ScaledEmbedding)
                module.register_buffer(leaf, value, persistent=not own)


@dataclass
class Tree:
    """Trips of each loop, readings of each weight by graph, and the holders of each tensor."""

    trips: dict[str, list[TripModule]] = field(default_factory=dict)
    readings: dict[str, dict[str, Reading]] = field(default_factory=dict)
    slots: dict[Any, Slot] = field(default_factory=dict)


def build_tree(model: nn.Module, program: Program) -> Tree:
    """Build the modules of a Program under `model`, with parameters on the meta device."""
    builder = _Builder(model, program)
    for loop in program.loops:
        builder.add_loop(loop)
    names = weight_nodes(program.graph)
    builder.tree.readings["main"] = {name: builder.add_weight(name, 0) for name in names}
    for slot in builder.tree.slots.values():
        slot.fill(torch.empty(slot.meta.shape, dtype=slot.meta.dtype, device="meta"))
    for module in model.modules():
        numbered = list(map(str, range(len(module._modules))))
        numbers_only = list(module._modules) == numbered and not module._parameters
        if type(module) is Scope and numbered and numbers_only:
            # a list of layers, as in the original
            module.__class__ = nn.ModuleList  # type: ignore[assignment]
    return builder.tree


class _Builder:
    def __init__(self, model: nn.Module, program: Program) -> None:
        self.model, self.program = model, program
        self.places = placements(program)
        self.tree = Tree()

    def add_loop(self, loop: Loop) -> None:
        """Build the trips of a loop, and the modules of its weights below them."""
        names = list(weight_nodes(loop.body.graph))
        # numbers that do not depend on the graph's order, which a saved Program may change
        links = {name: number for number, name in enumerate(sorted(names))}
        root = self._root(loop, names)
        trips = []
        readings = self.tree.readings.setdefault(loop.name, {})
        for number in range(loop.trips):
            path = tuple(part.replace("*", str(number)) for part in root)
            trip = TripModule()
            self._module(path[:-1], Scope).add_module(path[-1], trip)
            trips.append(trip)
            for name in names:
                reading = self.add_weight(name, number)
                readings[name] = self._from_trip(reading, trip, path, f"link_{links[name]}")
        self.tree.trips[loop.name] = trips

    def add_weight(self, name: str, trip: int) -> Reading:
        """Build the modules of one weight in one trip, and return how the model reads it."""
        weight, placement = self.program.weights[name], self.places[name].at(trip)
        made = [m for m in (placement.linear, placement.lookup) if m is not None]
        modules = [self._module(m.path, m.make) for m in made]
        key = self.program.weights.identity(name, 0 if weight.index is None else weight.index[trip])
        slot = self.tree.slots.setdefault(key, Slot(weight.meta, weight.trainable))
        for module in modules or [self._module(placement.owner, Scope)]:
            if (module, placement.leaf) not in slot.holders:
                slot.holders.append((module, placement.leaf))
        linear = placement.linear if placement.leaf == "weight" else None
        path = placement.paths[0]
        return Reading(
            ".".join((*path, placement.leaf)),
            not path or isinstance(self._module(path, Scope), TripModule),
            None if linear is None else ".".join(linear.path),
            None if placement.lookup is None else ".".join(placement.lookup.path),
            placement.lookup is not None and placement.lookup.scale is not None,
        )

    def _root(self, loop: Loop, names: list[str]) -> Path:
        """Return the path of the trips: that of most of their weights, if it is unused."""
        starts = Counter(n[: n.index("*.") + 1] for n in names if "*." in n)
        for start, _ in starts.most_common():
            root = path_of(start)
            taken = (tuple(p.replace("*", str(t)) for p in root) for t in range(loop.trips))
            if not any(map(self._exists, taken)):
                return root
        return ("loops", *path_of(loop.name), "*")

    def _from_trip(self, reading: Reading, trip: TripModule, path: Path, link: str) -> Reading:
        """Convert a reading from the model to one from a trip: a path below the trip, or a link."""
        prefix = ".".join(path) + "."

        def local(chain: str | None, role: str) -> str | None:
            if chain is None or chain.startswith(prefix):
                return chain and chain.removeprefix(prefix)
            # a link is no submodule, so that a weight outside the trip keeps a single name
            owner, _, leaf = chain.rpartition(".")
            trip.__dict__[f"{link}_{role}"] = self.model.get_submodule(owner)
            return f"{link}_{role}.{leaf}"

        weight = local(reading.weight, "weight")
        assert weight is not None
        linear, lookup = local(reading.linear, "linear"), local(reading.lookup, "lookup")
        return Reading(weight, reading.owned, linear, lookup, reading.scaled)

    def _module(self, path: Path, make: Callable[[], nn.Module]) -> nn.Module:
        """Return the module at a path; create it, and the scopes above it, where missing."""
        module = self.model
        for number, part in enumerate(path):
            if part not in module._modules:
                module.add_module(part, make() if number + 1 == len(path) else Scope())
            module = module._modules[part]  # type: ignore[assignment]
        return module

    def _exists(self, path: Path) -> bool:
        module: nn.Module | None = self.model
        for part in path:
            module = None if module is None else module._modules.get(part)
        return module is not None


def tied_names(model: nn.Module) -> Iterator[tuple[str, str]]:
    """Yield (name, first name) of every parameter that already has another name."""
    first: dict[int, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if id(parameter) in first:
            yield name, first[id(parameter)]
        first.setdefault(id(parameter), name)


Holder: TypeAlias = tuple[nn.Module, str]


def shared_tensors(model: nn.Module) -> list[list[Holder]]:
    """Return the modules and attribute names of every tensor that several of them hold."""
    holders: dict[int, list[Holder]] = {}
    for module in model.modules():
        for leaf, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None:
                holders.setdefault(id(tensor), []).append((module, leaf))
    return [each for each in holders.values() if len(each) > 1]


def share(groups: list[list[Holder]]) -> None:
    """Let all holders of a group hold one tensor again: the first that has data."""
    for holders in groups:
        tensors = [getattr(module, leaf) for module, leaf in holders]
        if all(t is tensors[0] for t in tensors):
            continue
        one = next((t for t in tensors if t.device.type != "meta"), tensors[0])
        for module, leaf in holders:
            setattr(module, leaf, one)
