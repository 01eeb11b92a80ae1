"""Adapters of peft on lowered models.

peft finds the layers of a lowered model by their names, one for each depth. These methods of its
tuners are extended when it is imported, for models that hold a lowered one:

get_model_config                  default targets are those of the original's model type
inject_adapter                    an adapter without effect, or with NaN as a result, is refused
merge_and_unload, merge_adapter   first, each layer with an adapter gets its own copy of a weight
                                  that it shares with other depths
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import torch
from torch import fx, nn

from reroll.errors import UsageError
from reroll.rewrite.ir.program import Program
from reroll.runtime.functions.weights import Scope
from reroll.runtime.lowering.placement import Placement, placements
from reroll.runtime.lowering.recapture import untie
from reroll.runtime.models.config import RerollConfig
from reroll.runtime.models.modeling import RerollPreTrainedModel

aten = torch.ops.aten


def extend(tuners_utils: ModuleType) -> None:
    """Extend peft's `BaseTuner`, of the module `peft.tuners.tuners_utils`, for lowered models."""
    tuner = tuners_utils.BaseTuner
    get_model_config, inject = tuner.get_model_config, tuner.inject_adapter

    @functools.wraps(get_model_config)
    def config_of_original(model: Any) -> Any:
        found = get_model_config(model)
        config = getattr(model, "config", None)
        if isinstance(config, RerollConfig) and config.original_model_type:
            found = {**found, "model_type": config.original_model_type}
        return found

    @functools.wraps(inject)
    def inject_checked(self: Any, model: Any, *args: Any, **kwargs: Any) -> Any:
        result = inject(self, model, *args, **kwargs)
        for lowered in _lowered_models(model):
            try:
                _check_adapters(lowered, tuners_utils.BaseTunerLayer)
            except UsageError:
                self.model = model
                self._unload_and_optionally_merge(merge=False)
                raise
        return result

    tuner.get_model_config = staticmethod(config_of_original)
    tuner.inject_adapter = inject_checked
    tuner.merge_and_unload = _untying(tuner.merge_and_unload)
    tuner.merge_adapter = _untying(tuner.merge_adapter)


def _untying(merge: Callable[..., Any]) -> Callable[..., Any]:
    """Return a method of a tuner that unties what is adapted before it merges."""

    @functools.wraps(merge)
    def untie_and_merge(self: Any, *args: Any, **kwargs: Any) -> Any:
        for lowered in _lowered_models(self.model):
            untie(lowered)
        return merge(self, *args, **kwargs)

    return untie_and_merge


def _lowered_models(model: nn.Module) -> Iterator[RerollPreTrainedModel]:
    return (m for m in model.modules() if isinstance(m, RerollPreTrainedModel))


def _check_adapters(model: RerollPreTrainedModel, layer_class: type[nn.Module]) -> None:
    """Raise UsageError for an adapter that a lowered model cannot use."""
    beside = _read_beside(model.program)
    for name, layer in model.named_modules():
        if not isinstance(layer, layer_class):
            continue
        base = layer.get_base_layer()  # type: ignore[operator]
        where = f"{name}, {type(layer).__name__}"
        if isinstance(base, Scope):
            raise UsageError(
                "this module holds weights that the model reads, and is not called",
                where=where,
                hint="adapt linear layers and embeddings; train others with modules_to_save",
            )
        if name in beside:
            raise UsageError(
                f"the model reads the weight of this layer ({beside[name]}) beside calling it, "
                "where an adapter has no effect",
                where=where,
                hint="leave it out of target_modules, or train it with modules_to_save",
            )
        magnitudes = getattr(layer, "lora_magnitude_vector", {})
        if any(bool((m.weight == 0).any()) for m in magnitudes.values()):
            raise UsageError(
                "DoRA divides by the norm of each row of the weight, and a row is zero",
                where=where,
                hint="name it in exclude_modules, or use LoRA without use_dora",
            )


def _read_beside(program: Program) -> dict[str, str]:
    """Map the path of each module whose weight is also read without calling it to an op's name."""
    found: dict[str, str] = {}
    for name, place in placements(program).items():
        if place.linear is None and place.lookup is None:
            continue
        for _, graph in program.graphs():
            for node in graph.find_nodes(op="get_attr", target=name):
                for user in node.users:
                    if not _is_call(place, node, user):
                        paths = _paths(place, program.weights[name].index)
                        found |= dict.fromkeys(paths, str(user.target))
    return found


def _paths(place: Placement, index: tuple[int, ...] | None) -> list[str]:
    trips = range(len(index or (0,)))
    return [".".join(path) for trip in trips for path in place.at(trip).paths]


def _is_call(place: Placement, weight: fx.Node, user: fx.Node) -> bool:
    """Whether a node that reads a weight becomes a call of a module that holds it."""
    if place.is_scale:
        return True
    if user.target is aten.embedding.default:
        return place.lookup is not None and user.args[0] is weight
    if user.target is not aten.linear.default or place.linear is None:
        return False
    return user.args[1] is weight or (place.leaf == "bias" and weight in user.all_input_nodes)
