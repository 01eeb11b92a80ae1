"""Convert a lowered model back to a Program: the same graphs over the present weights."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from reroll.errors import ProgramError, UsageError
from reroll.rewrite.capture.side_files import GENERATION_FILE, generation_file
from reroll.rewrite.ir.program import Program
from reroll.rewrite.ir.records import Origin
from reroll.rewrite.ir.weights import Weight, WeightTable
from reroll.rewrite.ir.weights.expressions import Source, meta_of
from reroll.rewrite.ir.weights.sources import MemorySource
from reroll.runtime.functions.weights import ReadEmbedding, ReadLinear
from reroll.runtime.lowering.placement import Placement, placements
from reroll.runtime.models.config import RerollConfig
from reroll.runtime.models.generation import generation_config
from reroll.runtime.models.placing import offloaded_state

MERGE = "merge adapters first: merge_and_unload"


def program_of(
    model: Any, state: Mapping[str, Tensor] | None = None, *, adapters: bool = False
) -> Program:
    """Return the Program of a lowered model with its present weights, or those of a state dict.

    Trips whose weight is one Parameter share an entry. Trips that were untied since have their own,
    and so has a head that is no longer tied to the embeddings. Edits of the configuration and of
    the generation settings go to its origin. Raises UsageError for a module that the Program has no
    place for; with `adapters`, those of peft are ignored instead.
    """
    if not adapters:
        check_modules(model)
    if state is None:
        state = offloaded_state(model)
    program = with_own_heads(model)
    table, tensors = _stored(model, program, state)
    return replace(
        program,
        weights=table,
        source=MemorySource(tensors),
        reference=WeightTable(),
        origin=_origin(model),
    )


def stored_tensors(model: Any) -> tuple[WeightTable, dict[str, Tensor]]:
    """Return the present weight table of a lowered model, and its tensors by stored name."""
    return _stored(model, with_own_heads(model), None)


def from_stored(model: Any, state: Mapping[str, Any], *, every: bool) -> Mapping[str, Any]:
    """Rename a state dict from the names of a saved file to the model's names.

    A file has one name for a shared weight: that of the first trip, as the Program names it. The
    result has each weight under `every` name, or under one: the file's, if the model has it. Other
    names of that weight are then missing, as in what safetensors saves of any model. A state dict
    that does not have exactly the names of a file is returned as it is.
    """
    _, tensors = stored_tensors(model)
    if set(tensors) != set(state):
        return state
    names: dict[int, list[str]] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        names.setdefault(id(tensor), []).append(name)
    renamed: dict[str, Any] = {}
    for stored, tensor in tensors.items():
        own = names[id(tensor)]
        one = stored if stored in own else min(own)
        renamed |= dict.fromkeys(own if every else [one], state[stored])
    return renamed


def kept_tensors(model: Any, program: Program) -> Iterator[Tensor]:
    """Yield the tensors of a lowered model whose dtype is the same in another Program."""
    placed = placements(program)
    for name, weight in program.weights.items():
        if weight.meta.dtype == model.program.weights[name].meta.dtype:
            for trip in range(1 if weight.index is None else len(weight.index)):
                placement = placed[name].at(trip)
                yield getattr(holder_of(model, placement.paths[0])[0], placement.leaf)


def untie(model: Any) -> None:
    """Give every trip its own copy of weights that trips share, so that they change independently.

    Merging an adapter changes the weight below it. Merging the adapters of several trips into one
    shared weight would add all of them to it. peft's merges call this first, on lowered models.
    Where there are adapters, only the layers that have one get a copy: also embeddings or a head
    that are tied to each other. Without adapters, all trips get copies, and a tied head stays tied.
    """
    placed = placements(model.program)
    holders: dict[tuple[int, str], tuple[nn.Module, str, bool, bool]] = {}
    for name, weight in model.program.weights.items():
        for trip in range(len(weight.index or (0,))):
            for path in placed[name].at(trip).paths:
                module, adapted = holder_of(model, path)
                leaf, looped = placed[name].leaf, weight.index is not None
                holders[id(module), leaf] = module, leaf, adapted, looped
    held = [h for h in holders.values() if isinstance(getattr(h[0], h[1]), nn.Parameter)]
    any_adapted = any(adapted for _, _, adapted, _ in held)
    counts = Counter(id(getattr(module, leaf)) for module, leaf, _, _ in held)
    for module, leaf, adapted, looped in held:
        parameter = getattr(module, leaf)
        if (adapted if any_adapted else looped) and counts[id(parameter)] > 1:
            counts[id(parameter)] -= 1
            own = nn.Parameter(parameter.detach().clone(), parameter.requires_grad)
            setattr(module, leaf, own)


# ---- weights


def _stored(
    model: Any, program: Program, state: Mapping[str, Tensor] | None
) -> tuple[WeightTable, dict[str, Tensor]]:
    placed = placements(program)
    table: dict[str, Weight] = {}
    tensors: dict[str, Tensor] = {}
    sources: dict[int, Source] = {}
    # the module tree's places of each stored tensor
    held: dict[str, list[Placement]] = {}
    for name, weight in program.weights.items():
        trips = 1 if weight.index is None else len(weight.index)
        entries: list[Source] = []
        index = []
        for trip in range(trips):
            placement = placed[name].at(trip)
            tensor = _tensor(model, placement)
            source = sources.get(id(tensor))
            if source is None:
                stored = name.replace("*", str(trip))
                source = sources[id(tensor)] = Source(stored, weight.meta)
                tensors[stored] = tensor
            held.setdefault(source.name, []).append(placement)
            if source not in entries:
                entries.append(source)
            index.append(entries.index(source))
        own_index = None if weight.index is None else tuple(index)
        table[name] = Weight(tuple(entries), own_index, weight.trainable)
    if state is not None:
        for stored, places in held.items():
            # the factor of embeddings is in no state dict
            if not places[0].is_scale:
                tensors[stored] = _tensor_from(places, state)
        _check_names(model, held.values(), state)
    for source in sources.values():
        tensor = tensors[source.name]
        if tensor.device.type == "meta":
            raise ProgramError("the model's weights have no data", where=source.name)
        if tuple(tensor.shape) != source.meta.shape:
            raise ProgramError(
                f"the weight is {meta_of(tensor)} now, and the program was made for {source.meta}",
                where=source.name,
            )
    return WeightTable(table), tensors


def _names(placements: list[Placement]) -> list[str]:
    """Return all names that a state dict can have for a weight."""
    return [
        ".".join((*path, *around, placement.leaf))
        for placement in placements
        for path in placement.paths
        for around in ((), ("base_layer",), ("original_module",))
    ]


def _check_names(model: Any, held: Iterable[list[Placement]], state: Mapping[str, Tensor]) -> None:
    """Raise UsageError if a state dict has tensors that the model does not have."""
    known = {name for placements in held for name in _names(placements)} | set(model.state_dict())
    others = [name for name in state if name not in known]
    if others:
        more = f" and {len(others) - 1} more" if len(others) > 1 else ""
        raise UsageError(
            f"the state dict has {others[0]}{more}, which the model does not have",
            where="save_pretrained",
            hint="leave it out of state_dict, or save the model without state_dict",
        )


def _tensor_from(placements: list[Placement], state: Mapping[str, Tensor]) -> Tensor:
    """Return a state dict's tensor for a weight, under any of its names.

    Raises UsageError if there is none, or if names of one parameter have different tensors.
    """
    names = _names(placements)
    tensors = {name: state[name] for name in names if name in state}
    if not tensors:
        raise UsageError("the state dict has no tensor of this name", where=names[0])
    (first, tensor), *others = tensors.items()
    for name, other in others:
        if other is not tensor and not torch.equal(other, tensor):
            raise UsageError(
                f"the state dict has another tensor for {first}, which is the same parameter",
                where=name,
            )
    return tensor


def _tensor(model: nn.Module, placement: Placement) -> Tensor:
    module, _ = holder_of(model, placement.paths[0])
    tensor = getattr(module, placement.leaf, None)
    if not isinstance(tensor, Tensor):
        raise UsageError(
            f"{type(module).__name__} has no {placement.leaf}, which the program reads there",
            where=".".join(placement.paths[0]),
        )
    return tensor


def holder_of(model: nn.Module, path: tuple[str, ...]) -> tuple[nn.Module, bool]:
    """Return the module at a path, and whether an adapter wraps it.

    For adapters, which may wrap each other, the module is the one inside all of them.
    """
    module, adapted = model.get_submodule(".".join(path)), False
    while True:
        inner = (getattr(module, name, None) for name in ("base_layer", "original_module"))
        held = next((m for m in inner if isinstance(m, nn.Module)), None)
        if held is None:
            return module, adapted
        module, adapted = held, True


# ---- changes of modules and configuration


def with_own_heads(model: Any) -> Program:
    """Return the model's Program, with a weight of its own for a head that is no longer tied."""
    program: Program = model.program
    for name, placement in placements(program).items():
        if placement.linear is None or placement.lookup is None or placement.is_scale:
            continue
        head, table = (
            getattr(holder_of(model, path)[0], placement.leaf, None) for path in placement.paths
        )
        if head is table:
            continue
        keep_table = (*placement.lookup.path, placement.leaf) == (*placement.owner, placement.leaf)
        path = placement.linear.path if keep_table else placement.lookup.path
        new = ".".join((*path, placement.leaf))
        program = program.edit()
        for _, graph in program.graphs():
            for node in graph.find_nodes(op="get_attr", target=name):
                _move(node, new, tables=not keep_table)
        program = program.with_weights(program.weights.with_weight(new, program.weights[name]))
    return program


def _move(node: fx.Node, new: str, *, tables: bool) -> None:
    """Let the lookups in a weight read it under a new name, or all its other users."""
    lookup = torch.ops.aten.embedding.default
    users = [u for u in node.users if tables == (u.target is lookup and u.args[0] is node)]
    if not users:
        return
    with node.graph.inserting_before(node):
        weight = node.graph.get_attr(new)
    weight.meta.update(node.meta)
    for user in users:
        user.replace_input_with(node, weight)
    if not node.users:
        node.graph.erase_node(node)


# the functions of modules that compute what a Program computes with their weights
_FORWARDS = {
    nn.Linear: (nn.Linear.forward, ReadLinear.forward),
    nn.Embedding: (nn.Embedding.forward, ReadEmbedding.forward),
}


def check_modules(model: Any) -> None:
    """Raise UsageError for a parameter or a kind of module that the Program has no place for."""
    expected: dict[str, type[nn.Module]] = {}
    for name, placement in placements(model.program).items():
        index = model.program.weights[name].index
        for trip in range(len(index or (0,))):
            at = placement.at(trip)
            expected |= {".".join((*path, at.leaf)): nn.Module for path in at.paths}
            if at.linear is not None:
                expected[".".join((*at.linear.path, at.leaf))] = at.linear.kind
            if at.lookup is not None:
                expected[".".join((*at.lookup.path, at.leaf))] = at.lookup.kind
    present = [n for n, _ in model.named_parameters(remove_duplicate=False)]
    parts = ("base_layer", "lora_", "modules_to_save")
    for name in present:
        if name not in expected and any(part in name for part in parts):
            where = name.rpartition(".")[0]
            raise UsageError("an adapter is no part of a program", where=where, hint=MERGE)
    for name in present:
        if name not in expected:
            owner, _, leaf = name.rpartition(".")
            raise UsageError(
                f"the program has no weight for its {leaf}",
                where=owner,
                hint="put back the module that was there",
            )
    for name, module_class in expected.items():
        module = model.get_submodule(name.rpartition(".")[0])
        allowed = _FORWARDS.get(module_class, (module_class.forward,))
        if module_class is not nn.Module and type(module).forward not in allowed:
            raise UsageError(
                f"a {type(module).__name__} is where the program has a {module_class.__name__}",
                where=name.rpartition(".")[0],
                hint=MERGE,
            )


def _origin(model: Any) -> Origin:
    """Return the origin of the model's Program with the present configuration and settings."""
    origin: Origin = model.program.origin
    before, now = RerollConfig.from_program(model.program).to_dict(), model.config.to_dict()
    edits = {k: v for k, v in now.items() if k not in _OF_THE_FILES and before.get(k, _GONE) != v}
    files = dict(origin.files)
    if model.can_generate() and model.generation_config is not None:
        settings = generation_config(model.program)
        same = settings and settings.to_dict() == model.generation_config.to_dict()
        # transformers saves the file of every model that generates
        if not same or GENERATION_FILE not in files:
            files[GENERATION_FILE] = generation_file(model.generation_config)
    edits = json.loads(json.dumps(edits, default=str))
    return replace(origin, config={**origin.config, **edits}, files=files)


_GONE = object()
# configuration entries that describe the saved files, not the model
_OF_THE_FILES = {
    "architectures", "dtype", "torch_dtype", "transformers_version", "program_file", "model_type",
    "_name_or_path", "original_model_type",
}  # fmt: skip
