"""Tensors of a Hugging Face checkpoint under the state-dict names of its model.

transformers renames tensors when it loads a checkpoint, and it merges, splits or transposes some
(experts stored one by one become one tensor). The rules are objects of transformers; here they run
lazily, for one tensor of the model at a time. A first run on meta tensors gives the names and
shapes of their results without reading any tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from reroll.errors import CheckpointError
from reroll.rewrite.checkpoint.model_names import ModelNames
from reroll.rewrite.checkpoint.pickled_files import PickledSource
from reroll.rewrite.checkpoint.safetensors_files import SafetensorsSource, has_safetensors
from reroll.rewrite.ir.weights.expressions import Meta, TensorSource, meta_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def hf_source(directory: str | Path, model: PreTrainedModel) -> HfSource:
    """Open the checkpoint in ``directory`` under the state-dict names of ``model``.

    ``model`` may be on the meta device. Tied weights that the file leaves out are read under the
    name that they are tied to. A base model's checkpoint fits a model with a head, and vice versa.
    Raises CheckpointError if the checkpoint is damaged, quantized, or has a tensor of another
    shape. For a missing tensor the error is raised when that tensor is read.
    """
    method = quantisation(model.config)
    if method is not None:
        raise CheckpointError(
            f"the checkpoint is quantised by {method}", str(directory), UNQUANTISED
        )
    files: TensorSource
    try:
        files = SafetensorsSource(directory)
    except CheckpointError:
        # transformers, too, prefers safetensors
        if has_safetensors(Path(directory)) or not PickledSource.is_in(directory):
            raise
        files = PickledSource(directory)
    return HfSource(files, model, str(directory))


UNQUANTISED = "give the unquantised model, or one that was dequantised and saved"


def quantisation(config: Any) -> str | None:
    """Return a checkpoint's method of quantisation by its configuration; None if not quantised."""
    from transformers.quantizers.auto import AutoHfQuantizer

    quantization = getattr(config, "quantization_config", None)
    if quantization is None:
        return None
    data = quantization if isinstance(quantization, dict) else quantization.to_dict()
    if not AutoHfQuantizer.supports_quant_method(data):
        return None
    return str(data.get("quant_method") or "bitsandbytes")


@dataclass
class Conversion:
    """Application of one conversion rule of transformers, with its input tensors in the file."""

    rule: Any
    # (name in memory, name in the file, the pattern that matched)
    takes: list[tuple[str, str, str]] = field(default_factory=list)

    def run(self, read: Callable[[str], Tensor], model: PreTrainedModel) -> dict[str, Tensor]:
        """Apply the rule; return its results by their state-dict names."""
        rule = deepcopy(self.rule)
        for renamed, stored, pattern in self.takes:
            rule.add_tensor(renamed, stored, pattern, partial(read, stored))
        tensors = rule.convert(self.takes[0][0], model=model, config=model.config)
        return {n: t[0] if isinstance(t, list) else t for n, t in tensors.items()}


class HfSource:
    """Source of a checkpoint's tensors, renamed and converted for a transformers model."""

    def __init__(self, files: TensorSource, model: PreTrainedModel, where: str) -> None:
        self._files = files
        self._model = model
        self._where = where
        self._names = ModelNames(model)
        self._conversion: dict[str, Conversion] = {}
        self._metas: dict[str, Meta] = {}
        # cache of the other results of the last rule, because they are often read next
        self._spare: dict[str, Tensor] = {}
        conversions, self.unread = _conversions(files, model)
        self.beyond = [n for n, renamed in self.unread.items() if self._names.is_beyond(renamed)]
        for conversion in conversions:
            tensors = self._run(conversion, self._file_on_meta)
            for name, tensor in tensors.items():
                self._conversion[name] = conversion
                self._metas[name] = meta_of(tensor)
                self._names.check(name, self._metas[name], where)

    def __getstate__(self) -> dict[str, Any]:
        # a trace leaves hooks of transformers in the model, which no rule calls and pickle refuses
        model = deepcopy(self._model)
        for module in model.modules():
            module._forward_hooks.clear()
            module._forward_pre_hooks.clear()
        return {**self.__dict__, "_model": model}

    def names(self) -> Iterable[str]:
        """Return the state-dict names of the tensors that the checkpoint has."""
        return self._names.available(self._metas)

    @property
    def stored(self) -> Collection[str]:
        """Names of the tensors that are stored under their own names, not under a tied one."""
        return self._metas.keys()

    def meta(self, name: str) -> Meta:
        """Return shape and stored dtype of one tensor; CheckpointError if missing."""
        return self._metas[self._names.resolve(name, self._metas, self._where)]

    def load(self, name: str) -> Tensor:
        """Load one tensor; CheckpointError if missing."""
        name = self._names.resolve(name, self._metas, self._where)
        if name not in self._spare:
            self._spare = self._run(self._conversion[name], self._files.load)
        tensor = self._spare.pop(name)
        # parts of a split tensor share its memory
        owned = tensor.untyped_storage().nbytes() == tensor.nbytes
        return tensor if owned else tensor.clone()

    def _file_on_meta(self, stored: str) -> Tensor:
        meta = self._files.meta(stored)
        return torch.empty(meta.shape, dtype=meta.dtype, device="meta")

    def _run(self, conversion: Conversion, read: Callable[[str], Tensor]) -> dict[str, Tensor]:
        try:
            return conversion.run(read, self._model)
        except (ValueError, RuntimeError, KeyError, IndexError, AttributeError) as error:
            raise CheckpointError(
                f"{conversion.takes[0][0]!r} cannot be made from the checkpoint ({error})",
                where=self._where,
                hint="make the model from the checkpoint's own configuration",
            ) from error


def _conversions(
    files: TensorSource, model: PreTrainedModel
) -> tuple[Iterable[Conversion], dict[str, str]]:
    """Find the conversions that fill the model, as transformers does when it loads.

    Also return the unread tensors of the file, with the names that the rules give them.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import (
        WeightConverter,
        WeightRenaming,
        dot_natural_key,
        rename_source_key,
    )

    rules = get_model_conversion_mapping(model)
    renamings = [r for r in rules if isinstance(r, WeightRenaming)]
    converters = [r for r in rules if isinstance(r, WeightConverter)]
    by_pattern = {p: c for c in converters for p in c.source_patterns}
    wanted: Mapping[str, Tensor] = model.state_dict()
    prefix = model.base_model_prefix
    conversions: dict[str, Conversion] = {}
    unread: dict[str, str] = {}
    # some rules depend on the order: experts are merged in the order of their numbers
    for stored in sorted(files.names(), key=dot_natural_key):
        name, pattern = rename_source_key(stored, renamings, converters, prefix, wanted)
        if name not in wanted and stored in wanted:
            name, pattern = rename_source_key(stored, [], [], prefix, wanted)
        if name not in wanted:
            unread[stored] = name
            continue
        if pattern is None:
            conversion = Conversion(WeightRenaming(stored, name))
        else:
            conversion = Conversion(by_pattern[pattern])
        conversion = conversions.setdefault(name, conversion)
        conversion.takes.append((name, stored, pattern or stored))
    return conversions.values(), unread
